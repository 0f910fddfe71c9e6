"""Laws of matching on the clients: the same as in one place, and never trusted."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
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
    changing,
    client,
    dropped,
    one_round,
    prepare,
    put,
    put_payload,
    replies_of,
    tensors,
    vast,
)
from flwr.app import Array, MetricRecord, RecordDict
from helpers import State, assert_same, random_state
from torch import nn
from zoo import ZOO

from fl_rebasin import Permutation, PermutationSpec, match_weights
from fl_rebasin.flower import ReBasinStrategy
from fl_rebasin.matching.activations import match_activations
from fl_rebasin.matching.many import align_many, restore_unit_order
from fl_rebasin.matching.straight_through import match_straight_through
from fl_rebasin.state_dicts import average

NETS = ("mlp", "conv-batchnorm-flatten", "residual-batchnorm", "attention-separate")
METHODS = ("activations", "activations-then-weights", "straight-through")
CLASSES = 3
WEIGHTS = {4: 20.0, 9: 50.0, ODD_NODE: 30.0}
HEAVIEST = 9


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


@cache
def strategy_for(name: str, method: str) -> ReBasinStrategy:
    """FedAvg has no memory: one strategy serves every test."""
    return ReBasinStrategy(
        model=classifier(name),
        example_inputs=ZOO[name].inputs(),
        matching=method,  # type: ignore[arg-type]
        recalibrate_batchnorm=False,
    )


def classifier(name: str) -> nn.Module:
    """The model; of a sequence's outputs, cross-entropy takes the second axis for the classes."""
    return ZOO[name].build()


def labels_of(name: str, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    with torch.no_grad():
        shape = classifier(name).eval()(inputs).shape
    return torch.randint(CLASSES, (shape[0], *shape[2:]), generator=generator)


@cache
def data(name: str, node_id: int) -> list[Any]:
    shape = ZOO[name].inputs().shape[1:]
    generator = torch.Generator().manual_seed(node_id)
    batches = batches_of(shape, [40, 24], seed=node_id % 7)
    return [(inputs, labels_of(name, inputs, generator)) for inputs in batches]


def honest(name: str, node_id: int) -> Answer:
    return client(lambda: classifier(name), data(name, node_id))


def federation(name: str, odd: Callable[[Answer], Answer | None] = lambda app: app) -> Federation:
    apps: dict[int, Answer | None] = {node_id: honest(name, node_id) for node_id in WEIGHTS}
    apps[ODD_NODE] = odd(honest(name, ODD_NODE))
    return Federation(apps)


@cache
def strangers(name: str) -> dict[int, State]:
    """Models that share nothing: activations and weights say different things."""
    return {node_id: random_state(ZOO[name], seed) for seed, node_id in enumerate(WEIGHTS, start=1)}


def run_round(
    name: str,
    method: str,
    world: Federation,
    states: Mapping[int, State] | None = None,
    gauge: State | None = None,
) -> tuple[State, MetricRecord]:
    replies = replies_of(strangers(name) if states is None else states, WEIGHTS, loss=0.5)
    gauge = random_state(ZOO[name], 0) if gauge is None else gauge
    result, metrics = one_round(strategy_for(name, method), world, gauge, replies)
    assert metrics is not None
    return tensors(result), metrics


def module_of(name: str, state: State) -> nn.Module:
    model = classifier(name)
    model.load_state_dict(state)
    return model


def matched(name: str, method: str, node_id: int) -> Permutation:
    """The permutation of a client, found in one place."""
    spec, models = strategy_for(name, method).spec, strangers(name)
    reference, own = models[HEAVIEST], models[node_id]
    model, batches = classifier(name), data(name, node_id)
    found = match_activations(spec, model, reference, own, batches).permutation
    if method == "straight-through":
        return match_straight_through(spec, model, reference, own, batches, start=found).permutation
    return found


def merged(
    name: str, method: str, permutations: Mapping[int, Permutation]
) -> tuple[State, tuple[Permutation, ...]]:
    """The merged model of permuted strangers, and how they end up."""
    spec, models = strategy_for(name, method).spec, list(strangers(name).values())
    weights, gauge = list(WEIGHTS.values()), random_state(ZOO[name], 0)
    start = [permutations[node_id] for node_id in WEIGHTS]
    if method == "activations-then-weights":
        found = align_many(spec, models, weights, unit_order_of=gauge, start=start).permutations
    else:
        found = restore_unit_order(spec, models, weights, start, gauge).permutations
    aligned = [spec.apply(*pair) for pair in zip(found, models, strict=True)]
    return average(aligned, weights), found


@cache
def matched_by_weights(name: str) -> State:
    return run_round(name, "weights", federation(name))[0]


# The same as in one place


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_clients_find_what_one_place_with_their_data_would(name: str, method: str) -> None:
    spec = strategy_for(name, method).spec
    permutations = {HEAVIEST: spec.identity()} | {
        node_id: matched(name, method, node_id) for node_id in WEIGHTS if node_id != HEAVIEST
    }
    expected, found = merged(name, method, permutations)
    world = federation(name)
    result, metrics = run_round(name, method, world)
    assert_same(result, expected, rtol=1e-5, atol=1e-6)
    assert metrics["rebasin-units-moved"] == sum(each.moved for each in found)
    assert metrics["rebasin-similarity-before"] < metrics["rebasin-similarity-after"]

    by_weights = matched_by_weights(name)
    assert any(not torch.allclose(result[key], by_weights[key], atol=1e-3) for key in result)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_planted_permutations_are_undone(name: str, method: str) -> None:
    spec = strategy_for(name, method).spec
    generator = torch.Generator().manual_seed(5)
    shared = random_state(ZOO[name], 3)
    neighbours = {
        node_id: {
            key: value + 1e-3 * torch.randn(value.shape, generator=generator)
            if value.is_floating_point()
            else value
            for key, value in shared.items()
        }
        for node_id in WEIGHTS
    }
    states = {
        node_id: spec.apply(spec.random(generator), state) for node_id, state in neighbours.items()
    }
    result, metrics = run_round(name, method, federation(name), states, gauge=shared)
    expected = average(list(neighbours.values()), list(WEIGHTS.values()))
    assert_same(result, expected, rtol=1e-5, atol=1e-6)
    assert metrics["rebasin-similarity-after"] > 0.999
    assert metrics["matching-clients"] == len(WEIGHTS) - 1


@pytest.mark.parametrize("name", NETS)
def test_only_a_permutation_comes_back(name: str) -> None:
    world = federation(name)
    _, metrics = run_round(name, "activations", world)
    spec = strategy_for(name, "activations").spec
    assert world.asked("matching") == sorted(WEIGHTS.keys() - {HEAVIEST})
    for message in world.sent:
        records = message.content.array_records
        assert records.keys() == {"reference", "own"}
        assert_same(tensors(records["reference"]), strangers(name)[HEAVIEST], rtol=0, atol=0)
        own = strangers(name)[message.metadata.dst_node_id]
        assert_same(tensors(records["own"]), own, rtol=0, atol=0)
    for reply in world.replies:
        assert list(reply.content) == ["permutation"]
        record = reply.content.array_records["permutation"]
        shapes = {group: array.numpy().shape for group, array in record.items()}
        assert shapes == {group: each.shape for group, each in spec.identity().indices.items()}
        assert {array.numpy().dtype for array in record.values()} == {np.dtype(np.int64)}
    assert metrics["matching-clients"] == len(world.replies) == 2
    assert metrics["matching-bytes"] == world.bytes_of("matching")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "residual-batchnorm"])
def test_where_no_unit_moves_nobody_is_asked(name: str, method: str) -> None:
    gauge = random_state(ZOO[name], 0)
    # Weights alone: with activations on little data a unit or two might move after all.
    states = {
        node_id: {
            key: value * (1 + 1e-3 * seed) if value.is_floating_point() else value
            for key, value in gauge.items()
        }
        for seed, node_id in enumerate(WEIGHTS)
    }
    world = federation(name)
    result, metrics = run_round(name, method, world, states, gauge)
    assert world.sent == []
    assert metrics["rebasin-units-moved"] == 0
    assert not any(key.startswith("matching") for key in metrics)
    assert_same(result, average(list(states.values()), list(WEIGHTS.values())), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_client_is_not_asked_and_keeps_the_order_of_the_global_model(method: str) -> None:
    name = "mlp"
    spec = strategy_for(name, method).spec
    gauge = random_state(ZOO[name], 0)
    moved = spec.apply(spec.random(torch.Generator().manual_seed(2)), gauge)
    world = federation(name)
    result, metrics = run_round(name, method, world, {HEAVIEST: moved}, gauge)
    assert world.sent == []
    assert metrics["matching-clients"] == metrics["matching-bytes"] == 0
    assert_same(result, gauge, rtol=1e-6, atol=1e-7)


# Answers that are no good

NET = "mlp"
FIRST, SECOND = "1", "4"
ORDER = np.array([1, 0, 2, 3, 4, 5, 6])


def tampered(change: Callable[[RecordDict], object]) -> Callable[[Answer], Answer]:
    return lambda app: changing(app, "matching", change)


def order(values: Any) -> Callable[[Answer], Answer]:
    return tampered(lambda content: put(content, "permutation", FIRST, np.asarray(values)))


def payload(data: bytes) -> Callable[[Answer], Answer]:
    return tampered(lambda content: put_payload(content, "permutation", FIRST, data))


def replaced(index: int, value: int) -> np.ndarray:
    values = ORDER.copy()
    values[index] = value
    return values


ASKED = r"1: an order of \(7,\) units was asked for, got "
BAD: dict[str, tuple[Callable[[Answer], Answer | None], str]] = {
    "twice": (order(replaced(6, 0)), "1: not a permutation of 7 units"),
    "out-of-range": (order(replaced(6, 7)), "1: not a permutation of 7 units"),
    "negative": (order(replaced(0, -1)), "1: not a permutation of 7 units"),
    "huge": (order(replaced(6, 2**62)), "1: not a permutation of 7 units"),
    "all-ones": (order(np.ones(7, np.int64)), "1: not a permutation of 7 units"),
    "short": (order(np.arange(6)), ASKED + r"int64 of shape \(6,\)"),
    "long": (order(np.arange(8)), ASKED + r"int64 of shape \(8,\)"),
    "empty": (order(np.zeros(0, np.int64)), ASKED + r"int64 of shape \(0,\)"),
    "scalar": (order(3), ASKED + r"int64 of shape \(\)"),
    "matrix": (order(ORDER[None]), ASKED + r"int64 of shape \(1, 7\)"),
    "one-hot": (order(np.eye(7, dtype=np.int64)), ASKED + r"int64 of shape \(7, 7\)"),
    "float64": (order(ORDER.astype(np.float64)), ASKED + "float64"),
    "int32": (order(ORDER.astype(np.int32)), ASKED + "int32"),
    "uint64": (order(ORDER.astype(np.uint64)), ASKED + "uint64"),
    "other-endian": (order(ORDER.astype(">i8")), ASKED + ">i8"),
    "text": (
        order([str(each) for each in ORDER]),
        "its payload is of dtype <U1, which is no number",
    ),
    "lacks-a-group": (
        tampered(lambda content: content.array_records["permutation"].pop(SECOND)),
        r"permutation and spec differ in the groups \['4'\]",
    ),
    "another-group": (
        tampered(lambda content: put(content, "permutation", "spare", ORDER)),
        r"permutation and spec differ in the groups \['spare'\]",
    ),
    "no-groups": (
        tampered(lambda content: content.array_records["permutation"].clear()),
        r"permutation and spec differ in the groups \['1', '4'\]",
    ),
    "no-record": (tampered(lambda content: content.pop("permutation")), "'permutation' is missing"),
    "metrics": (
        tampered(lambda content: content.update(permutation=MetricRecord({"0": [1, 0]}))),
        "'permutation' is missing",
    ),
    "pickle": (payload(pickle.dumps(list(ORDER))), "no array in NumPy's format"),
    "garbage": (payload(b"garbage"), "no array in NumPy's format"),
    "no-bytes": (payload(b""), "no array in NumPy's format"),
    "truncated": (payload(Array(ORDER).data[:-9]), "bytes, and holds"),
    "vast": (payload(vast("<i8")), "80000000000000 bytes, and holds 0"),
}


@cache
def without_the_odd_one(name: str, method: str) -> State:
    return run_round(name, method, federation(name, lambda app: None))[0]


@pytest.mark.parametrize("case", BAD)
def test_bad_permutation_is_dropped_and_named(case: str, caplog: pytest.LogCaptureFixture) -> None:
    odd, words = BAD[case]
    expected = without_the_odd_one(NET, "activations")
    caplog.clear()
    result, metrics = run_round(NET, "activations", federation(NET, odd))
    assert_same(result, expected, rtol=0, atol=0)
    assert metrics["matching-clients"] == 1
    (line,) = dropped(caplog)
    assert re.match(
        rf"permutation of node {ODD_NODE} dropped: .*{words}.*add_matching_handler\(app",
        line,
    ), line
    assert "1 of 2 clients matched their models" in caplog.text


def test_one_order_for_all_heads_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    name = "attention-separate"
    spec = strategy_for(name, "activations").spec
    group = next(iter(spec.within))
    blocks, size = spec.identity()[group].shape

    def flat(content: RecordDict) -> None:
        put(content, "permutation", group, np.arange(size))

    result, _ = run_round(name, "activations", federation(name, tampered(flat)))
    (line,) = dropped(caplog)
    assert f"an order of ({blocks}, {size}) units was asked for" in line
    assert_same(result, without_the_odd_one(name, "activations"), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_client_without_a_good_answer_is_matched_by_its_weights(method: str) -> None:
    spec, models = strategy_for(NET, method).spec, strangers(NET)
    permutations = {
        HEAVIEST: spec.identity(),
        ODD_NODE: match_weights(spec, models[HEAVIEST], models[ODD_NODE]).permutation,
        4: matched(NET, method, 4),
    }
    expected, _ = merged(NET, method, permutations)
    assert_same(without_the_odd_one(NET, method), expected, rtol=1e-5, atol=1e-6)


def test_a_valid_permutation_that_helps_nothing_is_taken_as_it_is() -> None:
    # It is the client's own word: only that it is a permutation can be checked.
    spec, models = strategy_for(NET, "activations").spec, strangers(NET)
    permutations = {
        HEAVIEST: spec.identity(),
        ODD_NODE: Permutation({**matched(NET, "activations", ODD_NODE).indices,
                               FIRST: torch.from_numpy(ORDER)}),
        4: matched(NET, "activations", 4),
    }  # fmt: skip
    assert len(models) == len(permutations)
    expected, _ = merged(NET, "activations", permutations)
    result, _ = run_round(NET, "activations", federation(NET, order(ORDER)))
    assert_same(result, expected, rtol=1e-5, atol=1e-6)


def test_nobody_answers_and_everybody_is_matched_by_weights() -> None:
    world = Federation(dict.fromkeys(WEIGHTS))
    spec: PermutationSpec = strategy_for(NET, "activations").spec
    models = strangers(NET)
    permutations = {
        node_id: spec.identity()
        if node_id == HEAVIEST
        else match_weights(spec, models[HEAVIEST], models[node_id]).permutation
        for node_id in WEIGHTS
    }
    result, metrics = run_round(NET, "activations", world)
    assert metrics["matching-clients"] == 0
    assert_same(result, merged(NET, "activations", permutations)[0], rtol=1e-5, atol=1e-6)
