"""Least squares over clients: the same as in one place, whatever a single client answers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from batchnorm_inputs import batchnorm_inputs
from federation import (
    ODD_NODE,
    Answer,
    Federation,
    Net,
    batches_of,
    changing,
    dropped,
    entry_of,
    failing,
    federation,
    put,
    put_payload,
    run_round,
    strangers,
    strategy_for,
    vast,
)
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvgM
from helpers import State, assert_same, named_spec, random_state
from torch import Tensor, nn
from zoo import ZOO, Entry

from fl_rebasin.flower import BatchNorm, LeastSquares, RegMean, Repair
from fl_rebasin.flower.questions import TIMEOUT
from fl_rebasin.flower.round_clients import RoundClients
from fl_rebasin.merging.finishing_step import Finished, FinishingStep
from fl_rebasin.merging.heads import without_label_prior
from fl_rebasin.merging.least_squares import fit_least_squares
from fl_rebasin.merging.least_squares.plan import plan
from fl_rebasin.merging.merge_many import Merge, merge_many
from fl_rebasin.state_dicts import average

Method = LeastSquares | RegMean | Repair
NETS = ("mlp", "conv-batchnorm-flatten", "residual-batchnorm")
NET, WITH_NORM = NETS[:2]
METHODS = (LeastSquares(), RegMean(), Repair())
SIZES = {5: [30], 8: [20, 24], ODD_NODE: [9, 40]}
WEIGHTS = {5: 2.0, 8: 1.0, ODD_NODE: 4.0}

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def action_of(method: Method) -> str:
    return "regmean" if isinstance(method, RegMean) else "least_squares"


def subject_of(method: Method) -> str:
    return "RegMean sums" if isinstance(method, RegMean) else "least-squares sums"


@cache
def data(name: str) -> dict[int, list[Tensor]]:
    shape = ZOO[name].inputs().shape[1:]
    return {node: batches_of(shape, sizes, seed=node % 4) for node, sizes in SIZES.items()}


def clients(name: str, odd: Callable[[Answer], Answer | None] | None = None) -> Federation:
    return federation(name, data(name), odd=odd)


def finished(
    name: str, finish: Sequence[FinishingStep], world: Federation, **options: Any
) -> tuple[State, MetricRecord]:
    """Run one round with some finishing steps."""
    strategy = strategy_for(name, finish=finish, **options)
    global_model = random_state(ZOO[name], 0)
    return run_round(strategy, world, global_model, strangers(name, SIZES), WEIGHTS, loss=0.5)


@cache
def merged(name: str) -> tuple[Merge, dict[int, State]]:
    """The aligned average, and the aligned model of each client."""
    models = strangers(name, SIZES)
    merge = merge_many(
        named_spec(name),
        list(models.values()),
        list(WEIGHTS.values()),
        unit_order_of=random_state(ZOO[name], 0),
    )
    aligned = {
        node: named_spec(name).apply(permutation, models[node])
        for node, permutation in zip(models, merge.permutations, strict=True)
    }
    return merge, aligned


def in_one_place(name: str, method: Method, nodes: Iterable[int] = SIZES) -> State:
    """The fit in one place, with the models and data of some of the clients."""
    merge, aligned = merged(name)
    models = [aligned[node] for node in nodes]
    batches = [data(name)[node] for node in nodes]
    return fit_least_squares(ZOO[name].build(), merge.state_dict, models, batches, method)


def assert_close(left: State, right: State) -> None:
    """Equal up to sums in another order, which a solver may magnify."""
    assert_same(left, right, rtol=2e-4, atol=2e-5)


# The same as in one place


@each_method
@pytest.mark.parametrize("name", NETS)
def test_the_fit_over_messages_is_the_fit_in_one_place(name: str, method: Method) -> None:
    world = clients(name)
    result, metrics = finished(name, [method], world)
    assert_close(result, in_one_place(name, method))

    plain, _ = finished(name, [], Federation(dict.fromkeys(SIZES)))
    assert any(not torch.allclose(result[key], plain[key], atol=1e-2) for key in result)

    layers = len(plan(ZOO[name].build(), ZOO[name].inputs()))
    messages = 1 if isinstance(method, RegMean) else layers
    action = action_of(method)
    assert world.asked(action) == sorted(messages * list(SIZES))
    assert metrics[f"{method.name}-messages"] == messages
    assert metrics[f"{method.name}-clients"] == len(SIZES)
    assert metrics[f"{method.name}-bytes"] == world.bytes_of(action)
    assert 0 < metrics[f"{method.name}-seconds"] < 60


def test_layers_with_many_inputs_are_rescaled() -> None:
    # The 28 inputs of the first layer and the 6 of the last are fitted, the 55 between are not.
    method = LeastSquares(max_features=28)
    result, _ = finished(WITH_NORM, [method], clients(WITH_NORM))
    assert_close(result, in_one_place(WITH_NORM, method))
    more, _ = finished(WITH_NORM, [LeastSquares()], clients(WITH_NORM))
    assert not torch.allclose(result["5.weight"], more["5.weight"], atol=1e-2)


@pytest.mark.parametrize("method", [LeastSquares(ridge=0.5), RegMean(ridge=0.5)])
def test_the_ridge_is_that_of_the_method(method: Method) -> None:
    result, _ = finished(NET, [method], clients(NET))
    assert_close(result, in_one_place(NET, method))
    weaker = in_one_place(NET, type(method)())
    assert not torch.allclose(result["1.weight"], weaker["1.weight"], atol=1e-3)


def test_without_alignment_the_plain_average_is_fitted() -> None:
    result, metrics = finished(NET, [LeastSquares()], clients(NET), align=None)
    models = list(strangers(NET, SIZES).values())
    plain = average(models, list(WEIGHTS.values()))
    expected = fit_least_squares(ZOO[NET].build(), plain, models, list(data(NET).values()))
    assert_close(result, expected)
    assert [key for key in metrics if key.startswith("rebasin-")] == ["rebasin-dropped"]


@each_method
@pytest.mark.parametrize("name", NETS[1:])
def test_batchnorm_gets_the_statistics_of_its_inputs_and_the_function_stays(
    name: str, method: Method
) -> None:
    world = clients(name)
    result, metrics = finished(name, [method], world)
    assert metrics["batchnorm-clients"] == len(SIZES)
    assert world.asked("batchnorm") == sorted(SIZES)
    model = ZOO[name].build()
    model.load_state_dict(result)
    batches = [batch for each in data(name).values() for batch in each]
    seen = batchnorm_inputs(model, batches, frozen=True)
    assert seen
    for layer, values in seen.items():
        varies = values.var(0) > 1e-6
        for key, expected in (("running_mean", values.mean(0)), ("running_var", values.var(0))):
            found = result[f"{layer}.{key}"].double()
            torch.testing.assert_close(found[varies], expected[varies], rtol=1e-3, atol=1e-3)


def test_a_fit_after_batchnorm_fits_the_recalibrated_average() -> None:
    world = clients(WITH_NORM)
    result, metrics = finished(WITH_NORM, [BatchNorm(), LeastSquares()], world)
    # Once for each of the two steps: the fit estimates the statistics by itself.
    assert world.asked("batchnorm") == sorted(2 * list(SIZES))
    assert metrics["batchnorm-messages"] == 2
    assert metrics["batchnorm-bytes"] == world.bytes_of("batchnorm")
    recalibrated, _ = finished(WITH_NORM, [BatchNorm()], clients(WITH_NORM))
    _, aligned = merged(WITH_NORM)
    batches = list(data(WITH_NORM).values())
    model = ZOO[WITH_NORM].build()
    expected = fit_least_squares(model, recalibrated, list(aligned.values()), batches)
    assert_close(result, expected)


def corrected(name: str, counts: Mapping[int, Sequence[int]]) -> list[State]:
    """The aligned models; those with label counts lose their own label prior."""
    _, aligned = merged(name)
    table = {node: torch.tensor(each) for node, each in counts.items()}
    total = sum(table.values(), torch.zeros(4))
    return [
        without_label_prior(model, table[node], total, "6.bias") if node in table else model
        for node, model in aligned.items()
    ]


@each_method
def test_with_label_counts_the_targets_lose_their_label_priors(method: Method) -> None:
    counts = {node: [3 * node, 40, 0, 5] for node in SIZES}
    strategy = strategy_for(NET, finish=[type(method)(label_counts="labels")])
    global_model, models = random_state(ZOO[NET], 0), strangers(NET, SIZES)
    result, _ = run_round(strategy, clients(NET), global_model, models, WEIGHTS, labels=counts)
    batches = list(data(NET).values())
    expected = fit_least_squares(
        ZOO[NET].build(), merged(NET)[0].state_dict, corrected(NET, counts), batches, method
    )
    assert_close(result, expected)
    assert not torch.allclose(expected["6.bias"], in_one_place(NET, method)["6.bias"], atol=1e-2)


def test_a_client_with_invalid_label_counts_keeps_its_prior(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counts = {5: [15, 40, 0, 5], 8: [1, 2, 3, -4], ODD_NODE: [0, 7, 90, 3]}
    strategy = strategy_for(NET, finish=[LeastSquares(label_counts="labels")])
    global_model, models = random_state(ZOO[NET], 0), strangers(NET, SIZES)
    result, metrics = run_round(
        strategy, clients(NET), global_model, models, WEIGHTS, labels=counts
    )
    del counts[8]
    batches = list(data(NET).values())
    expected = fit_least_squares(
        ZOO[NET].build(), merged(NET)[0].state_dict, corrected(NET, counts), batches
    )
    assert_close(result, expected)
    assert metrics["least-squares-clients"] == len(SIZES)
    (line,) = dropped(caplog)
    assert line.startswith("label counts of node 8 dropped: labels ")


INPUTS_AND_UNITS = {"1": (13, 7), "4": (8, 7), "6": (8, 4)}


@each_method
def test_only_sums_travel_to_the_server(method: Method) -> None:
    world = clients(NET)
    finished(NET, [method], world)
    seen = set()
    for reply in world.replies:
        assert list(reply.content) == ["answer"]
        for key, array in reply.content.array_records["answer"].items():
            layer, kind = key.split("/")
            inputs, units = INPUTS_AND_UNITS[layer]
            shapes = {
                "count": (1,),
                "gram": (inputs, inputs),
                "cross": (inputs, units),
                "squares": (units,),
                "merged_mean": (units,),
                "merged_deviation": (units,),
                "own_mean": (units,),
                "own_deviation": (units,),
            }
            assert array.numpy().shape == shapes[kind]
            assert array.numpy().dtype == np.float64
            seen.add(kind)
    if isinstance(method, Repair):
        assert seen == {"count", "merged_mean", "merged_deviation", "own_mean", "own_deviation"}
    else:
        assert seen == {"count", "gram", "cross", "squares"}


@each_method
def test_the_model_of_one_client_goes_to_no_other(method: Method) -> None:
    world = clients(NET)
    finished(NET, [method], world)
    _, aligned = merged(NET)
    names = {"own"} if isinstance(method, RegMean) else {"own", "merged"}
    for message in world.sent:
        records = message.content.array_records
        assert records.keys() == names
        own = dict(records["own"].to_torch_state_dict())
        assert_same(own, aligned[message.metadata.dst_node_id], rtol=0, atol=0)


@each_method
def test_keys_keep_the_order_of_the_global_model(method: Method) -> None:
    # Strategies with a memory pair arrays by position.
    global_model = random_state(ZOO[WITH_NORM], 0)
    backwards = {key: global_model[key] for key in reversed(global_model)}
    strategy = strategy_for(WITH_NORM, FedAvgM(server_momentum=0.5), finish=[method])
    models = strangers(WITH_NORM, SIZES)
    result, _ = run_round(strategy, clients(WITH_NORM), backwards, models, WEIGHTS)
    assert list(result) == list(backwards)
    for key, value in result.items():
        assert value.shape == global_model[key].shape
        assert value.dtype == global_model[key].dtype


# Invalid answers

GRAM, CROSS, SQUARES, COUNT = "1/gram", "1/cross", "1/squares", "1/count"


def of_first_layer(
    change: Callable[[RecordDict], object],
) -> Callable[[RecordDict], None]:
    """Change only the sums of the first layer."""

    def careful(content: RecordDict) -> None:
        if any(key.startswith("1/") for key in content.array_records["answer"]):
            change(content)

    return careful


def odd_client(
    method: Method, change: Callable[[RecordDict], object]
) -> Callable[[Answer], Answer | None]:
    return lambda app: changing(app, action_of(method), of_first_layer(change))


def entry(key: str, change: Callable[[np.ndarray], Any]) -> Callable[[RecordDict], object]:
    def put_changed(content: RecordDict) -> None:
        old = content.array_records["answer"][key].numpy().copy()
        put(content, "answer", key, np.asarray(change(old)))

    return put_changed


def at(place: tuple[int, ...], value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(old: np.ndarray) -> np.ndarray:
        old[place] = value
        return old

    return change


BAD_SUMS: dict[str, tuple[Callable[[RecordDict], object], str]] = {
    "nan-gram": (entry(GRAM, at((0, 0), np.nan)), "1: gram is not finite or too large"),
    "infinite-cross": (entry(CROSS, at((0, 0), np.inf)), "1: cross is not finite or too large"),
    "minus-infinite": (entry(CROSS, at((0, 0), -np.inf)), "1: cross is not finite or too large"),
    "huge": (entry(CROSS, at((0, 0), -1e31)), "1: cross is not finite or too large"),
    "asymmetric": (entry(GRAM, at((0, 1), 1e5)), r"1: X\^T X is not symmetric"),
    "negative-diagonal": (entry(GRAM, at((2, 2), -1.0)), r"1: X\^T X has a negative diagonal"),
    "negative-squares": (entry(SQUARES, at((0,), -1.0)), "1: squares is negative"),
    "negative-count": (
        entry(COUNT, lambda old: -old),
        r"1: -49\.0 is not a number of samples",
    ),
    "zero-count": (entry(COUNT, lambda old: 0 * old), r"1: 0\.0 is not a number of samples"),
    "huge-count": (
        entry(COUNT, lambda old: old * 1e15),
        r"1: 4\.9e\+16 is not a number of samples",
    ),
    "nan-count": (entry(COUNT, lambda old: old * np.nan), "1: count is not finite or too large"),
    "scalar-count": (
        entry(COUNT, lambda old: old[0]),
        r"1: count is torch\.float64 of shape \(\), expected float64 of shape \(1,\)",
    ),
    "integer-count": (
        entry(COUNT, lambda old: old.astype(np.int64)),
        r"1: count is torch\.int64 of shape \(1,\), expected float64 of shape \(1,\)",
    ),
    "float32": (
        entry(GRAM, lambda old: old.astype(np.float32)),
        r"1: gram is torch\.float32 of shape \(13, 13\), expected float64 of shape \(13, 13\)",
    ),
    "complex": (entry(GRAM, lambda old: old.astype(complex)), r"1: gram is torch\.complex128"),
    "text": (entry(COUNT, lambda old: ["many"]), "1/count: its payload .* dtype <U4, which is no"),
    "short": (
        entry(GRAM, lambda old: old[:-1, :-1]),
        r"1: gram is torch\.float64 of shape \(12, 12\), expected float64 of shape \(13, 13\)",
    ),
    "broadcasts": (
        entry(CROSS, lambda old: old[:, :1]),
        r"1: cross is torch\.float64 of shape \(13, 1\)",
    ),
    "transposed": (
        entry(CROSS, lambda old: old.T),
        r"1: cross is torch\.float64 of shape \(7, 13\)",
    ),
    "missing-key": (
        lambda content: content.array_records["answer"].pop(CROSS),
        r"the question asks for other sums: \['1/cross'\]",
    ),
    "extra-key": (
        lambda content: put(content, "answer", "1/spare", np.zeros(1)),
        r"the question asks for other sums: \['1/spare'\]",
    ),
    "another-layer": (
        lambda content: put(content, "answer", "9/count", np.ones(1)),
        r"the question asks for other sums: \['9/count'\]",
    ),
    "nothing": (
        lambda content: content.array_records["answer"].clear(),
        r"the question asks for other sums: \['1/count', '1/cross', '1/gram'\]",
    ),
    "no-record": (lambda content: content.pop("answer"), "'answer' is missing"),
    "metrics": (
        lambda content: content.update(answer=MetricRecord({COUNT: 1.0})),
        "'answer' is missing",
    ),
    "garbage": (
        lambda content: put_payload(content, "answer", GRAM, b"x"),
        "1/gram: .* array in NumPy's format",
    ),
    "vast": (
        lambda content: put_payload(content, "answer", GRAM, vast()),
        r"1/gram: its payload claims .* 80000000000000 bytes, .* holds 0",
    ),
}
IN_ONE_MESSAGE = ("nan-gram", "short", "missing-key", "extra-key", "no-record", "vast")
"""Cases that RegMean tries as well: its answers are read by the same code."""


@cache
def without_the_odd_one(name: str, method: Method) -> State:
    return finished(name, [method], clients(name, lambda app: None))[0]


@each_method
def test_the_fit_goes_on_with_the_clients_that_answer(method: Method) -> None:
    others = [node for node in SIZES if node != ODD_NODE]
    for name in NETS[:2]:
        assert_close(without_the_odd_one(name, method), in_one_place(name, method, others))


@pytest.mark.parametrize(
    ("case", "method"),
    [(case, LeastSquares()) for case in BAD_SUMS] + [(case, RegMean()) for case in IN_ONE_MESSAGE],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_invalid_sums_are_dropped_and_logged(
    case: str, method: Method, caplog: pytest.LogCaptureFixture
) -> None:
    change, words = BAD_SUMS[case]
    expected = without_the_odd_one(NET, method)
    caplog.clear()
    result, metrics = finished(NET, [method], clients(NET, odd_client(method, change)))
    assert_same(result, expected, rtol=0, atol=0)
    assert metrics[f"{method.name}-clients"] == len(SIZES) - 1
    (line,) = dropped(caplog)
    assert re.match(
        rf"{subject_of(method)} of node {ODD_NODE} dropped: {words}.*add_rebasin_handlers\(app",
        line,
    ), line


BAD_MOMENTS = {
    "negative-deviation": (
        entry("1/merged_deviation", at((0,), -1.0)),
        "1: merged_deviation is negative",
    ),
    "negative-own-deviation": (
        entry("1/own_deviation", at((3,), -1e-9)),
        "1: own_deviation is negative",
    ),
    "nan-mean": (entry("1/own_mean", at((3,), np.nan)), "1: own_mean is not finite"),
    "infinite-mean": (entry("1/merged_mean", at((3,), np.inf)), "1: merged_mean is not finite"),
    "short": (
        entry("1/merged_mean", lambda old: old[1:]),
        r"1: merged_mean is torch\.float64 of shape \(6,\)",
    ),
    "float32": (
        entry("1/own_mean", lambda old: old.astype(np.float32)),
        r"1: own_mean is torch\.float32",
    ),
    "zero-count": (entry(COUNT, lambda old: 0 * old), r"1: 0\.0 is not a number of samples"),
    "sums-of-a-fit": (
        lambda content: put(content, "answer", GRAM, np.zeros((13, 13))),
        r"the question asks for other sums: \['1/gram'\]",
    ),
}


@pytest.mark.parametrize("case", BAD_MOMENTS)
def test_invalid_moments_are_dropped_and_logged(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, words = BAD_MOMENTS[case]
    expected = without_the_odd_one(NET, Repair())
    caplog.clear()
    result, metrics = finished(NET, [Repair()], clients(NET, odd_client(Repair(), change)))
    assert_same(result, expected, rtol=0, atol=0)
    assert metrics["repair-clients"] == len(SIZES) - 1
    (line,) = dropped(caplog)
    assert re.match(rf"least-squares sums of node {ODD_NODE} dropped: {words}", line), line


def test_a_client_that_fails_at_one_layer_is_not_asked_about_the_next() -> None:
    def careful(content: RecordDict) -> None:
        if "4/gram" in content.array_records["answer"]:
            content.pop("answer")

    world = clients(NET, lambda app: changing(app, "least_squares", careful))
    result, metrics = finished(NET, [LeastSquares()], world)
    assert [world.asked("least_squares").count(node) for node in SIZES] == [3, 3, 2]
    assert metrics["least-squares-clients"] == 2
    # The first layer is fitted on all clients, the others on the two that remain.
    without = without_the_odd_one(NET, LeastSquares())
    assert not torch.equal(result["1.weight"], without["1.weight"])
    expected, _ = finished(NET, [LeastSquares()], clients(NET))
    assert torch.equal(result["1.weight"], expected["1.weight"])
    assert not torch.equal(result["4.weight"], expected["4.weight"])


UNABLE: dict[str, Answer | None] = {
    "unanswered": None,
    "failing": failing,
    "without-handlers": ClientApp(),
}


@pytest.mark.parametrize("kind", UNABLE)
@pytest.mark.parametrize(
    ("name", "method"),
    [(NET, method) for method in METHODS] + [(WITH_NORM, LeastSquares())],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_without_any_answer_the_average_stays(
    name: str, method: Method, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = Federation(dict.fromkeys(SIZES, UNABLE[kind]))
    result, metrics = finished(name, [method], world)
    plain, _ = finished(name, [], world)
    assert_same(result, plain, rtol=0, atol=0)
    assert metrics[f"{method.name}-clients"] == 0
    assert metrics[f"{method.name}-messages"] == 1
    lines = [line for line in dropped(caplog) if line.startswith(f"{subject_of(method)} of node")]
    assert len(lines) == len(SIZES)


@each_method
def test_without_any_answer_to_the_fit_batchnorm_is_recalibrated(method: Method) -> None:
    def only_batchnorm(app: Answer) -> Answer:
        def answer(message: Any, context: Any) -> Any:
            if message.metadata.message_type == f"query.rebasin_{action_of(method)}":
                raise OSError("no time")
            return app(message, context)

        return answer

    honest = clients(WITH_NORM).apps
    world = Federation({node: only_batchnorm(app) for node, app in honest.items() if app})
    result, metrics = finished(WITH_NORM, [method], world)
    expected, expected_metrics = finished(WITH_NORM, [BatchNorm()], clients(WITH_NORM))
    assert_same(result, expected, rtol=0, atol=0)
    assert metrics["batchnorm-clients"] == expected_metrics["batchnorm-clients"] == len(SIZES)


def fitted(
    method: Method, state: State, models: Mapping[int, State], world: Federation
) -> Finished:
    """Run the step on one model, outside a round."""
    finish = method.bind(ZOO[NET].build(), ZOO[NET].inputs())
    assert finish is not None
    replies = {node: Mock(spec=Message) for node in models}
    return finish(state, RoundClients(world.grid, replies, models))


@each_method
def test_without_any_answer_the_step_returns_its_input(method: Method) -> None:
    state, models = random_state(ZOO[NET], 0), strangers(NET, SIZES)
    before = copy.deepcopy(state)
    result = fitted(method, state, models, Federation(dict.fromkeys(models)))
    assert result.state_dict is state
    assert not result.applied
    assert_same(state, before, rtol=0, atol=0)


@each_method
def test_a_round_without_clients_to_ask_asks_nothing(method: Method) -> None:
    state, world = random_state(ZOO[NET], 0), clients(NET)
    result = fitted(method, state, {}, world)
    assert result.state_dict is state
    assert not result.applied
    assert world.sent == []


@each_method
def test_a_fit_does_not_change_its_input(method: Method) -> None:
    state, models = random_state(ZOO[NET], 0), copy.deepcopy(strangers(NET, SIZES))
    before = copy.deepcopy((state, models))
    model = ZOO[NET].build()
    weights = copy.deepcopy(dict(model.state_dict()))
    world = clients(NET)
    finish = method.bind(model, ZOO[NET].inputs())
    assert finish is not None
    replies = {node: Mock(spec=Message) for node in models}
    result = finish(state, RoundClients(world.grid, replies, models))
    assert result.applied
    assert any(not torch.equal(result.state_dict[key], state[key]) for key in state)
    assert_same(state, before[0], rtol=0, atol=0)
    for node, own in models.items():
        assert_same(own, before[1][node], rtol=0, atol=0)
    assert_same(dict(model.state_dict()), weights, rtol=0, atol=0)
    calls = world.grid.send_and_receive.call_args_list
    assert {call.kwargs["timeout"] for call in calls} == {TIMEOUT}


# Sums that are well-formed but have no solution


def unsolvable(content: RecordDict) -> None:
    """These are not the sums of any data: X^T X is almost 0, X^T T is large."""
    record = content.array_records["answer"]
    zeros = {
        key: np.zeros_like(array.numpy()) for key, array in record.items() if key.startswith("1/")
    }
    for key, values in zeros.items():
        put(content, "answer", key, values)
    put(content, "answer", COUNT, np.ones(1))
    put(content, "answer", CROSS, np.full_like(zeros[CROSS], 1e30))
    tiny = np.zeros_like(zeros[GRAM])
    tiny[0, 0] = 1e-300
    put(content, "answer", GRAM, tiny)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: method.name)
def test_sums_without_a_solution_leave_the_layer_as_it_is(
    method: Method, caplog: pytest.LogCaptureFixture
) -> None:
    honest = clients(NET).apps
    world = Federation(
        {
            node: changing(app, action_of(method), of_first_layer(unsolvable))
            for node, app in honest.items()
            if app
        }
    )
    result, _ = finished(NET, [method], world)
    plain, _ = finished(NET, [], clients(NET))
    assert all(bool(torch.isfinite(value).all()) for value in result.values())
    for key in ("1.weight", "1.bias"):
        assert torch.equal(result[key], plain[key])
    assert not torch.equal(result["4.weight"], plain["4.weight"])
    assert re.search(r"^.*1 keeps the average: \S", caplog.text, re.MULTILINE)


def off(state: State) -> State:
    """A model whose first hidden layer is 0 after its ReLU, whatever its inputs."""
    return {**state, "1.weight": 0 * state["1.weight"], "1.bias": 0 * state["1.bias"] - 1}


@each_method
def test_a_layer_that_is_always_off_leaves_the_model_finite(method: Method) -> None:
    models = {node: off(state) for node, state in strangers(NET, SIZES).items()}
    strategy, global_model = strategy_for(NET, finish=[method]), off(random_state(ZOO[NET], 0))
    result, metrics = run_round(strategy, clients(NET), global_model, models)
    assert all(bool(torch.isfinite(value).all()) for value in result.values())
    assert metrics[f"{method.name}-clients"] == len(SIZES)


class OnlyNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs)


@each_method
def test_a_model_without_a_layer_to_fit_gets_only_batchnorm_statistics(method: Method) -> None:
    net: Net = Entry(OnlyNorm, lambda: torch.zeros(2, 3), ())
    batches = batches_of((3,), [8], seed=1)
    world = federation(net, dict.fromkeys(SIZES, batches))
    state = dict(entry_of(net).build().state_dict())
    strategy = strategy_for(net, finish=[method])
    result, metrics = run_round(strategy, world, state, dict.fromkeys(SIZES, state))
    assert world.asked(action_of(method)) == []
    assert world.asked("batchnorm") == sorted(SIZES)
    assert not any(key.startswith(method.name) for key in metrics)
    torch.testing.assert_close(result["norm.running_mean"], batches[0].mean(0))
