"""Laws of all questions to the clients: their cost, and what one invalid client does to a round."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from federation import (
    ODD_NODE,
    Answer,
    Federation,
    batches_of,
    client,
    dropped,
    failing,
    federation,
    replies_of,
    run_round,
    strangers,
    strategy_for,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from helpers import State, random_state
from torch import Tensor, nn
from zoo import ZOO, Entry

from fl_rebasin.flower import (
    ActivationMatching,
    BatchNorm,
    Guard,
    LeastSquares,
    ReBasinStrategy,
    RegMean,
    Repair,
    StraightThrough,
    add_rebasin_handlers,
)
from fl_rebasin.flower.handlers import QUESTIONS
from fl_rebasin.flower.questions import action_of, answer_with, ask
from fl_rebasin.flower.round_clients import RoundClients
from fl_rebasin.merging.clients import Question, Request


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)
    )


NET = Entry(build, lambda: torch.zeros(2, 6), (8, 9))
SHAPE, CLASSES = (6,), 4
SIZES = {1: [24], ODD_NODE: [5, 2, 14], 3: [16]}
# Node 1 has the largest weight: the others are matched to it.
WEIGHTS = {1: 40, ODD_NODE: 20, 3: 30}


# One question


def repeated(model: nn.Module, batches: Iterable[Any], request: Request) -> dict[str, Tensor]:
    """Send the given values back, several times."""
    return {"values": request.states["given"]["values"].repeat(int(request.config["times"]))}


ECHO = Question("echo-of-values", "echo", repeated)


def echoing(message: Message, context: Context) -> Message:
    app = ClientApp()
    answer_with(app, ECHO, lambda context: (nn.Identity(), []))
    return app(message, context)


def total(values: Mapping[str, Tensor]) -> float:
    if values["values"][0] < 0:
        raise ValueError("too cold\nby far")
    return float(values["values"].sum())


def given(*values: float, times: int = 2) -> RecordDict:
    return RecordDict(
        {
            "given": ArrayRecord({"values": Array(np.array(values))}),
            "config": ConfigRecord({"times": times}),
        }
    )


def test_answers_are_returned_by_node_and_costs_are_counted_in_both_directions() -> None:
    world = Federation({1: echoing, 2: echoing, 3: echoing})
    contents = {1: given(1, 2), 3: given(5, times=3)}
    answers = ask(world.grid, ECHO, contents, total, timeout=9)
    assert answers.by_client == {1: 6.0, 3: 15.0}
    assert world.asked("echo_of_values") == [1, 3]
    assert world.grid.send_and_receive.call_args.kwargs == {"timeout": 9}
    metrics = answers.cost.metrics(ECHO.name)
    assert metrics["echo-of-values-clients"] == 2
    assert metrics["echo-of-values-messages"] == 1
    assert metrics["echo-of-values-bytes"] == world.bytes_of("echo_of_values") > 10 * 8
    assert 0 < metrics["echo-of-values-seconds"] < 60
    assert len(metrics) == 4


def test_without_a_client_to_ask_no_message_is_sent() -> None:
    world = Federation({1: echoing})
    answers = ask(world.grid, ECHO, {}, total)
    world.grid.send_and_receive.assert_not_called()
    assert answers.by_client == {}
    assert answers.cost.clients == answers.cost.bytes == answers.cost.messages == 0


def elsewhere(message: Message, context: Context) -> Message:
    return Message(RecordDict({"reply": ArrayRecord()}), reply_to=message)


def not_numbers(message: Message, context: Context) -> Message:
    record = ArrayRecord({"values": Array(np.array(["1", "2"]))})
    return Message(RecordDict({"answer": record}), reply_to=message)


def test_every_invalid_answer_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    apps: dict[int, Answer | None] = {
        1: echoing,
        2: failing,
        3: None,
        4: echoing,
        5: ClientApp(),
        6: elsewhere,
        7: not_numbers,
    }
    contents = {node_id: given(-1.0 if node_id == 4 else 1.0) for node_id in apps}
    answers = ask(Federation(apps).grid, ECHO, contents, total)
    assert answers.by_client == {1: 2.0}
    assert answers.cost.clients == 1
    hint = r" \(a ClientApp answers this question after fl_rebasin\.flower\.add_rebasin_handlers\("
    expected = [
        r"echo of node 2 dropped: disk is full" + hint,
        r"echo of node 4 dropped: too cold" + hint,
        r"echo of node 5 dropped: No query function .* 'rebasin_echo_of_values'" + hint,
        r"echo of node 6 dropped: 'answer' is missing" + hint,
        r"echo of node 7 dropped: values: its payload has dtype <U1, which is not a number type"
        + hint,
        r"echo of node 3 dropped: no answer$",
    ]
    lines = dropped(caplog)
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert re.match(words, line), line


def test_one_call_lets_a_client_answer_every_question() -> None:
    calls = []

    def load(context: Context) -> tuple[nn.Module, list[Any]]:
        calls.append("own")
        return nn.Linear(2, 2), []

    def load_held_back(context: Context) -> tuple[nn.Module, list[Any]]:
        calls.append("held back")
        return nn.Linear(2, 2), []

    bare, full = ClientApp(), ClientApp()
    add_rebasin_handlers(bare, load)
    add_rebasin_handlers(full, load, load_held_back)
    world = Federation({1: bare, 2: full})
    asked = {asking.question.name for asking in ASKING.values()}
    # `test_joint_head` has the two questions of the joint head.
    assert {question.name for question in QUESTIONS} == asked | {FEATURES.name, HEAD.name}
    for question in QUESTIONS:
        calls.clear()
        ask(world.grid, question, dict.fromkeys(world.apps, RecordDict()), total)
        # An empty message leads to no useful answer; here only the loading matters.
        held_back = question.data == "held-back"
        assert calls == (["held back"] if held_back else ["own", "own"]), question.name
        unknown = f"No query function registered with name '{action_of(question)}'"
        refused = [reply.has_error() and unknown in reply.error.reason for reply in world.replies]
        assert refused[-2:] == [held_back, False]


def test_a_question_about_all_data_gets_all_data() -> None:
    seen: list[str] = []

    def loading(which: str) -> Callable[[Context], tuple[nn.Module, list[Any]]]:
        def load(context: Context) -> tuple[nn.Module, list[Any]]:
            seen.append(which)
            return nn.Identity(), []

        return load

    app = ClientApp()
    add_rebasin_handlers(app, loading("some"), load_all=loading("all"))
    for question, expected in ((STATISTICS, "some"), (FEATURES, "all"), (HEAD, "all")):
        ask(Federation({1: app}).grid, question, {1: RecordDict()}, total)
        assert seen[-1] == expected


def test_a_question_of_your_own_reaches_the_clients_of_a_round(
    caplog: pytest.LogCaptureFixture,
) -> None:
    replies = {reply.metadata.src_node_id: reply for reply in replies_of({1: {}, 2: {}, 3: {}})}
    app = client(nn.Identity, more=[ECHO])
    world = Federation({1: app, 2: app, 3: ClientApp()})
    clients = RoundClients(world.grid, replies)
    assert list(clients.ids) == [1, 2, 3]
    shared = {"values": torch.tensor([1.0, 2.0])}
    requests = {node_id: Request({"given": shared}, {"times": node_id}) for node_id in clients.ids}
    answers = clients.ask(ECHO, requests, total)
    assert answers.by_client == {1: 3.0, 2: 6.0}
    assert answers.cost.bytes == world.bytes_of("echo_of_values")
    assert len(dropped(caplog)) == 1
    # A state dict that goes to all clients is packed once.
    assert len({id(message.content["given"]) for message in world.sent}) == 1


# One invalid client in a whole round


@dataclass(frozen=True)
class Asking:
    """A question, and the options that make the strategy ask it.

    Attributes:
        question: the question.
        options: options of the strategy.
        metric: name of what asks, as metrics spell it.
    """

    question: Question
    options: Mapping[str, Any]
    metric: str

    @property
    def action(self) -> str:
        return action_of(self.question).removeprefix("rebasin_")


STATISTICS, PERMUTATION, LAYER_SUMS, REGMEAN_SUMS, FEATURES, HEAD, LOSSES = QUESTIONS
ASKING = {
    "batchnorm": Asking(STATISTICS, {"finish": [BatchNorm()]}, "batchnorm"),
    "activations": Asking(PERMUTATION, {"align": ActivationMatching()}, "matching"),
    "then-weights": Asking(PERMUTATION, {"align": ActivationMatching(True)}, "matching"),
    "straight-through": Asking(PERMUTATION, {"align": StraightThrough()}, "matching"),
    "least-squares": Asking(LAYER_SUMS, {"finish": [LeastSquares()]}, "least-squares"),
    "regmean": Asking(REGMEAN_SUMS, {"finish": [RegMean()]}, "regmean"),
    "repair": Asking(LAYER_SUMS, {"finish": [Repair()]}, "repair"),
    "guard": Asking(LOSSES, {"guard": Guard()}, "guard"),
}
SUBJECTS = {
    "batchnorm": "BatchNorm statistics",
    "matching": "permutation",
    "least_squares": "least-squares sums",
    "regmean": "RegMean sums",
    "guard": "evaluation of candidates",
}


# What follows the answers of "then-weights" does not depend on why one of them is missing.
EACH_WAY = [name for name in ASKING if name != "then-weights"]


def asking_strategy(name: str) -> ReBasinStrategy:
    return strategy_for(NET, **{"finish": [], **ASKING[name].options})


@cache
def pairs(node_id: int) -> list[Any]:
    return batches_of(SHAPE, SIZES[node_id], seed=node_id % 5, classes=CLASSES)


def with_data(batches: list[Any]) -> ClientApp:
    return client(NET.build, batches, batches)


def honest(node_id: int) -> ClientApp:
    return with_data(pairs(node_id))


def states() -> dict[int, State]:
    """Independent models, so that every way to match finds something else."""
    return strangers(NET, SIZES)


def round_with(name: str, odd: Answer | None) -> tuple[State, MetricRecord, Federation]:
    data = {node_id: pairs(node_id) for node_id in SIZES}
    world = federation(NET, data, held_back=data, odd=lambda honest: odd)
    model = random_state(NET, 0)
    result, metrics = run_round(asking_strategy(name), world, model, states(), WEIGHTS, loss=0.5)
    return result, metrics, world


@cache
def without_the_odd_one(name: str) -> tuple[State, MetricRecord]:
    return round_with(name, None)[:2]


@cache
def with_the_odd_one(name: str) -> tuple[State, MetricRecord]:
    return round_with(name, honest(ODD_NODE))[:2]


def same(left: State, right: State) -> bool:
    return all(torch.equal(left[key], right[key]) for key in left)


def all_finite(state: State) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in state.values())


def survives_the_wire(content: RecordDict) -> bool:
    proto = recorddict_to_proto(content).SerializeToString()
    return bool(recorddict_from_proto(RecordDictProto.FromString(proto)) == content)


@pytest.mark.parametrize("name", ASKING)
def test_each_question_is_one_option_and_reports_its_cost(name: str) -> None:
    asking = ASKING[name]
    result, metrics, world = round_with(name, honest(ODD_NODE))
    asked = set(world.asked(asking.action))
    assert asked == SIZES.keys() - ({1} if asking.metric == "matching" else set())
    assert metrics[f"{asking.metric}-clients"] == len(asked)
    assert metrics[f"{asking.metric}-bytes"] == world.bytes_of(asking.action) > 0
    messages = len(world.asked(asking.action)) / len(asked)
    assert metrics[f"{asking.metric}-messages"] == messages
    assert 0 < metrics[f"{asking.metric}-seconds"] < 60
    assert all_finite(result)
    # The client's own answer matters.
    other, other_metrics = without_the_odd_one(name)
    if name == "guard":
        assert metrics["guard-loss-aligned"] != other_metrics["guard-loss-aligned"]
    else:
        assert not same(result, other)
    assert all(survives_the_wire(each.content) for each in (*world.sent, *world.replies))
    assert all(list(reply.content) == ["answer"] for reply in world.replies)
    # Nothing else is asked; a fitted model needs statistics of its own.
    more = {"rebasin_batchnorm"} if asking.options.get("finish") else set()
    kinds = {message.metadata.message_type for message in world.sent}
    assert kinds == {f"query.{action}" for action in {action_of(asking.question)} | more}


def rubbish(message: Message, context: Context) -> Message:
    content = RecordDict({"rubbish": ConfigRecord({"permutation": "sums"})})
    return Message(content, reply_to=message)


def nan_inputs() -> list[Any]:
    return [(inputs * torch.nan, labels) for inputs, labels in pairs(ODD_NODE)]


TROUBLE: dict[str, Callable[[], Answer | None]] = {
    "no-handler": ClientApp,
    "failing": lambda: failing,
    "rubbish": lambda: rubbish,
    "no-samples": lambda: with_data([]),
    "empty-batch": lambda: with_data([(torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.long))]),
    "nan-inputs": lambda: with_data(nan_inputs()),
    "other-inputs": lambda: with_data([(torch.zeros(4, 7), torch.zeros(4, dtype=torch.long))]),
    "other-model": lambda: client(ZOO["mlp"].build, pairs(ODD_NODE), pairs(ODD_NODE)),
}
WORDS = {
    "no-handler": {"": r"No query function registered with name 'rebasin_ACTION'"},
    "failing": {"": "disk is full"},
    "rubbish": {"": "'answer' is missing"},
    "no-samples": {"guard": "no held-back example", "": "no batch"},
    "empty-batch": {"": r"\S"},
    "nan-inputs": {"guard": "none of its losses is finite", "": "NaN or infinite"},
    "other-inputs": {"": r"\S"},
    "other-model": {
        "activations": "the state dict lacks 9 keys of the spec",
        "straight-through": "the state dict lacks 9 keys of the spec",
        "": r"Error\(s\) in loading state_dict",
    },
}


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("name", EACH_WAY)
def test_a_round_goes_on_without_a_client_that_has_no_valid_answer(
    name: str, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    asking = ASKING[name]
    expected, expected_metrics = without_the_odd_one(name)
    caplog.clear()
    result, metrics, _ = round_with(name, TROUBLE[trouble]())
    assert same(result, expected)
    count = f"{asking.metric}-clients"
    assert metrics[count] == expected_metrics[count] == len(SIZES) - 1 - ("matching" in count)
    words = WORDS[trouble].get(name, WORDS[trouble][""]).replace("ACTION", asking.action)
    (line,) = dropped(caplog)
    assert re.match(
        rf"{SUBJECTS[asking.action]} of node {ODD_NODE} dropped: .*{words}.*"
        r"\(a ClientApp answers this question after fl_rebasin.flower.add_rebasin_handlers\(",
        line,
    ), line


@pytest.mark.parametrize("name", ASKING)
def test_a_client_that_never_answers_is_logged_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    result, _, world = round_with(name, None)
    action = ASKING[name].action
    # Once per question, not once per layer: each message to it costs the whole timeout.
    assert world.asked(action).count(ODD_NODE) == 1
    assert dropped(caplog) == [f"{SUBJECTS[action]} of node {ODD_NODE} dropped: no answer"]
    assert all_finite(result)


UNLABELLED = {
    "inputs-only": lambda: [inputs for inputs, _ in pairs(ODD_NODE)],
    "single": lambda: [(inputs,) for inputs, _ in pairs(ODD_NODE)],
    "other-classes": lambda: [(inputs, labels + CLASSES) for inputs, labels in pairs(ODD_NODE)],
}
NEEDS_LABELS = {
    "straight-through": "straight-through matching needs batches of inputs and labels",
    "guard": "the guard needs batches of inputs and labels, got a (Tensor|tuple)",
}


@pytest.mark.parametrize("labels", UNLABELLED)
@pytest.mark.parametrize("name", EACH_WAY)
def test_only_questions_about_labels_need_them(
    name: str, labels: str, caplog: pytest.LogCaptureFixture
) -> None:
    asking = ASKING[name]
    wanted = without_the_odd_one(name) if name in NEEDS_LABELS else with_the_odd_one(name)
    caplog.clear()
    result, metrics, _ = round_with(name, with_data(UNLABELLED[labels]()))
    assert same(result, wanted[0])
    assert metrics[f"{asking.metric}-clients"] == wanted[1][f"{asking.metric}-clients"]
    if name not in NEEDS_LABELS:
        assert dropped(caplog) == []
        return
    words = "out of bounds" if labels == "other-classes" else NEEDS_LABELS[name]
    (line,) = dropped(caplog)
    assert re.match(rf"{SUBJECTS[asking.action]} of node {ODD_NODE} dropped: .*{words}", line)


def single_sample() -> list[Any]:
    inputs, labels = pairs(ODD_NODE)[0]
    return [(inputs[:1], labels[:1])]


@pytest.mark.parametrize("name", ASKING)
def test_a_single_sample_leaves_the_model_finite(name: str) -> None:
    result, _, _ = round_with(name, with_data(single_sample()))
    assert all_finite(result)


@pytest.mark.parametrize("name", [name for name in ASKING if ASKING[name].metric == "matching"])
def test_with_a_single_sample_the_weights_decide_which_units_match(name: str) -> None:
    # In one sample no two units vary together.
    strategy, shared = asking_strategy(name), random_state(NET, 0)
    generator = torch.Generator().manual_seed(0)
    planted = {
        node_id: strategy.spec.apply(strategy.spec.random(generator), shared) for node_id in SIZES
    }
    world = Federation({node_id: with_data(single_sample()) for node_id in SIZES})
    result, _ = run_round(strategy, world, shared, planted, WEIGHTS, loss=0.5)
    for key, value in result.items():
        torch.testing.assert_close(value, shared[key], msg=key)


def dead(state: State) -> State:
    """All hidden units are off, whatever the inputs."""
    return {**state, "1.weight": 0 * state["1.weight"], "1.bias": 0 * state["1.bias"] - 1}


@pytest.mark.parametrize("name", ASKING)
def test_dead_units_do_not_end_a_round(name: str, caplog: pytest.LogCaptureFixture) -> None:
    world = Federation({node_id: honest(node_id) for node_id in SIZES})
    everywhere = {node_id: dead(state) for node_id, state in states().items()}
    model = dead(random_state(NET, 0))
    result, metrics = run_round(asking_strategy(name), world, model, everywhere, WEIGHTS, loss=0.5)
    assert all_finite(result)
    assert metrics[f"{ASKING[name].metric}-clients"] >= len(SIZES) - 1
    assert dropped(caplog) == []
