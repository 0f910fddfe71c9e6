"""Laws of all questions to clients: what they cost, and what one bad client can do to a round."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
    one_round,
    prepare,
    replies_of,
    tensors,
)
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from helpers import State, random_state
from torch import nn
from zoo import ZOO, Entry

from fl_rebasin.flower import ReBasinStrategy, add_rebasin_handlers
from fl_rebasin.flower.questions import Question, ask


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)
    )


NET = Entry(build, lambda: torch.zeros(2, 6), (8, 9))
SHAPE, CLASSES = (6,), 4
SIZES = {1: [24], ODD_NODE: [5, 2, 14], 3: [16]}
# Node 1 is the heaviest: the others are matched to it.
WEIGHTS = {1: 40, ODD_NODE: 20, 3: 30}


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


# One question


QUESTION = Question("echo", "echo", "add_rebasin_handlers")


def echoing(message: Message, context: Context) -> Message:
    """Send back what came, twice."""
    values = message.content.array_records["given"]["values"].numpy()
    twice = ArrayRecord({"values": Array(np.concatenate([values, values]))})
    return Message(RecordDict({"given": twice}), reply_to=message)


def echo(content: RecordDict) -> float:
    values = content.array_records["given"]["values"].numpy()
    if values[0] < 0:
        raise ValueError("too cold\nby far")
    return float(values.sum())


def given(*values: float) -> RecordDict:
    return RecordDict({"given": ArrayRecord({"values": Array(np.array(values))})})


def test_answers_come_by_node_and_costs_are_counted_both_ways() -> None:
    world = Federation({1: echoing, 2: echoing, 3: echoing})
    answers = ask(world.grid, QUESTION, {1: given(1, 2), 3: given(5)}, echo, timeout=9)
    assert answers.by_node == {1: 6.0, 3: 10.0}
    assert world.asked("echo") == [1, 3]
    assert world.grid.send_and_receive.call_args.kwargs == {"timeout": 9}
    assert answers.metrics["echo-clients"] == 2
    assert answers.metrics["echo-bytes"] == world.bytes_of("echo") > 9 * 8
    assert 0 < answers.metrics["echo-seconds"] < 60


def test_nobody_to_ask_is_no_message() -> None:
    world = Federation({1: echoing})
    answers = ask(world.grid, QUESTION, {}, echo)
    world.grid.send_and_receive.assert_not_called()
    assert answers.by_node == {}
    assert answers.metrics["echo-clients"] == answers.metrics["echo-bytes"] == 0


def test_every_answer_that_is_not_good_is_named_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def elsewhere(message: Message, context: Context) -> Message:
        return Message(RecordDict({"taken": ArrayRecord()}), reply_to=message)

    apps: dict[int, Answer | None] = {
        1: echoing, 2: failing, 3: None, 4: echoing, 5: ClientApp(), 6: elsewhere,
    }  # fmt: skip
    world = Federation(apps)
    contents = {node_id: given(-1.0 if node_id == 4 else 1.0) for node_id in apps}
    answers = ask(world.grid, QUESTION, contents, echo)
    assert answers.by_node == {1: 2.0}
    hint = r" \(a ClientApp answers this query after fl_rebasin\.flower\.add_rebasin_handlers\("
    expected = [
        r"echo of node 2 dropped: disk is full" + hint,
        r"echo of node 4 dropped: too cold" + hint,
        r"echo of node 5 dropped: No query function registered with name 'rebasin_echo'" + hint,
        r"echo of node 6 dropped: 'given' is missing" + hint,
        r"echo of node 3 dropped: no answer$",
    ]
    lines = dropped(caplog)
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert re.match(words, line), line


def test_one_call_lets_a_client_answer_everything() -> None:
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
    for name, whose in (
        ("batchnorm", "own"),
        ("matching", "own"),
        ("least_squares", "own"),
        ("guard", "held back"),
    ):
        calls.clear()
        question = Question(name, name, "add_rebasin_handlers")
        replies = []
        for node_id in (1, 2):
            message = Message(
                RecordDict(), dst_node_id=node_id, message_type=f"query.{question.action}"
            )
            replies += world.deliver([message], timeout=None)
        # None of them gets far with an empty message; that they were called is the point.
        assert calls == ([whose] if name == "guard" else [whose, whose]), name
        unanswered = "No query function registered with name 'rebasin_guard'"
        assert (unanswered in replies[0].error.reason) == (name == "guard")


# One bad client in a whole round


@dataclass(frozen=True)
class Asking:
    """A question as the strategy is switched to it."""

    action: str
    options: Mapping[str, Any]
    what: str

    @property
    def prefix(self) -> str:
        return self.action.replace("_", "-")


ASKING = {
    "batchnorm": Asking("batchnorm", {"recalibrate_batchnorm": True}, "BatchNorm statistics"),
    "activations": Asking("matching", {"matching": "activations"}, "permutation"),
    "then-weights": Asking("matching", {"matching": "activations-then-weights"}, "permutation"),
    "straight-through": Asking("matching", {"matching": "straight-through"}, "permutation"),
    "layerwise": Asking("least_squares", {"least_squares": "layerwise"}, "least-squares sums"),
    "one-pass": Asking("least_squares", {"least_squares": "one-pass"}, "least-squares sums"),
    "rescaling": Asking("least_squares", {"least_squares": "rescaling"}, "least-squares sums"),
    "guard": Asking("guard", {"guard": True}, "evaluation of candidates"),
}


# What comes after the answers is the same whatever one of them lacks.
QUESTIONS = [name for name in ASKING if name != "then-weights"]


@cache
def strategy_for(name: str) -> ReBasinStrategy:
    """FedAvg has no memory: one strategy serves every test."""
    return ReBasinStrategy(
        model=NET.build(),
        example_inputs=NET.inputs(),
        **{"recalibrate_batchnorm": False, **ASKING[name].options},
    )


def pairs(node_id: int) -> list[Any]:
    return batches_of(SHAPE, SIZES[node_id], seed=node_id % 5, classes=CLASSES)


def honest(node_id: int) -> ClientApp:
    return client(NET.build, pairs(node_id), pairs(node_id))


def with_data(batches: list[Any]) -> ClientApp:
    return client(NET.build, batches, batches)


@cache
def states() -> dict[int, State]:
    """Models that share nothing, so that every way to match finds something else."""
    return {node_id: random_state(NET, seed) for seed, node_id in enumerate(SIZES, start=1)}


def run_round(name: str, odd: Answer | None) -> tuple[State, MetricRecord, Federation]:
    apps: dict[int, Answer | None] = {node_id: honest(node_id) for node_id in SIZES}
    apps[ODD_NODE] = odd
    world = Federation(apps)
    replies = replies_of(states(), WEIGHTS, loss=0.5)
    result, metrics = one_round(strategy_for(name), world, random_state(NET, 0), replies)
    assert metrics is not None
    return tensors(result), metrics, world


@cache
def without_the_odd_one(name: str) -> tuple[State, MetricRecord]:
    return run_round(name, None)[:2]


@cache
def with_the_odd_one(name: str) -> tuple[State, MetricRecord]:
    return run_round(name, honest(ODD_NODE))[:2]


def same(left: State, right: State) -> bool:
    return all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", ASKING)
def test_each_question_is_one_option_and_reports_what_it_costs(name: str) -> None:
    asking = ASKING[name]
    result, metrics, world = run_round(name, honest(ODD_NODE))
    asked = set(world.asked(asking.action))
    assert asked == SIZES.keys() - ({1} if asking.action == "matching" else set())
    assert metrics[f"{asking.prefix}-clients"] == len(asked)
    assert metrics[f"{asking.prefix}-bytes"] == world.bytes_of(asking.action) > 0
    assert 0 < metrics[f"{asking.prefix}-seconds"] < 60
    assert all(bool(torch.isfinite(value).all()) for value in result.values())
    # What the others find does not hold for this client as well.
    other, other_metrics = without_the_odd_one(name)
    if name == "guard":
        assert metrics["guard-loss-aligned"] != other_metrics["guard-loss-aligned"]
    else:
        assert not same(result, other)
    # All of it survives Flower's wire format.
    for message in (*world.sent, *world.replies):
        proto = recorddict_to_proto(message.content).SerializeToString()
        assert recorddict_from_proto(RecordDictProto.FromString(proto)) == message.content
    # Nothing else is asked.
    more = {"batchnorm"} if asking.action == "least_squares" else set()
    kinds = {message.metadata.message_type for message in world.sent}
    assert kinds == {f"query.rebasin_{action}" for action in {asking.action} | more}


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
    "rubbish": {"": "'(statistics|permutation|sums|scores)' is missing"},
    "no-samples": {"guard": "no held-back example", "": "no batch"},
    "empty-batch": {"": r"\S"},
    "nan-inputs": {"guard": "none of its losses is finite", "": "NaN or infinite"},
    "other-inputs": {"": r"\S"},
    "other-model": {"": r"Error\(s\) in loading state_dict"},
}


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_round_goes_on_without_the_client_that_has_no_good_answer(
    name: str, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    asking = ASKING[name]
    expected, expected_metrics = without_the_odd_one(name)
    caplog.clear()
    result, metrics, _ = run_round(name, TROUBLE[trouble]())
    assert same(result, expected)
    count = f"{asking.prefix}-clients"
    assert metrics[count] == expected_metrics[count] == len(SIZES) - 1 - ("matching" in count)
    words = WORDS[trouble].get(name, WORDS[trouble][""]).replace("ACTION", asking.action)
    (line,) = dropped(caplog)
    assert re.match(
        rf"{asking.what} of node {ODD_NODE} dropped: .*{words}.*"
        rf"\(a ClientApp answers this query after fl_rebasin.flower.add_{asking.action}_handler",
        line,
    )


@pytest.mark.parametrize("name", ASKING)
def test_a_client_that_never_answers_is_named_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    result, _, world = run_round(name, None)
    # Once a question, not once a layer: each message to it costs the whole timeout.
    assert world.asked(ASKING[name].action).count(ODD_NODE) == 1
    assert dropped(caplog) == [f"{ASKING[name].what} of node {ODD_NODE} dropped: no answer"]
    assert all(bool(torch.isfinite(value).all()) for value in result.values())


UNLABELLED = {
    "inputs-only": lambda: [inputs for inputs, _ in pairs(ODD_NODE)],
    "single": lambda: [(inputs,) for inputs, _ in pairs(ODD_NODE)],
    "other-classes": lambda: [(inputs, labels + CLASSES) for inputs, labels in pairs(ODD_NODE)],
}


@pytest.mark.parametrize("labels", UNLABELLED)
@pytest.mark.parametrize("name", QUESTIONS)
def test_only_what_needs_labels_misses_them(
    name: str, labels: str, caplog: pytest.LogCaptureFixture
) -> None:
    result, metrics, _ = run_round(name, with_data(UNLABELLED[labels]()))
    if name in ("straight-through", "guard"):
        words = "out of bounds" if labels == "other-classes" else "needs? batches of inputs and lab"
        (line,) = dropped(caplog)
        assert re.match(rf"{ASKING[name].what} of node {ODD_NODE} dropped: .*{words}", line)
        expected, _ = without_the_odd_one(name)
    else:
        assert dropped(caplog) == []
        expected, good_metrics = with_the_odd_one(name)
        count = f"{ASKING[name].prefix}-clients"
        assert metrics[count] == good_metrics[count]
    assert same(result, expected)


def single_sample() -> list[Any]:
    inputs, labels = pairs(ODD_NODE)[0]
    return [(inputs[:1], labels[:1])]


@pytest.mark.parametrize("name", ASKING)
def test_a_single_sample_leaves_the_model_finite(name: str) -> None:
    result, _, _ = run_round(name, with_data(single_sample()))
    assert all(bool(torch.isfinite(value).all()) for value in result.values())


@pytest.mark.parametrize("name", [name for name in ASKING if ASKING[name].action == "matching"])
def test_a_single_sample_misleads_nobody_about_the_units(name: str) -> None:
    # In one sample no two units vary together: the weights have to say it.
    strategy, shared = strategy_for(name), random_state(NET, 0)
    generator = torch.Generator().manual_seed(0)
    planted = {
        node_id: strategy.spec.apply(strategy.spec.random(generator), shared) for node_id in SIZES
    }
    world = Federation({node_id: with_data(single_sample()) for node_id in SIZES})
    result, _ = one_round(strategy, world, shared, replies_of(planted, WEIGHTS, loss=0.5))
    for key, value in tensors(result).items():
        torch.testing.assert_close(value, shared[key], msg=key)


def dead(state: State) -> State:
    """All hidden units are off, whatever comes in."""
    return {**state, "1.weight": 0 * state["1.weight"], "1.bias": 0 * state["1.bias"] - 1}


@pytest.mark.parametrize("name", ASKING)
def test_dead_units_do_not_end_a_round(name: str, caplog: pytest.LogCaptureFixture) -> None:
    world = Federation({node_id: honest(node_id) for node_id in SIZES})
    everybody = {node_id: dead(state) for node_id, state in states().items()}
    replies = replies_of(everybody, WEIGHTS, loss=0.5)
    result, metrics = one_round(strategy_for(name), world, dead(random_state(NET, 0)), replies)
    assert all(bool(torch.isfinite(value).all()) for value in tensors(result).values())
    assert metrics is not None
    assert metrics[f"{ASKING[name].prefix}-clients"] >= len(SIZES) - 1
    assert dropped(caplog) == []
