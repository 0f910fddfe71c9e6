"""`ReBasinStrategy`: what its result equals, and that no client's reply can spoil it."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from federation import (
    Aggregate,
    Federation,
    Nodes,
    as_mock,
    dropped,
    one_round,
    replies_of,
    strangers,
    strategy_for,
    tensors,
    vast,
)
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    MultiKrum,
    Strategy,
)
from helpers import State, assert_same, named_spec, nearby, random_state
from torch import nn
from zoo import ZOO

from fl_rebasin import Permutation, PermutationSpec, SpecError, merge_many
from fl_rebasin.flower import (
    ActivationMatching,
    BatchNorm,
    Guard,
    LeastSquares,
    ReBasinStrategy,
)

NETS = ("mlp", "conv-batchnorm-flatten", "residual-batchnorm", "tied-shared", "chunk-keywords")
WEIGHTS = {1: 1, 2: 2, 3: 4}
OWN_METRICS = {
    "rebasin-margin",
    "rebasin-units-moved",
    "rebasin-sweeps",
    "rebasin-seconds",
    "rebasin-dropped",
}
KINDS: dict[str, Callable[[Message], Message]] = {"real": lambda reply: reply, "mock": as_mock}


def aligning(name: str, inner: Strategy | None = None) -> ReBasinStrategy:
    """A strategy that aligns, and asks the clients nothing."""
    return strategy_for(name, inner, finish=[])


def run(
    strategy: Strategy, model: ArrayRecord, replies: Iterable[Message], server_round: int = 1
) -> Aggregate:
    """Run one round with three nodes that answer no question."""
    return one_round(strategy, Federation(dict.fromkeys(WEIGHTS)), model, replies, server_round)


def replies(
    states: Mapping[int, State],
    weights: Mapping[int, float] = WEIGHTS,
    kind: str = "real",
) -> list[Message]:
    losses = {node: 0.5 * weight for node, weight in weights.items()}
    return [KINDS[kind](reply) for reply in replies_of(states, weights, loss=losses)]


def error_reply(error: Error, node: int) -> Message:
    asked = Message(RecordDict(), dst_node_id=node, message_type=MessageType.TRAIN)
    return Message(error, reply_to=asked)


def with_ties(name: str, state: State) -> State:
    """The state with tied tensors equal again."""
    if name == "tied-shared":
        return {**state, "out.weight": state["embed.weight"].clone()}
    return state


def start(name: str, seed: int = 0) -> State:
    return with_ties(name, random_state(ZOO[name], seed))


def unlike(name: str) -> dict[int, State]:
    """Independent models."""
    return {node: with_ties(name, state) for node, state in strangers(name, WEIGHTS).items()}


def neighbours(name: str, state: State, nodes: Iterable[int] = WEIGHTS) -> dict[int, State]:
    return {node: with_ties(name, nearby(state, node)) for node in nodes}


def permutations(spec: PermutationSpec, count: int, seed: int) -> list[Permutation]:
    """Random permutations, none of them the identity."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [spec.random(generator) for _ in range(count)]
    assert not any(each.is_identity for each in drawn)
    return drawn


def shuffled(name: str, states: Mapping[int, State], seed: int) -> dict[int, State]:
    spec = named_spec(name)
    drawn = permutations(spec, len(states), seed)
    return {
        node: spec.apply(permutation, state)
        for permutation, (node, state) in zip(drawn, states.items(), strict=True)
    }


def distance(left: State, right: State) -> float:
    """Relative distance over the floating-point tensors."""
    keys = [key for key, value in right.items() if value.is_floating_point()]
    gap = sum(float((left[key] - right[key]).double().square().sum()) for key in keys)
    size = sum(float(right[key].double().square().sum()) for key in keys)
    return (gap / size) ** 0.5


def assert_bitwise(left: ArrayRecord | None, right: ArrayRecord | None) -> None:
    assert left is not None
    assert right is not None
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert left[key].data == right[key].data, key


def timeless(metrics: MetricRecord | None) -> dict[str, Any]:
    """Metrics without durations."""
    assert metrics is not None
    return {key: value for key, value in metrics.items() if not key.endswith("-seconds")}


@dataclass
class Spy(FedAvg):
    """A FedAvg that keeps the replies it gets."""

    seen: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        self.seen = list(replies)
        return super().aggregate_train(server_round, self.seen)


# What the result equals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
def test_aligned_clients_are_averaged_bitwise_as_by_the_wrapped_strategy(
    name: str, kind: str
) -> None:
    model = start(name)
    sent = replies(neighbours(name, model), kind=kind)
    expected, expected_metrics = FedAvg().aggregate_train(1, sent)
    result, metrics = run(aligning(name), ArrayRecord(model), sent)

    assert result is not None
    assert expected is not None
    assert list(result) == list(model)
    for key, value in model.items():
        if value.is_floating_point():
            assert result[key].dtype == expected[key].dtype
            assert result[key].data == expected[key].data, key
        else:
            # The counts 4, 10 and 18 with weights 1, 2 and 4 average to 96 / 7.
            assert tensors(result)[key].dtype == torch.int64
            assert int(result[key].numpy()) == 14

    assert metrics is not None
    assert expected_metrics is not None
    assert {key: metrics[key] for key in expected_metrics} == dict(expected_metrics)
    assert metrics["loss"] == pytest.approx(1.5)
    assert metrics["rebasin-units-moved"] == 0
    # Similarities are computed only where no proof shows that every unit is in place.
    compared = {"rebasin-similarity-before", "rebasin-similarity-after"}
    assert metrics.keys() - expected_metrics.keys() - OWN_METRICS == (
        set() if metrics["rebasin-margin"] >= 1 else compared
    )
    assert metrics.get("rebasin-similarity-before") == metrics.get("rebasin-similarity-after")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NETS)
def test_permuted_copies_give_the_model_in_the_unit_order_of_the_global_model(
    name: str, seed: int
) -> None:
    shared = start(name)
    copies = shuffled(name, dict.fromkeys(WEIGHTS, shared), seed=seed)
    spec = named_spec(name)
    (order,) = permutations(spec, 1, seed=100 + seed)
    global_model = spec.apply(order, neighbours(name, shared)[1])
    sent = replies(copies)

    naive, _ = FedAvg().aggregate_train(1, sent)
    assert distance(tensors(naive), spec.apply(order, shared)) > 0.1

    result, metrics = run(aligning(name), ArrayRecord(global_model), sent)
    assert_same(tensors(result), spec.apply(order, shared), rtol=1e-6, atol=1e-7)
    assert metrics is not None
    assert metrics["rebasin-similarity-after"] == pytest.approx(1)
    assert metrics["rebasin-similarity-before"] < 0.95
    assert metrics["rebasin-units-moved"] > 0


@pytest.mark.parametrize("name", NETS)
def test_result_and_metrics_are_those_of_merge_many_with_the_example_counts(name: str) -> None:
    # For independent models, the weights decide which models are matched to which.
    model, clients = start(name), unlike(name)
    weights = {1: 10, 2: 1, 3: 25}
    spec, models = named_spec(name), list(clients.values())
    merge = merge_many(spec, models, weights=list(weights.values()), unit_order_of=model)
    result, metrics = run(aligning(name), ArrayRecord(model), replies(clients, weights))
    assert_same(tensors(result), merge.state_dict, rtol=1e-4, atol=1e-6)
    assert metrics is not None
    assert metrics["rebasin-units-moved"] == merge.moved
    assert metrics["rebasin-sweeps"] == merge.sweeps
    assert metrics["rebasin-similarity-before"] == pytest.approx(merge.similarity_before)
    assert metrics["rebasin-similarity-after"] == pytest.approx(merge.similarity)

    unweighted = merge_many(spec, models, unit_order_of=model)
    assert distance(tensors(result), unweighted.state_dict) > 0.1


def test_without_alignment_the_replies_are_averaged_unchanged() -> None:
    model, sent = ArrayRecord(start("mlp")), replies(unlike("mlp"))
    expected, _ = FedAvg().aggregate_train(1, sent)
    result, metrics = run(strategy_for("mlp", align=None), model, sent)
    assert_bitwise(result, expected)
    assert metrics is not None
    assert set(metrics) == {"loss", "rebasin-dropped"}


# What the wrapped strategy gets, and what does not change


def clipped(inner: Strategy, clients: int, norm: float) -> Strategy:
    return DifferentialPrivacyServerSideFixedClipping(inner, 0.0, norm, clients)


def reverse_keys(state: State) -> State:
    return {key: state[key] for key in reversed(state)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moved", [False, True], ids=["in-place", "permuted"])
def test_the_wrapped_strategy_sees_the_key_order_of_the_global_model(
    moved: bool, kind: str
) -> None:
    name = "conv-batchnorm-flatten"
    model = start(name)
    clients = neighbours(name, model)
    states = shuffled(name, clients, seed=1) if moved else clients
    states = {node: reverse_keys(state) if node > 1 else state for node, state in states.items()}
    spy, sent = Spy(), replies(states, kind=kind)
    result, _ = run(aligning(name, spy), ArrayRecord(model), sent)
    assert result is not None
    assert list(result) == list(model)
    for message, reply, client in zip(spy.seen, sent, clients.values(), strict=True):
        assert list(message.content) == ["arrays", "metrics"]
        assert_same(tensors(message.content.array_records["arrays"]), client, rtol=0, atol=0)
        assert message.metadata.src_node_id == reply.metadata.src_node_id
        assert message.content["metrics"] == reply.content["metrics"]


@pytest.mark.parametrize("moved", [False, True], ids=["in-place", "permuted"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "inner",
    [FedAvg, lambda: FedTrimmedAvg(beta=0.1), lambda: clipped(FedAvg(), 3, 1e-3)],
    ids=["averages", "empties-records", "replaces-records"],
)
def test_replies_and_global_model_are_not_changed(
    inner: Callable[[], Strategy], kind: str, moved: bool
) -> None:
    name = "residual-batchnorm"
    model = ArrayRecord(start(name))
    clients = neighbours(name, tensors(model))
    sent = replies(shuffled(name, clients, 2) if moved else clients, kind=kind)
    contents = [reply.content for reply in sent]
    records = [content["arrays"] for content in contents]
    before = copy.deepcopy((model, contents))
    run(aligning(name, inner()), model, sent)
    assert (model, contents) == before
    for reply, content, record in zip(sent, contents, records, strict=True):
        assert reply.content is content
        assert reply.content["arrays"] is record


# Invalid replies

BAD_NET = "conv-batchnorm-flatten"
BAD_NODE = 7
Change = Callable[[RecordDict], object]


def with_arrays(change: Callable[[ArrayRecord], object]) -> Change:
    def changed(content: RecordDict) -> None:
        change(content.array_records["arrays"])

    return changed


def with_array(values: Callable[[np.ndarray], np.ndarray], key: str = "0.weight") -> Change:
    def change(arrays: ArrayRecord) -> None:
        arrays[key] = Array(values(arrays[key].numpy()))

    return with_arrays(change)


def with_payload(data: bytes, stype: str = "numpy.ndarray") -> Change:
    def change(arrays: ArrayRecord) -> None:
        old = arrays["0.weight"]
        arrays["0.weight"] = Array(dtype=old.dtype, shape=old.shape, stype=stype, data=data)

    return with_arrays(change)


def npy(values: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=allow_pickle)
    return file.getvalue()


SHAPED = "{{'descr': '<f4', 'fortran_order': False, 'shape': {}, }}"


def header(text: str) -> bytes:
    """A payload with any text as its header, and no values."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def with_weight(weight: Any) -> Change:
    return with_metrics(**{"num-examples": weight, "loss": 0.5})


def with_metrics(**metrics: Any) -> Change:
    def change(content: RecordDict) -> None:
        content["metrics"] = MetricRecord(metrics)

    return change


def with_metric(**metrics: Any) -> Change:
    return lambda content: content["metrics"].update(metrics)


def with_record(name: str, record: ArrayRecord | MetricRecord) -> Change:
    return lambda content: content.update({name: record})


def filled(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(old: np.ndarray) -> np.ndarray:
        new = old.copy()
        new.flat[0] = value
        return new

    return change


WEIGHT = np.zeros((6, 3, 3, 3), np.float32)
BAD: dict[str, tuple[Change, str]] = {
    "nan-weights": (with_array(filled(np.nan)), r"0\.weight holds NaN or infinite values"),
    "infinite-weights": (with_array(filled(np.inf)), r"0\.weight holds NaN or infinite values"),
    "integer-weights": (with_array(lambda old: old.astype(np.int64)), r"0\.weight .*dtype int64"),
    "float-counter": (
        with_array(lambda old: old.astype(np.float32), "2.num_batches_tracked"),
        r"2\.num_batches_tracked .*dtype float32",
    ),
    "wrong-shape": (with_array(lambda old: old[:1]), r"0\.weight has shape \(1, 3, 3, 3\).*spec"),
    "broadcasts": (
        with_array(lambda old: old[:1], "5.bias"),
        r"5\.bias has shape \(1,\), the spec expects \(5,\)",
    ),
    "missing-key": (with_arrays(lambda arrays: arrays.pop("0.weight")), r"lacks 1 keys.*0\.weight"),
    "extra-key": (
        with_arrays(lambda arrays: arrays.update(spare=Array(np.zeros(2, np.float32)))),
        "1 keys beyond the spec.*spare",
    ),
    "no-arrays": (with_arrays(lambda arrays: arrays.clear()), "the state dict lacks"),
    "no-record": (lambda content: content.pop("arrays"), "expected one ArrayRecord, got 0"),
    "two-records": (with_record("more", ArrayRecord()), "expected one ArrayRecord, got 2"),
    "no-metrics": (lambda content: content.pop("metrics"), "with one number 'num-examples'"),
    "no-weight": (with_metrics(loss=0.5), "with one number 'num-examples'"),
    "list-of-weights": (with_weight([1, 2]), "with one number 'num-examples'"),
    "two-weights": (
        with_record("more", MetricRecord({"num-examples": 3})),
        "with one number 'num-examples'",
    ),
    "negative-weight": (with_weight(-3), "num-examples is -3, it must be positive"),
    "zero-weight": (with_weight(0), "num-examples is 0, it must be positive"),
    "nan-weight": (with_weight(float("nan")), "num-examples is nan, it must be positive"),
    "infinite-weight": (with_weight(float("inf")), "num-examples is inf, it must be positive"),
    "weight-beyond-floats": (with_weight(10**400), "it must be positive and at most"),
    "metric-beyond-floats": (
        with_metric(loss=10**400),
        "its metric 'loss' is too large for a float",
    ),
    "list-beyond-floats": (
        with_metric(loss=[1, -(10**400)]),
        "its metric 'loss' is too large for a float",
    ),
    "weight-beyond-the-limit": (with_weight(2e15), r"num-examples is 20{15}\.0.*at most 1e\+15"),
    "pickle": (with_payload(pickle.dumps([1.0] * 9)), "array in NumPy's format"),
    "pickled-array": (with_payload(npy(np.array([None] * 9), True)), "dtype object, which is no"),
    "text": (with_payload(npy(np.array(["a"] * 9))), "dtype <U1, which is no"),
    "garbage": (with_payload(b"garbage"), "array in NumPy's format"),
    "empty": (with_payload(b""), "array in NumPy's format"),
    "half-a-header": (with_payload(npy(np.zeros(9))[:40]), "array in NumPy's format"),
    "nested-header": (with_payload(header("(" * 3000 + ")" * 3000)), "array in NumPy's format"),
    "code-as-a-header": (
        with_payload(header("__import__('os').abort()")),
        "array in NumPy's format",
    ),
    "negative-shape": (with_payload(header(SHAPED.format("(-1, -9)"))), r"the shape \(-1, -9\)"),
    "truncated": (
        with_payload(npy(WEIGHT)[:-1]),
        r"claims float32 of shape \(6, 3, 3, 3\), 648 bytes, .*holds 647",
    ),
    "oversized": (with_payload(npy(WEIGHT) + b"more"), "648 bytes, .*holds 652"),
    "vast": (with_payload(vast("<f4")), r"shape \(10{13},\), 40{13} bytes, .*holds 0"),
    "other-than-declared": (
        with_payload(npy(WEIGHT.astype(np.float64))),
        r"float32 of shape \(6, 3, 3, 3\), .*its payload is float64",
    ),
    "other-serialization": (with_payload(b"", "elsewhere"), "serialization type.*'elsewhere'"),
}


@cache
def good_replies(kind: str) -> list[Message]:
    return replies(shuffled(BAD_NET, neighbours(BAD_NET, start(BAD_NET)), seed=3), kind=kind)


@cache
def result_of_good_replies(kind: str) -> tuple[ArrayRecord | None, dict[str, Any]]:
    result, metrics = run(aligning(BAD_NET), ArrayRecord(start(BAD_NET)), good_replies(kind))
    return result, timeless(metrics)


def bad_reply(change: Change, kind: str = "real", node: int = BAD_NODE) -> Message:
    (reply,) = replies_of({node: nearby(start(BAD_NET), 9)}, {node: 5}, loss=2.5)
    change(reply.content)
    return KINDS[kind](reply)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD)
def test_an_invalid_reply_is_dropped_and_logged(
    case: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, words = BAD[case]
    good = good_replies(kind)
    expected, expected_metrics = result_of_good_replies(kind)
    assert "dropped" not in caplog.text

    spy = Spy()
    mixed = [good[0], bad_reply(change, kind), *good[1:]]
    result, metrics = run(aligning(BAD_NET, spy), ArrayRecord(start(BAD_NET)), mixed)
    assert_bitwise(result, expected)
    assert timeless(metrics) == expected_metrics | {"rebasin-dropped": 1}
    assert [message.metadata.src_node_id for message in spy.seen] == [1, 2, 3]
    (line,) = [record for record in caplog.records if "dropped" in record.getMessage()]
    assert line.levelno == logging.WARNING
    assert re.match(rf"reply of node {BAD_NODE} dropped: .*{words}", line.getMessage())


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_has_one_reply(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    good = good_replies(kind)
    expected, _ = result_of_good_replies(kind)
    again = bad_reply(lambda content: None, kind, node=1)
    model = ArrayRecord(start(BAD_NET))
    result, metrics = run(aligning(BAD_NET), model, [good[0], again, *good[1:]])
    assert_bitwise(result, expected)
    assert metrics is not None
    assert metrics["rebasin-dropped"] == 1
    (line,) = dropped(caplog)
    assert re.match("reply of node 1 dropped: .* replied", line)


def with_floats(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def changed(arrays: ArrayRecord) -> None:
        for key, array in arrays.items():
            if array.dtype == "float32":
                arrays[key] = Array(change(array.numpy()))

    return with_arrays(changed)


ODD: dict[str, Change] = {
    "float64": with_floats(lambda old: old.astype(np.float64)),
    "complex": with_floats(lambda old: old.astype(np.complex64)),
    "other-record-name": lambda content: content.update(model=content.pop("arrays")),
    "other-metrics-name": lambda content: content.update(results=content.pop("metrics")),
    "more-metrics": with_metrics(**{"num-examples": 5, "loss": 0.5, "accuracy": 1.0}),
    "fewer-metrics": with_metrics(**{"num-examples": 5}),
    "list-for-number": with_metrics(**{"num-examples": 5, "loss": [0.5, 0.5]}),
    "two-metric-records": with_record("more", MetricRecord({"accuracy": 1.0})),
    "nan-mean": with_array(filled(np.nan), "2.running_mean"),
    "infinite-variance": with_array(filled(np.inf), "2.running_var"),
    "nan-counter": with_array(
        lambda old: np.full_like(old, np.nan, float), "2.num_batches_tracked"
    ),
}


@pytest.mark.parametrize("place", [0, 3], ids=["first", "last"])
@pytest.mark.parametrize("case", ODD)
def test_an_unusual_reply_neither_ends_the_run_nor_spoils_the_model(case: str, place: int) -> None:
    model = ArrayRecord(start(BAD_NET))
    sent = replies(shuffled(BAD_NET, neighbours(BAD_NET, tensors(model)), seed=3))
    sent.insert(place, bad_reply(ODD[case]))
    result, _ = run(aligning(BAD_NET), model, sent)
    assert all(bool(torch.isfinite(value).all()) for value in tensors(result).values())
    # The unusual model is nearby as well: with or without it, the result is.
    assert distance(tensors(result), tensors(model)) < 2e-3


INNER: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    "FedAdam": lambda: FedAdam(eta=0.01),
    "FedMedian": FedMedian,
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", INNER)
def test_invalid_replies_alone_give_no_result(
    inner: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [bad_reply(change, kind) for change, _ in BAD.values()]
    strategy = aligning(BAD_NET, INNER[inner]())
    model = ArrayRecord(start(BAD_NET))
    assert run(strategy, model, bad) == (None, None)
    assert caplog.text.count("dropped: ") == len(BAD)
    # The next round works as if this one had not happened.
    weights = {1: 1, 2: 2, 3: 4, 4: 8}
    sent = replies(neighbours(BAD_NET, tensors(model), weights), weights)
    result, _ = run(strategy, model, sent)
    assert result is not None


def test_without_replies_there_is_no_result() -> None:
    assert run(aligning("mlp"), ArrayRecord(start("mlp")), []) == (None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_error_replies_reach_the_wrapped_strategy(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = ArrayRecord(start("mlp"))
    good = replies(shuffled("mlp", neighbours("mlp", tensors(model)), 3), kind=kind)
    expected, _ = run(aligning("mlp"), model, good)
    failed = KINDS[kind](error_reply(Error(code=7, reason="out of memory"), BAD_NODE))
    spy = Spy()
    result, _ = run(aligning("mlp", spy), model, [failed, *good])
    assert_bitwise(result, expected)
    assert [message for message in spy.seen if message.has_error()] == [failed]
    assert len(spy.seen) == 4
    assert f"error in reply from node {BAD_NODE}: out of memory" in caplog.text
    assert "dropped" not in caplog.text
    assert run(aligning("mlp"), model, [failed]) == (None, None)


# Everything else is up to the wrapped strategy


def test_configuration_evaluation_and_summary_are_those_of_the_wrapped_strategy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = Mock(spec=Strategy)
    strategy = aligning("mlp", inner)
    model, config, grid = ArrayRecord(start("mlp")), ConfigRecord({"lr": 0.1}), Nodes([1, 2])
    asked = Message(RecordDict(), dst_node_id=2, message_type=MessageType.EVALUATE)
    content = RecordDict({"metrics": MetricRecord({"accuracy": 0.5})})
    message = Message(content, reply_to=asked)

    inner.configure_train.return_value = iter([message])
    assert list(strategy.configure_train(3, model, config, grid)) == [message]
    inner.configure_train.assert_called_once_with(3, model, config, grid)

    inner.configure_evaluate.return_value = [message]
    assert strategy.configure_evaluate(3, model, config, grid) == [message]
    inner.configure_evaluate.assert_called_once_with(3, model, config, grid)

    inner.aggregate_evaluate.return_value = MetricRecord({"accuracy": 0.5})
    assert strategy.aggregate_evaluate(3, [message]) == MetricRecord({"accuracy": 0.5})
    inner.aggregate_evaluate.assert_called_once_with(3, [message])

    strategy.summary()
    inner.summary.assert_called_once_with()
    # All but the 4 of the last bias: 12 x 7 + 7, 7 x 7 + 7 and 7 x 4 of 179 parameters.
    assert "Re-Basin: 2 groups of units, 97.8 % of the parameters may move" in caplog.text
    assert "align: WeightMatching(to='others'); finish: none; guard: None" in caplog.text


def test_the_summary_names_every_option_that_is_set(caplog: pytest.LogCaptureFixture) -> None:
    finish = [BatchNorm(), LeastSquares(max_features=100)]
    strategy_for("mlp", align=ActivationMatching(), finish=finish, guard=Guard()).summary()
    assert (
        "align: ActivationMatching(then_weights=False); finish: BatchNorm(), "
        "LeastSquares(max_features=100, ridge=0.01, label_counts=None); guard: Guard()"
    ) in caplog.text


def test_the_wrapped_strategy_is_fedavg_by_default() -> None:
    entry = ZOO["mlp"]
    strategy = ReBasinStrategy(model=entry.build(), example_inputs=entry.inputs())
    assert type(strategy.strategy) is FedAvg


def test_a_global_model_of_another_architecture_is_refused() -> None:
    inner = Mock(spec=Strategy)
    strategy = aligning("mlp", inner)
    other = ArrayRecord({**start("mlp"), "1.weight": torch.zeros(7, 13)})
    with pytest.raises(SpecError, match=r"1\.weight has shape \(7, 13\).*expects \(7, 12\)"):
        strategy.configure_train(1, other, ConfigRecord(), Nodes([1, 2]))
    with pytest.raises(SpecError, match="the state dict lacks 6 keys of the spec"):
        strategy.configure_train(1, ArrayRecord(), ConfigRecord(), Nodes([1, 2]))
    inner.configure_train.assert_not_called()


def test_aggregation_before_configuration_is_refused() -> None:
    with pytest.raises(RuntimeError, match="aggregate_train was called before configure_train"):
        aligning("mlp").aggregate_train(1, replies(unlike("mlp")))


def test_a_model_without_a_spec_is_refused() -> None:
    with pytest.raises(SpecError, match=r"cannot be run on the example inputs \(1, 5\)"):
        ReBasinStrategy(model=nn.Linear(3, 2), example_inputs=torch.zeros(1, 5))


def test_a_wrapped_strategy_that_changes_the_keys_is_an_error() -> None:
    inner = Mock(spec=Strategy)
    inner.configure_train.return_value = []
    model = start("mlp")
    more = ArrayRecord({**model, "spare": torch.zeros(1)})
    inner.aggregate_train.return_value = more, None
    sent = replies(dict.fromkeys(WEIGHTS, model))
    with pytest.raises(ValueError, match=r"wrapped strategy changed .* keys: \['spare'\]"):
        run(aligning("mlp", inner), ArrayRecord(model), sent)


@pytest.mark.parametrize("depth", range(3))
def test_the_innermost_strategy_names_the_metric_that_weights_a_reply(
    depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    inner: Strategy = FedAvg(weighted_by_key="steps")
    for _ in range(depth):
        inner = clipped(inner, 2, 1e6)
    strategy = aligning("mlp", inner)
    assert strategy.weighted_by_key == "steps"
    # The example counts would give other weights.
    clients, examples = unlike("mlp"), {1: 100, 2: 1, 3: 100}
    sent = replies_of(clients, examples)
    sent[0].content["metrics"]["steps"] = 2
    sent[1].content["metrics"]["steps"] = 6
    result, _ = run(strategy, ArrayRecord(start("mlp")), sent)
    models = [clients[1], clients[2]]
    merge = merge_many(strategy.spec, models, weights=[2, 6], unit_order_of=start("mlp"))
    assert_same(tensors(result), merge.state_dict, rtol=1e-4, atol=1e-5)
    (line,) = dropped(caplog)
    assert line.startswith("reply of node 3 dropped: expected one MetricRecord, with one number ")
    assert "'steps'" in line


def test_a_strategy_without_a_weight_metric_weights_by_examples() -> None:
    assert aligning("mlp", Mock(spec=Strategy)).weighted_by_key == "num-examples"
