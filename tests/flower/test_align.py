"""Laws of matching on the clients: the same result as in one place; no answer is trusted."""

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
    dropped,
    federation,
    put,
    put_payload,
    run_round,
    strangers,
    strategy_for,
    tensors,
    vast,
)
from flwr.app import Array, MetricRecord, RecordDict
from helpers import State, assert_same, random_state
from zoo import ZOO

from fl_rebasin import Permutation, PermutationSpec, match_weights
from fl_rebasin.flower import ActivationMatching, StraightThrough, WeightMatching
from fl_rebasin.flower.align import AlignmentMethod, OneByOne
from fl_rebasin.matching.activations import match_activations
from fl_rebasin.matching.many import align_many, restore_unit_order
from fl_rebasin.matching.straight_through import match_straight_through
from fl_rebasin.state_dicts import average

NETS = ("mlp", "conv-batchnorm-flatten", "residual-batchnorm", "attention-separate")
METHODS: dict[str, AlignmentMethod] = {
    "activations": ActivationMatching(),
    "activations-then-weights": ActivationMatching(then_weights=True),
    "straight-through": StraightThrough(),
}
NET = "mlp"
CLASSES = 3
WEIGHTS = {4: 20.0, 9: 50.0, ODD_NODE: 30.0}
HEAVIEST = 9

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def spec_of(name: str) -> PermutationSpec:
    return strategy_for(name, finish=[]).spec


def labels_of(name: str, inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels for a model; cross-entropy expects the classes of a sequence in the second axis."""
    with torch.no_grad():
        shape = ZOO[name].build().eval()(inputs).shape
    return torch.randint(CLASSES, (shape[0], *shape[2:]), generator=generator)


@cache
def data(name: str, node_id: int) -> list[Any]:
    shape = ZOO[name].inputs().shape[1:]
    generator = torch.Generator().manual_seed(node_id)
    batches = batches_of(shape, [40, 24], seed=node_id % 7)
    return [(inputs, labels_of(name, inputs, generator)) for inputs in batches]


def world_of(name: str, odd: Callable[[Answer], Answer | None] | None = None) -> Federation:
    return federation(name, {node_id: data(name, node_id) for node_id in WEIGHTS}, odd=odd)


def unanswered(app: Answer) -> None:
    """The client never answers."""


def round_of(
    name: str,
    method: AlignmentMethod,
    world: Federation,
    states: Mapping[int, State] | None = None,
    global_model: State | None = None,
) -> tuple[State, MetricRecord]:
    """Run a round; by default the models are independent, so that each method has its own result.

    The metric `loss` is part of each reply.
    """
    return run_round(
        strategy_for(name, align=method, finish=[]),
        world,
        random_state(ZOO[name], 0) if global_model is None else global_model,
        strangers(name, WEIGHTS) if states is None else states,
        WEIGHTS,
        loss=0.5,
    )


@cache
def matched(name: str, method: AlignmentMethod, node_id: int) -> Permutation:
    """The permutation of a client, found in one place."""
    spec, models = spec_of(name), strangers(name, WEIGHTS)
    reference, own = models[HEAVIEST], models[node_id]
    model, batches = ZOO[name].build(), data(name, node_id)
    found = match_activations(spec, model, reference, own, batches).permutation
    if not isinstance(method, StraightThrough):
        return found
    return match_straight_through(
        spec,
        model,
        reference,
        own,
        batches,
        epochs=method.epochs,
        learning_rate=method.learning_rate,
        start=found,
    ).permutation


@cache
def matched_by_weights(name: str, node_id: int) -> Permutation:
    """The permutation of a client without a valid answer."""
    models = strangers(name, WEIGHTS)
    return match_weights(spec_of(name), models[HEAVIEST], models[node_id]).permutation


def merged(
    name: str, method: AlignmentMethod, permutations: Mapping[int, Permutation]
) -> tuple[State, tuple[Permutation, ...]]:
    """The merged model of the independent models, and their final permutations.

    The reference keeps its units.
    """
    spec, models = spec_of(name), list(strangers(name, WEIGHTS).values())
    weights, global_model = list(WEIGHTS.values()), random_state(ZOO[name], 0)
    found = {HEAVIEST: spec.identity(), **permutations}
    start = [found[node_id] for node_id in WEIGHTS]
    if isinstance(method, ActivationMatching) and method.then_weights:
        final = align_many(spec, models, weights, unit_order_of=global_model, start=start)
    else:
        final = restore_unit_order(spec, models, weights, start, global_model)
    moved = zip(final.permutations, models, strict=True)
    aligned = [spec.apply(permutation, model) for permutation, model in moved]
    return average(aligned, weights), final.permutations


@cache
def result_of_weight_matching(name: str) -> State:
    return round_of(name, WeightMatching(), world_of(name))[0]


# The same as in one place


@each_method
@pytest.mark.parametrize("name", NETS)
def test_clients_find_the_permutations_that_one_place_with_their_data_finds(
    name: str, method: AlignmentMethod
) -> None:
    others = WEIGHTS.keys() - {HEAVIEST}
    permutations = {node_id: matched(name, method, node_id) for node_id in others}
    expected, found = merged(name, method, permutations)
    result, metrics = round_of(name, method, world_of(name))
    assert_same(result, expected, rtol=1e-5, atol=1e-6)
    assert metrics["rebasin-units-moved"] == sum(each.moved for each in found)
    assert metrics["rebasin-similarity-before"] < metrics["rebasin-similarity-after"]

    by_weights = result_of_weight_matching(name)
    assert any(not torch.allclose(result[key], by_weights[key], atol=1e-3) for key in result)


def test_options_of_straight_through_reach_the_clients() -> None:
    method = StraightThrough(epochs=3, learning_rate=0.2)
    permutations = {node_id: matched(NET, method, node_id) for node_id in (4, ODD_NODE)}
    default = {node_id: matched(NET, StraightThrough(), node_id) for node_id in (4, ODD_NODE)}
    assert permutations != default
    result, _ = round_of(NET, method, world_of(NET))
    assert_same(result, merged(NET, method, permutations)[0], rtol=1e-5, atol=1e-6)


def neighbours(shared: State, generator: torch.Generator) -> dict[int, State]:
    """Models close to a shared one."""
    return {
        node_id: {
            key: value + 1e-3 * torch.randn(value.shape, generator=generator)
            if value.is_floating_point()
            else value
            for key, value in shared.items()
        }
        for node_id in WEIGHTS
    }


@each_method
@pytest.mark.parametrize("name", NETS)
def test_planted_permutations_are_undone(name: str, method: AlignmentMethod) -> None:
    spec = spec_of(name)
    generator = torch.Generator().manual_seed(5)
    shared = random_state(ZOO[name], 3)
    nearby = neighbours(shared, generator)
    states = {
        node_id: spec.apply(spec.random(generator), state) for node_id, state in nearby.items()
    }
    result, metrics = round_of(name, method, world_of(name), states, shared)
    expected = average(list(nearby.values()), list(WEIGHTS.values()))
    assert_same(result, expected, rtol=1e-5, atol=1e-6)
    assert metrics["rebasin-similarity-after"] > 0.999
    assert metrics["matching-clients"] == len(WEIGHTS) - 1


@pytest.mark.parametrize("name", NETS)
def test_clients_return_nothing_but_a_permutation(name: str) -> None:
    world, models = world_of(name), strangers(name, WEIGHTS)
    _, metrics = round_of(name, ActivationMatching(), world)
    assert world.asked("matching") == sorted(WEIGHTS.keys() - {HEAVIEST})
    for message in world.sent:
        records = message.content.array_records
        assert records.keys() == {"reference", "own"}
        assert_same(tensors(records["reference"]), models[HEAVIEST], rtol=0, atol=0)
        own = models[message.metadata.dst_node_id]
        assert_same(tensors(records["own"]), own, rtol=0, atol=0)
    identity = spec_of(name).identity()
    for reply in world.replies:
        assert list(reply.content) == ["answer"]
        record = reply.content.array_records["answer"]
        shapes = {group: array.numpy().shape for group, array in record.items()}
        assert shapes == {group: each.shape for group, each in identity.indices.items()}
        assert {array.numpy().dtype for array in record.values()} == {np.dtype(np.int64)}
    assert metrics["matching-clients"] == len(world.replies) == 2
    assert metrics["matching-messages"] == 1
    assert metrics["matching-bytes"] == world.bytes_of("matching")


@each_method
@pytest.mark.parametrize("name", ["mlp", "residual-batchnorm"])
def test_where_no_unit_moves_no_client_is_asked(name: str, method: AlignmentMethod) -> None:
    global_model = random_state(ZOO[name], 0)
    # Scaled models: with activations on little data a unit or two might still move.
    states = {
        node_id: {
            key: value * (1 + 1e-3 * seed) if value.is_floating_point() else value
            for key, value in global_model.items()
        }
        for seed, node_id in enumerate(WEIGHTS)
    }
    world = world_of(name)
    result, metrics = round_of(name, method, world, states, global_model)
    assert world.sent == []
    assert metrics["rebasin-units-moved"] == 0
    assert not any(key.startswith("matching") for key in metrics)
    assert_same(result, average(list(states.values()), list(WEIGHTS.values())), atol=1e-6, rtol=0)


@each_method
def test_a_single_client_is_not_asked_and_gets_the_unit_order_of_the_global_model(
    method: AlignmentMethod,
) -> None:
    spec, global_model = spec_of(NET), random_state(ZOO[NET], 0)
    moved = spec.apply(spec.random(torch.Generator().manual_seed(2)), global_model)
    world = world_of(NET)
    result, metrics = round_of(NET, method, world, {HEAVIEST: moved}, global_model)
    assert world.sent == []
    assert metrics["matching-clients"] == metrics["matching-bytes"] == 0
    assert metrics["matching-messages"] == 0
    assert_same(result, global_model, rtol=1e-6, atol=1e-7)


# Invalid answers

FIRST, SECOND = "1", "4"
ORDER = np.array([1, 0, 2, 3, 4, 5, 6])
PACKED = Array(ORDER)


def tampered(change: Callable[[RecordDict], object]) -> Callable[[Answer], Answer]:
    return lambda app: changing(app, "matching", change)


def order(values: Any) -> Callable[[Answer], Answer]:
    return tampered(lambda content: put(content, "answer", FIRST, np.asarray(values)))


def payload(data: bytes) -> Callable[[Answer], Answer]:
    return tampered(lambda content: put_payload(content, "answer", FIRST, data))


def labelled(
    dtype: str = "int64", shape: tuple[int, ...] = (7,), stype: str = PACKED.stype
) -> Callable[[Answer], Answer]:
    """A valid payload whose label says something else."""

    def change(content: RecordDict) -> None:
        array = Array(dtype=dtype, shape=shape, stype=stype, data=PACKED.data)
        content.array_records["answer"][FIRST] = array

    return tampered(change)


def replaced(index: int, value: int) -> np.ndarray:
    values = ORDER.copy()
    values[index] = value
    return values


EXPECTED = r"1: expected an order of \(7,\) units, got "
DIFFER = "permutation and spec differ in the groups "
INVALID: dict[str, tuple[Callable[[Answer], Answer | None], str]] = {
    "twice": (order(replaced(6, 0)), "1: not a permutation of 7 units"),
    "out-of-range": (order(replaced(6, 7)), "1: not a permutation of 7 units"),
    "negative": (order(replaced(0, -1)), "1: not a permutation of 7 units"),
    "huge": (order(replaced(6, 2**62)), "1: not a permutation of 7 units"),
    "all-ones": (order(np.ones(7, np.int64)), "1: not a permutation of 7 units"),
    "short": (order(np.arange(6)), EXPECTED + r"torch.int64 of shape \(6,\)"),
    "long": (order(np.arange(8)), EXPECTED + r"torch.int64 of shape \(8,\)"),
    "empty": (order(np.zeros(0, np.int64)), EXPECTED + r"torch.int64 of shape \(0,\)"),
    "scalar": (order(3), EXPECTED + r"torch.int64 of shape \(\)"),
    "matrix": (order(ORDER[None]), EXPECTED + r"torch.int64 of shape \(1, 7\)"),
    "one-hot": (order(np.eye(7, dtype=np.int64)), EXPECTED + r"torch.int64 of shape \(7, 7\)"),
    "float64": (order(ORDER.astype(np.float64)), EXPECTED + "torch.float64"),
    "complex": (order(ORDER.astype(complex)), EXPECTED + "torch.complex128"),
    "int32": (order(ORDER.astype(np.int32)), EXPECTED + "torch.int32"),
    "uint64": (order(ORDER.astype(np.uint64)), EXPECTED + "torch.uint64"),
    "bool": (order(ORDER.astype(bool)), EXPECTED + "torch.bool"),
    "other-endian": (order(ORDER.astype(">i8")), "byte order"),
    "long-double": (order(ORDER.astype(np.longdouble)), "type numpy.longdouble"),
    "text": (
        order([str(each) for each in ORDER]),
        "1: its payload has dtype <U1, which is not a number",
    ),
    "lacks-a-group": (
        tampered(lambda content: content.array_records["answer"].pop(SECOND)),
        DIFFER + r"\['4'\]",
    ),
    "another-group": (
        tampered(lambda content: put(content, "answer", "spare", ORDER)),
        DIFFER + r"\['spare'\]",
    ),
    "no-groups": (
        tampered(lambda content: content.array_records["answer"].clear()),
        DIFFER + r"\['1', '4'\]",
    ),
    "no-record": (tampered(lambda content: content.pop("answer")), "'answer' is missing"),
    "metrics": (
        tampered(lambda content: content.update(answer=MetricRecord({"1": [1, 0]}))),
        "'answer' is missing",
    ),
    "pickle": (payload(pickle.dumps(list(ORDER))), "not an array in NumPy's format"),
    "garbage": (payload(b"garbage"), "not an array in NumPy's format"),
    "no-bytes": (payload(b""), "not an array in NumPy's format"),
    "truncated": (payload(PACKED.data[:-9]), "bytes, but holds"),
    "vast": (payload(vast("<i8")), "80000000000000 bytes, but holds 0"),
    "other-dtype-on-the-label": (labelled(dtype="float64"), "it declares float64 of shape"),
    "other-shape-on-the-label": (labelled(shape=(6,)), r"it declares int64 of shape \(6,\)"),
    "long-dtype-on-the-label": (labelled(dtype="int64" * 99), "at most 40 and 64 are allowed"),
    "many-axes-on-the-label": (labelled(shape=(1,) * 99), "at most 40 and 64 are allowed"),
    "other-serialisation": (labelled(stype="pickle"), "unknown serialization type 'pickle'"),
}


@cache
def result_without_the_odd_one(name: str, method: AlignmentMethod) -> State:
    return round_of(name, method, world_of(name, unanswered))[0]


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_permutation_is_dropped_and_logged(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    odd, words = INVALID[case]
    method = ActivationMatching()
    expected = result_without_the_odd_one(NET, method)
    caplog.clear()
    result, metrics = round_of(NET, method, world_of(NET, odd))
    assert_same(result, expected, rtol=0, atol=0)
    assert metrics["matching-clients"] == 1
    (line,) = dropped(caplog)
    assert re.match(
        rf"permutation of node {ODD_NODE} dropped: .*{words}.*add_rebasin_handlers\(app",
        line,
    ), line
    assert "1 of 2 clients matched their models" in caplog.text


def test_one_order_for_all_heads_is_invalid(caplog: pytest.LogCaptureFixture) -> None:
    name, method = "attention-separate", ActivationMatching()
    spec = spec_of(name)
    group = next(iter(spec.within))
    blocks, size = spec.identity()[group].shape
    expected = result_without_the_odd_one(name, method)
    caplog.clear()
    flat = tampered(lambda content: put(content, "answer", group, np.arange(size)))
    result, _ = round_of(name, method, world_of(name, flat))
    (line,) = dropped(caplog)
    assert f"expected an order of ({blocks}, {size}) units" in line
    assert_same(result, expected, rtol=0, atol=0)


@each_method
def test_a_client_without_a_valid_answer_is_matched_by_its_weights(method: AlignmentMethod) -> None:
    permutations = {4: matched(NET, method, 4), ODD_NODE: matched_by_weights(NET, ODD_NODE)}
    expected, _ = merged(NET, method, permutations)
    assert_same(result_without_the_odd_one(NET, method), expected, rtol=1e-5, atol=1e-6)


def test_a_valid_permutation_is_used_even_if_it_is_useless() -> None:
    # The server can only check that it is a permutation.
    method = ActivationMatching()
    best = matched(NET, method, ODD_NODE)
    useless = Permutation({**best.indices, FIRST: torch.from_numpy(ORDER)})
    permutations = {4: matched(NET, method, 4), ODD_NODE: useless}
    expected, _ = merged(NET, method, permutations)
    result, _ = round_of(NET, method, world_of(NET, order(ORDER)))
    assert_same(result, expected, rtol=1e-5, atol=1e-6)
    honest, _ = round_of(NET, method, world_of(NET))
    assert any(not torch.allclose(result[key], honest[key]) for key in result)


@each_method
def test_without_any_answer_all_models_are_matched_by_weights(method: AlignmentMethod) -> None:
    others = WEIGHTS.keys() - {HEAVIEST}
    permutations = {node_id: matched_by_weights(NET, node_id) for node_id in others}
    result, metrics = round_of(NET, method, Federation(dict.fromkeys(WEIGHTS)))
    assert metrics["matching-clients"] == 0
    assert_same(result, merged(NET, method, permutations)[0], rtol=1e-5, atol=1e-6)


# The methods themselves


@each_method
def test_methods_that_ask_clients_need_all_models_at_once(method: AlignmentMethod) -> None:
    assert not isinstance(method, OneByOne)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, "2"])
def test_straight_through_needs_a_positive_number_of_epochs(epochs: Any) -> None:
    with pytest.raises(ValueError, match=r"epochs must be a positive integer, got "):
        StraightThrough(epochs=epochs)


@pytest.mark.parametrize("learning_rate", [0.0, -1e-3, float("nan"), float("inf")])
def test_straight_through_needs_a_positive_learning_rate(learning_rate: float) -> None:
    with pytest.raises(ValueError, match=r"learning_rate must be positive and finite, got "):
        StraightThrough(learning_rate=learning_rate)


def test_weight_matching_knows_where_to_align_to() -> None:
    with pytest.raises(ValueError, match=r"unknown to='sideways': use one of others, global"):
        WeightMatching(to="sideways")  # type: ignore[arg-type]
