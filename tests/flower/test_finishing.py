"""Finishing steps in whole rounds: class-aware heads, steps of a user's own, and their order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from federation import (
    ODD_NODE,
    Answer,
    Federation,
    batches_of,
    changing,
    client,
    dropped,
    failing,
    federation,
    one_round,
    put,
    replies_of,
    run_round,
    strangers,
    strategy_for,
    tensors,
)
from flwr.app import ArrayRecord, RecordDict
from helpers import State, assert_same, named_spec, nearby, random_state
from torch import Tensor, nn
from zoo import ZOO

from fl_rebasin.flower import BatchNorm, ClassAwareHead, Guard, LeastSquares, ReBasinStrategy
from fl_rebasin.merging.clients import Clients, Question, Request, Tensors
from fl_rebasin.merging.finishing_step import Finish, Finished
from fl_rebasin.merging.heads import class_aware_head
from fl_rebasin.merging.merge_many import merge_many
from fl_rebasin.state_dicts import StateDict

NET, WITH_NORM = "mlp", "conv-batchnorm-flatten"
WEIGHTS = {1: 1, 2: 2, ODD_NODE: 4}

# Class-aware heads

LABELS: dict[int, Any] = {1: [9, 0, 1, 5], 2: [0, 3, 20, 1], ODD_NODE: [1, 1, 1, 0]}
NO_ANSWERS = Federation(dict.fromkeys(WEIGHTS))


def headed(counts: Mapping[int, Any]) -> tuple[State, State]:
    """The merge of three independent models: with a class-aware head, and without."""
    spec, models = named_spec(NET), strangers(NET, WEIGHTS)
    global_model = random_state(ZOO[NET], 0)
    merge = merge_many(
        spec, list(models.values()), weights=list(WEIGHTS.values()), unit_order_of=global_model
    )
    aligned = {
        node: spec.apply(permutation, models[node])
        for node, permutation in zip(models, merge.permutations, strict=True)
    }
    head = class_aware_head(
        merge.state_dict,
        [aligned[node] for node in counts],
        [torch.tensor(each) for each in counts.values()],
        "6.weight",
        "6.bias",
    )
    return head, merge.state_dict


def with_heads() -> ReBasinStrategy:
    return strategy_for(NET, finish=[ClassAwareHead("labels")])


def test_rows_of_the_last_layer_are_averaged_by_label_counts() -> None:
    models, global_model = strangers(NET, WEIGHTS), random_state(ZOO[NET], 0)
    result, _ = run_round(with_heads(), NO_ANSWERS, global_model, models, WEIGHTS, labels=LABELS)
    expected, plain = headed(LABELS)
    assert_same(result, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(result["6.weight"], plain["6.weight"], atol=1e-3)
    hidden = [key for key in plain if not key.startswith("6.")]
    assert_same(
        {key: result[key] for key in hidden},
        {key: plain[key] for key in hidden},
        rtol=1e-5,
        atol=1e-6,
    )


def test_heads_do_not_depend_on_the_order_of_the_units() -> None:
    global_model, spec = random_state(ZOO[NET], 0), named_spec(NET)
    generator = torch.Generator().manual_seed(4)
    models = {node: nearby(global_model, node) for node in WEIGHTS}
    moved = {node: spec.apply(spec.random(generator), state) for node, state in models.items()}
    expected, _ = run_round(with_heads(), NO_ANSWERS, global_model, models, WEIGHTS, labels=LABELS)
    result, _ = run_round(with_heads(), NO_ANSWERS, global_model, moved, WEIGHTS, labels=LABELS)
    assert_same(result, expected, rtol=1e-5, atol=1e-6)


def test_heads_ask_the_clients_nothing() -> None:
    world = federation(NET, dict.fromkeys(WEIGHTS, ()))
    models, global_model = strangers(NET, WEIGHTS), random_state(ZOO[NET], 0)
    _, metrics = run_round(with_heads(), world, global_model, models, WEIGHTS, labels=LABELS)
    assert world.sent == []
    assert not any(key.endswith("-messages") for key in metrics)


BAD_COUNTS: dict[str, tuple[list[Any], str]] = {
    "negative": ([9, -1, 1, 5], r"labels .*\[9, -1, 1, 5\]"),
    "huge": ([9, 10**16, 1, 5], r"labels .*\[9, 10000000000000000, 1, 5\]"),
    "nan": ([9.0, float("nan"), 1.0, 5.0], r"labels .*\[9\.0, nan, 1\.0, 5\.0\]"),
    "infinite": ([9.0, float("inf"), 1.0, 5.0], r"labels .*\[9\.0, inf, 1\.0, 5\.0\]"),
    "all-zero": ([0, 0, 0, 0], "all label counts are 0"),
}


@pytest.mark.parametrize("case", BAD_COUNTS)
def test_invalid_label_counts_are_dropped_and_logged(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    counts, words = BAD_COUNTS[case]
    models, global_model = strangers(NET, WEIGHTS), random_state(ZOO[NET], 0)
    result, _ = run_round(
        with_heads(), NO_ANSWERS, global_model, models, WEIGHTS, labels={**LABELS, 2: counts}
    )
    # The model of this client is averaged all the same.
    expected, _ = headed({node: each for node, each in LABELS.items() if node != 2})
    assert_same(result, expected, rtol=1e-5, atol=1e-6)
    (line,) = dropped(caplog)
    assert re.match(rf"label counts of node 2 dropped: {words}", line), line


NO_COUNTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({}, "expected one list 'labels' in its metrics"),
    "a-number": ({"labels": 7}, "expected one list 'labels' in its metrics"),
    "too-few": ({"labels": [1, 2, 3]}, r"label counts of shape \(3,\) for 4 classes"),
    "none": ({"labels": []}, r"label counts of shape \(0,\) for 4 classes"),
}


@pytest.mark.parametrize("case", NO_COUNTS)
def test_without_valid_label_counts_the_head_is_the_plain_average(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, words = NO_COUNTS[case]
    global_model = random_state(ZOO[NET], 0)
    replies = replies_of(strangers(NET, WEIGHTS), WEIGHTS, **metrics)
    result, _ = one_round(with_heads(), NO_ANSWERS, global_model, replies)
    plain, _ = one_round(strategy_for(NET, finish=[]), NO_ANSWERS, global_model, replies)
    assert result is not None
    assert plain is not None
    assert [(key, array.data) for key, array in result.items()] == [
        (key, array.data) for key, array in plain.items()
    ]
    lines = dropped(caplog)
    assert len(lines) == len(WEIGHTS)
    for line in lines:
        assert re.match(rf"label counts of node \d+ dropped: {words}", line), line


def test_invalid_label_counts_are_logged_once_for_all_steps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    finish = [LeastSquares(label_counts="labels"), ClassAwareHead("labels")]
    models, global_model = strangers(NET, WEIGHTS), random_state(ZOO[NET], 0)
    counts = {**LABELS, 2: [0, -3, 20, 1]}
    strategy = strategy_for(NET, finish=finish)
    result, metrics = run_round(
        strategy, world_of(NET), global_model, models, WEIGHTS, labels=counts
    )
    (line,) = dropped(caplog)
    assert line.startswith("label counts of node 2 dropped: ")
    assert metrics["least-squares-clients"] == len(WEIGHTS)
    # The fit sets the hidden layers, the class-aware head the last layer.
    fitted, _ = run_round(
        strategy_for(NET, finish=finish[:1]),
        world_of(NET),
        global_model,
        models,
        WEIGHTS,
        labels=counts,
    )
    expected, _ = headed({node: each for node, each in LABELS.items() if node != 2})
    assert_same(
        result,
        {**fitted, "6.weight": expected["6.weight"], "6.bias": expected["6.bias"]},
        rtol=1e-5,
        atol=1e-6,
    )


# A step of a user's own


def mean_outputs(model: nn.Module, batches: Iterable[Any], request: Request) -> Tensors:
    """Answer: the number of samples, and the mean of the merged model's outputs."""
    model.load_state_dict(request.states["merged"])
    with torch.no_grad():
        outputs = torch.cat([model.eval()(batch) for batch in batches])
    return {
        "count": torch.tensor([len(outputs)]),
        "mean": outputs.double().mean(0) * float(request.config["share"]),
    }


QUESTION = Question("mean-outputs", "mean outputs", mean_outputs)


def read_mean(sent: Tensors) -> tuple[int, Tensor]:
    if not bool(torch.isfinite(sent["mean"]).all()):
        raise ValueError("the mean is not finite")
    return int(sent["count"]), sent["mean"]


@dataclass(frozen=True)
class Centred:
    """Finishing step: shifts the last bias, so that the mean output is 0 over all clients.

    Attributes:
        share: the share of the mean output that is removed.
        question: what the clients are asked.
    """

    share: float = 1.0
    question: Question = QUESTION

    name: ClassVar[str] = "centred"
    needs_models: ClassVar[bool] = False

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish:
        bias = list(model.state_dict())[-1]

        def finish(merged: StateDict, clients: Clients) -> Finished:
            request = Request({"merged": merged}, {"share": self.share})
            answers = clients.ask(self.question, dict.fromkeys(clients.ids, request), read_mean)
            costs = {self.name: answers.cost}
            if not answers.by_client:
                return Finished(merged, costs, problems=("no mean output",), applied=False)
            pairs = answers.by_client.values()
            mean = sum(count * mean for count, mean in pairs) / sum(count for count, _ in pairs)
            shifted = (merged[bias].double() - mean).to(merged[bias].dtype)
            return Finished({**merged, bias: shifted}, costs, "the outputs are centred")

        return finish


def data(name: str) -> dict[int, list[Tensor]]:
    shape = ZOO[name].inputs().shape[1:]
    return {node: batches_of(shape, [20 + node % 9], seed=node % 5) for node in WEIGHTS}


def world_of(name: str, odd: Callable[[Answer], Answer | None] | None = None) -> Federation:
    return federation(name, data(name), odd=odd, more=[QUESTION])


def finished(name: str, finish: list[Any], world: Federation, **options: Any) -> tuple[State, Any]:
    strategy = strategy_for(name, finish=finish, **options)
    models, global_model = strangers(name, WEIGHTS), random_state(ZOO[name], 0)
    return run_round(strategy, world, global_model, models, WEIGHTS)


def mean_output(name: str, state: State, nodes: Iterable[int] = WEIGHTS) -> Tensor:
    model = ZOO[name].build().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.cat([batch for node in nodes for batch in data(name)[node]])).mean(0)


@pytest.mark.parametrize("before", [[], [LeastSquares()], [BatchNorm(), LeastSquares()]])
@pytest.mark.parametrize("name", [NET, WITH_NORM])
def test_a_step_of_a_users_own_works_on_the_result_of_the_steps_before_it(
    name: str, before: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    world = world_of(name)
    result, metrics = finished(name, [*before, Centred()], world)
    plain, _ = finished(name, before, world_of(name))
    bias = list(plain)[-1]
    mean = mean_output(name, plain)
    assert float(mean.abs().max()) > 1e-3
    assert_same(result, {**plain, bias: plain[bias] - mean}, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean_output(name, result), 0 * mean, rtol=0, atol=1e-5)

    assert world.asked("mean_outputs") == sorted(WEIGHTS)
    assert metrics["centred-clients"] == len(WEIGHTS)
    assert metrics["centred-messages"] == 1
    assert metrics["centred-bytes"] == world.bytes_of("mean_outputs") > 0
    assert metrics["centred-seconds"] > 0
    assert "the outputs are centred" in caplog.messages


def test_the_configuration_of_a_request_reaches_the_clients() -> None:
    result, _ = finished(NET, [Centred(share=0.5)], world_of(NET))
    plain, _ = finished(NET, [], world_of(NET))
    half = mean_output(NET, plain) / 2
    torch.testing.assert_close(result["6.bias"], plain["6.bias"] - half, rtol=1e-4, atol=1e-5)


def not_finite(content: RecordDict) -> None:
    put(content, "answer", "mean", content.array_records["answer"]["mean"].numpy() * float("nan"))


ODD: dict[str, tuple[Callable[[Answer], Answer | None], str]] = {
    "not-finite": (
        lambda app: changing(app, "mean_outputs", not_finite),
        r"the mean is not finite \(a ClientApp answers this question after .*add_rebasin_handlers",
    ),
    "without-the-question": (
        lambda app: client(ZOO[NET].build, data(NET)[ODD_NODE]),
        "No query function registered with name 'rebasin_mean_outputs'",
    ),
    "failing": (lambda app: failing, "disk is full"),
    "unanswered": (lambda app: None, "no answer"),
}


@pytest.mark.parametrize("case", ODD)
def test_invalid_answers_to_a_users_question_are_dropped_and_logged(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    odd, words = ODD[case]
    result, metrics = finished(NET, [Centred()], world_of(NET, odd))
    others = [node for node in WEIGHTS if node != ODD_NODE]
    mean = mean_output(NET, result, others)
    torch.testing.assert_close(mean, 0 * mean, rtol=0, atol=1e-5)
    assert metrics["centred-clients"] == len(others)
    (line,) = dropped(caplog)
    assert re.match(rf"mean outputs of node {ODD_NODE} dropped: {words}", line), line


def test_a_step_without_answers_returns_its_input_and_logs_its_problems(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = federation(NET, data(NET))
    result, metrics = finished(NET, [Centred()], world)
    plain, _ = finished(NET, [], world)
    assert_same(result, plain, rtol=0, atol=0)
    assert metrics["centred-clients"] == 0
    assert "no mean output" in caplog.messages


@pytest.mark.parametrize("guard", [None, Guard()])
def test_a_result_that_is_not_finite_is_not_used(
    guard: Guard | None, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"align": None, "guard": guard}
    result, metrics = finished(NET, [Centred(share=1e300)], world_of(NET), **options)
    plain, _ = finished(NET, [], world_of(NET), **options)
    assert_same(result, plain, rtol=0, atol=0)
    assert metrics["centred-clients"] == len(WEIGHTS)
    assert "the aggregated model holds NaN or infinite values and is not used" in caplog.text


def with_labels(name: str, classes: int) -> dict[int, list[Any]]:
    shape = ZOO[name].inputs().shape[1:]
    return {node: batches_of(shape, [12], seed=node % 5, classes=classes) for node in WEIGHTS}


def test_the_guard_judges_a_model_after_each_step() -> None:
    held_back = with_labels(WITH_NORM, classes=3)
    world = federation(WITH_NORM, data(WITH_NORM), held_back, more=[QUESTION])
    finish = [BatchNorm(), LeastSquares(), Centred()]
    _, metrics = finished(WITH_NORM, finish, world, guard=Guard(), align=None)
    assert [key for key in metrics if key.startswith("guard-loss-")] == [
        "guard-loss-aligned",
        "guard-loss-aligned+least-squares",
        "guard-loss-aligned+least-squares+centred",
    ]
    assert metrics["centred-messages"] == 1


def test_a_question_about_held_back_data_gets_them() -> None:
    seen: list[int] = []

    def count(model: nn.Module, batches: Iterable[Any], request: Request) -> Tensors:
        pairs = list(batches)
        seen.append(len(pairs[0][0]))
        return mean_outputs(model, [inputs for inputs, _ in pairs], request)

    question = Question("held-back", "mean held-back outputs", count, data="held-back")
    held_back = with_labels(NET, classes=4)
    world = federation(NET, data(NET), held_back, more=[question])
    _, metrics = finished(NET, [Centred(question=question)], world)
    assert seen == [12] * len(WEIGHTS)
    assert metrics["centred-clients"] == len(WEIGHTS)
    assert world.asked("held_back") == sorted(WEIGHTS)


def test_a_step_may_have_nothing_to_do_for_a_model() -> None:
    class OnlyConvolutions:
        name = "only-convolutions"
        needs_models = False

        def bind(self, model: nn.Module, example_inputs: Any) -> Finish | None:
            assert not any(isinstance(module, nn.Conv2d) for module in model.modules())
            return None

    world = world_of(NET)
    result, metrics = finished(NET, [OnlyConvolutions()], world)
    plain, _ = finished(NET, [], world)
    assert_same(result, plain, rtol=0, atol=0)
    assert world.sent == []
    assert not any(key.startswith("only-convolutions") for key in metrics)


def test_steps_get_the_aligned_model_of_each_client_whose_reply_is_used() -> None:
    given: list[dict[int, StateDict]] = []

    class Watching:
        name = "watching"
        needs_models = True

        def bind(self, model: nn.Module, example_inputs: Any) -> Finish:
            def finish(merged: StateDict, clients: Clients) -> Finished:
                given.append(dict(clients.models))
                return Finished(merged)

            return finish

    models, global_model = strangers(NET, WEIGHTS), random_state(ZOO[NET], 0)
    models[3] = {**models[1], "1.weight": models[1]["1.weight"] * torch.nan}
    strategy = strategy_for(NET, finish=[Watching()])
    replies = replies_of(models, {**WEIGHTS, 3: 5})
    result, _ = one_round(strategy, NO_ANSWERS, ArrayRecord(global_model), replies)
    (aligned,) = given
    assert list(aligned) == list(WEIGHTS)
    total = sum(WEIGHTS.values())
    mean = {
        key: sum(weight / total * aligned[node][key] for node, weight in WEIGHTS.items())
        for key in global_model
    }
    assert_same(tensors(result), mean, rtol=1e-5, atol=1e-6)
    spec, own = named_spec(NET), list(models.values())[: len(WEIGHTS)]
    merge = merge_many(spec, own, list(WEIGHTS.values()), unit_order_of=global_model)
    for permutation, model, node in zip(merge.permutations, own, WEIGHTS, strict=True):
        assert_same(dict(aligned[node]), spec.apply(permutation, model), rtol=0, atol=0)


class Unanswered:
    """A fit that no client answers: the model needs BatchNorm statistics instead."""

    name, needs_models = "unanswered", False

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish:
        return lambda merged, clients: Finished(merged, applied=False, recalibrate=True)


@pytest.mark.parametrize("earlier", [[], ["centred"]])
def test_a_failed_fit_is_replaced_by_batchnorm_statistics(earlier: list[str]) -> None:
    steps = [Centred() for _ in earlier]
    world = federation(WITH_NORM, data(WITH_NORM), more=[QUESTION])
    found, _ = finished(WITH_NORM, [*steps, Unanswered()], world)
    assert world.asked("batchnorm") == sorted(WEIGHTS)
    expected, _ = finished(WITH_NORM, [*steps, BatchNorm()], world)
    assert_same(found, expected, rtol=0, atol=0)


def test_a_failed_fit_after_batchnorm_asks_for_nothing() -> None:
    world = federation(WITH_NORM, data(WITH_NORM), more=[QUESTION])
    found, _ = finished(WITH_NORM, [BatchNorm(), Unanswered()], world)
    assert world.asked("batchnorm") == sorted(WEIGHTS)
    expected, _ = finished(WITH_NORM, [BatchNorm()], world)
    assert_same(found, expected, rtol=0, atol=0)


def test_statistics_after_another_step_are_a_candidate_of_their_own() -> None:
    world = federation(WITH_NORM, data(WITH_NORM), with_labels(WITH_NORM, classes=3))
    finish = [LeastSquares(), BatchNorm()]
    _, metrics = finished(WITH_NORM, finish, world, guard=Guard(), align=None)
    assert [key for key in metrics if key.startswith("guard-loss-")] == [
        "guard-loss-aligned",
        "guard-loss-aligned+least-squares",
        "guard-loss-aligned+least-squares+batchnorm",
    ]
