"""Laws of the aligning strategy: who it is equal to, and what no client can do to it."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from federation import Aggregate, Nodes, prepare, tensors, vast
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
from helpers import State, assert_same, named_spec, near, random_state
from torch import nn
from zoo import ZOO

from fl_rebasin import Permutation, PermutationSpec, SpecError, merge_many
from fl_rebasin.flower import ReBasinStrategy
from fl_rebasin.merging.heads import class_aware_head

NETS = ("mlp", "conv-batchnorm-flatten", "residual-batchnorm", "tied-shared", "chunk-keywords")
WEIGHTS = (1, 2, 4)
OWN_METRICS = {
    "rebasin-margin",
    "rebasin-units-moved",
    "rebasin-sweeps",
    "rebasin-seconds",
    "rebasin-dropped",
}


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


def real_reply(content: RecordDict | Error, node_id: int) -> Message:
    asked = Message(RecordDict(), dst_node_id=node_id, message_type=MessageType.TRAIN)
    return Message(content, reply_to=asked)


def mock_reply(content: RecordDict | Error, node_id: int) -> Message:
    reply = Mock(spec=Message)
    reply.metadata.src_node_id = node_id
    is_error = isinstance(content, Error)
    reply.has_error.return_value = is_error
    reply.has_content.return_value = not is_error
    setattr(reply, "error" if is_error else "content", content)
    return reply


KINDS = {"real": real_reply, "mock": mock_reply}


def content_of(state: State, weight: float, **metrics: float) -> RecordDict:
    counted = MetricRecord({"num-examples": weight, **metrics})
    return RecordDict({"arrays": ArrayRecord(state), "metrics": counted})


def replies_of(
    states: Iterable[State],
    weights: Iterable[float] = WEIGHTS,
    kind: Callable[[RecordDict | Error, int], Message] = real_reply,
) -> list[Message]:
    return [
        kind(content_of(state, weight, loss=0.5 * weight), node_id)
        for node_id, (state, weight) in enumerate(zip(states, weights, strict=True), start=1)
    ]


def made(name: str, inner: Strategy | None = None, **options: Any) -> ReBasinStrategy:
    entry = ZOO[name]
    return ReBasinStrategy(
        inner,
        model=entry.build(),
        example_inputs=entry.inputs(),
        **{"recalibrate_batchnorm": False, **options},
    )


template = cache(made)


def rebasin(name: str, inner: Strategy | None = None) -> ReBasinStrategy:
    """A strategy; its spec is derived once for all tests."""
    strategy = copy.copy(template(name))
    strategy.strategy = FedAvg() if inner is None else inner
    return strategy


def one_round(
    strategy: Strategy, model: ArrayRecord, replies: Iterable[Message], server_round: int = 1
) -> Aggregate:
    replies = list(replies)
    grid = Nodes(range(1, max(len(replies), 2) + 1))
    list(strategy.configure_train(server_round, model, ConfigRecord(), grid))
    return strategy.aggregate_train(server_round, replies)


def tied(name: str, state: State) -> State:
    """The same with tied tensors equal again."""
    if name == "tied-shared":
        state["out.weight"] = state["embed.weight"].clone()
    return state


def start(name: str, seed: int = 0) -> State:
    return tied(name, random_state(ZOO[name], seed))


def neighbours(name: str, state: State, count: int = len(WEIGHTS)) -> list[State]:
    return [tied(name, near(state, seed)) for seed in range(1, count + 1)]


def permutations(spec: PermutationSpec, count: int, seed: int) -> list[Permutation]:
    """Random ones; none of them leaves all units in their places."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [spec.random(generator) for _ in range(count)]
    assert not any(each.is_identity for each in drawn)
    return drawn


def shuffled(name: str, states: Iterable[State], seed: int) -> list[State]:
    spec, states = named_spec(name), list(states)
    drawn = permutations(spec, len(states), seed)
    return [spec.apply(each, state) for each, state in zip(drawn, states, strict=True)]


def distance(left: State, right: State) -> float:
    """Relative distance over the floating tensors."""
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


def lasting(metrics: MetricRecord | None) -> dict[str, Any]:
    """Metrics without times."""
    assert metrics is not None
    return {key: value for key, value in metrics.items() if not key.endswith("-seconds")}


@dataclass
class Spy(FedAvg):
    """A FedAvg that keeps what it was handed."""

    seen: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        self.seen = list(replies)
        return super().aggregate_train(server_round, self.seen)


# Equal to whom


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
def test_aligned_clients_are_averaged_bitwise_as_by_the_inner_strategy(
    name: str, kind: str
) -> None:
    model = start(name)
    replies = replies_of(neighbours(name, model), kind=KINDS[kind])
    expected, expected_metrics = FedAvg().aggregate_train(1, replies)
    result, metrics = one_round(rebasin(name), ArrayRecord(model), replies)

    assert result is not None
    assert expected is not None
    assert list(result) == list(model)
    for key, value in model.items():
        if value.is_floating_point():
            assert result[key].dtype == expected[key].dtype
            assert result[key].data == expected[key].data, key
        else:
            # Weights 1, 2, 4 of counts 4, 10, 18: 96 / 7.
            assert tensors(result)[key].dtype == torch.int64
            assert int(result[key].numpy()) == 14

    assert metrics is not None
    assert expected_metrics is not None
    assert {key: metrics[key] for key in expected_metrics} == dict(expected_metrics)
    assert metrics["loss"] == pytest.approx(1.5)
    assert metrics["rebasin-units-moved"] == 0
    # What a proof shows to be in place is not looked at; the rest is, and found to be.
    looked_at = {"rebasin-similarity-before", "rebasin-similarity-after"}
    assert metrics.keys() - expected_metrics.keys() - OWN_METRICS == (
        set() if metrics["rebasin-margin"] >= 1 else looked_at
    )
    assert metrics.get("rebasin-similarity-before") == metrics.get("rebasin-similarity-after")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NETS)
def test_permuted_copies_give_back_the_model_in_the_order_of_the_global_one(
    name: str, seed: int
) -> None:
    shared = start(name)
    copies = shuffled(name, [shared] * 3, seed=seed)
    spec = named_spec(name)
    (order,) = permutations(spec, 1, seed=100 + seed)
    gauge = spec.apply(order, neighbours(name, shared, 1)[0])
    replies = replies_of(copies)

    naive, _ = FedAvg().aggregate_train(1, replies)
    assert distance(tensors(naive), spec.apply(order, shared)) > 0.1

    result, metrics = one_round(rebasin(name), ArrayRecord(gauge), replies)
    assert_same(tensors(result), spec.apply(order, shared), rtol=1e-6, atol=1e-7)
    assert metrics is not None
    assert metrics["rebasin-similarity-after"] == pytest.approx(1)
    assert metrics["rebasin-similarity-before"] < 0.95
    assert metrics["rebasin-units-moved"] > 0


@pytest.mark.parametrize("name", NETS)
def test_result_and_metrics_are_those_of_merge_many_with_the_example_counts(name: str) -> None:
    # Models that share nothing: here the weights decide who is matched to whom.
    model, *clients = (start(name, seed) for seed in range(4))
    weights = [10, 1, 25]
    spec = named_spec(name)
    merge = merge_many(spec, clients, weights=weights, unit_order_of=model)
    result, metrics = one_round(rebasin(name), ArrayRecord(model), replies_of(clients, weights))
    assert_same(tensors(result), merge.state_dict, rtol=1e-4, atol=1e-6)
    assert metrics is not None
    assert metrics["rebasin-units-moved"] == merge.moved
    assert metrics["rebasin-sweeps"] == merge.sweeps
    assert metrics["rebasin-similarity-before"] == pytest.approx(merge.similarity_before)
    assert metrics["rebasin-similarity-after"] == pytest.approx(merge.similarity)

    unweighted = merge_many(spec, clients, unit_order_of=model)
    assert distance(tensors(result), unweighted.state_dict) > 0.1


def clipped(inner: Strategy, clients: int, norm: float) -> Strategy:
    return DifferentialPrivacyServerSideFixedClipping(inner, 0.0, norm, clients)


# What the inner strategy is handed, and what stays


def reverse_keys(state: State) -> State:
    return {key: state[key] for key in reversed(state)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moved", [False, True], ids=["in-place", "permuted"])
def test_inner_strategy_sees_the_key_order_of_the_global_model(moved: bool, kind: str) -> None:
    name = "conv-batchnorm-flatten"
    model = start(name)
    clients = neighbours(name, model)
    sent = shuffled(name, clients, seed=1) if moved else clients
    spy = Spy()
    replies = replies_of([sent[0], *map(reverse_keys, sent[1:])], kind=KINDS[kind])
    result, _ = one_round(rebasin(name, spy), ArrayRecord(model), replies)
    assert result is not None
    assert list(result) == list(model)
    for message, reply, client in zip(spy.seen, replies, clients, strict=True):
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
    replies = replies_of(shuffled(name, clients, 2) if moved else clients, kind=KINDS[kind])
    contents = [reply.content for reply in replies]
    records = [content["arrays"] for content in contents]
    before = copy.deepcopy((model, contents))
    one_round(rebasin(name, inner()), model, replies)
    assert (model, contents) == before
    for reply, content, record in zip(replies, contents, records, strict=True):
        assert reply.content is content
        assert reply.content["arrays"] is record


# Replies that are no good

BAD_NET = "conv-batchnorm-flatten"
BAD_NODE = 7


def with_arrays(change: Callable[[ArrayRecord], object]) -> Callable[[RecordDict], object]:
    def changed(content: RecordDict) -> None:
        change(content.array_records["arrays"])

    return changed


def with_array(values: Any, key: str = "0.weight") -> Callable[[RecordDict], object]:
    def change(arrays: ArrayRecord) -> None:
        old = arrays[key].numpy()
        arrays[key] = Array(values(old))

    return with_arrays(change)


def with_payload(data: bytes, stype: str = "numpy.ndarray") -> Callable[[RecordDict], object]:
    def change(arrays: ArrayRecord) -> None:
        old = arrays["0.weight"]
        arrays["0.weight"] = Array(dtype=old.dtype, shape=old.shape, stype=stype, data=data)

    return with_arrays(change)


def npy(values: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=allow_pickle)
    return file.getvalue()


SHAPED = "{{'descr': '<f4', 'fortran_order': False, 'shape': {}, }}"


def head_of(text: str) -> bytes:
    """The head of a payload that says something."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def with_weight(weight: Any) -> Callable[[RecordDict], object]:
    def change(content: RecordDict) -> None:
        content["metrics"] = MetricRecord({"num-examples": weight, "loss": 0.5})

    return change


def filled(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(old: np.ndarray) -> np.ndarray:
        new = old.copy()
        new.flat[0] = value
        return new

    return change


BAD: dict[str, tuple[Callable[[RecordDict], object], str]] = {
    "nan-weights": (with_array(filled(np.nan)), r"0\.weight holds NaN or infinite values"),
    "infinite-weights": (with_array(filled(np.inf)), r"0\.weight holds NaN or infinite values"),
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
    "two-records": (
        lambda content: content.update(more=ArrayRecord()),
        "expected one ArrayRecord, got 2",
    ),
    "no-metrics": (lambda content: content.pop("metrics"), "with one number 'num-examples'"),
    "no-weight": (
        lambda content: content.update(metrics=MetricRecord({"loss": 0.5})),
        "with one number 'num-examples'",
    ),
    "list-of-weights": (with_weight([1, 2]), "with one number 'num-examples'"),
    "two-weights": (
        lambda content: content.update(more=MetricRecord({"num-examples": 3})),
        "with one number 'num-examples'",
    ),
    "negative-weight": (with_weight(-3), "num-examples is -3, it must be positive"),
    "zero-weight": (with_weight(0), "num-examples is 0, it must be positive"),
    "nan-weight": (with_weight(float("nan")), "num-examples is nan, it must be positive"),
    "infinite-weight": (with_weight(float("inf")), "num-examples is inf, it must be positive"),
    "weight-beyond-floats": (with_weight(10**400), "it must be positive and at most"),
    "metric-beyond-floats": (
        lambda content: content["metrics"].update(loss=10**400),
        "its metric 'loss' is too large for a float",
    ),
    "list-beyond-floats": (
        lambda content: content["metrics"].update(loss=[1, -(10**400)]),
        "its metric 'loss' is too large for a float",
    ),
    "weight-beyond-the-cap": (with_weight(2e15), r"num-examples is 20{15}\.0.*at most 1e\+15"),
    "pickle": (with_payload(pickle.dumps([1.0] * 9)), "its payload is no array in NumPy's"),
    "pickled-array": (with_payload(npy(np.array([None] * 9), True)), "dtype object.* no number"),
    "text": (with_payload(npy(np.array(["a"] * 9))), "dtype <U1, which is no number"),
    "garbage": (with_payload(b"garbage"), "its payload is no array in NumPy's format"),
    "empty": (with_payload(b""), "its payload is no array in NumPy's format"),
    "half-a-head": (with_payload(npy(np.zeros(9))[:40]), "its payload is no array in NumPy's"),
    "nested-head": (with_payload(head_of("(" * 3000 + ")" * 3000)), "is no array in NumPy's"),
    "code-for-a-head": (with_payload(head_of("__import__('os').abort()")), "is no array in NumPy"),
    "negative-shape": (with_payload(head_of(SHAPED.format("(-1, -9)"))), r"the shape \(-1, -9\)"),
    "truncated": (
        with_payload(npy(np.zeros((6, 3, 3, 3), np.float32))[:-1]),
        r"claims float32 of shape \(6, 3, 3, 3\), 648 bytes, and holds 647",
    ),
    "oversized": (
        with_payload(npy(np.zeros((6, 3, 3, 3), np.float32)) + b"more"),
        "648 bytes, and holds 652",
    ),
    "vast": (with_payload(vast("<f4")), r"shape \(10000000000000,\), 40000000000000 bytes, and ho"),
    "other-than-said": (
        with_payload(npy(np.zeros((6, 3, 3, 3)))),
        r"said to be float32 of shape \(6, 3, 3, 3\), its payload is float64",
    ),
    "other-serialization": (with_payload(b"", "elsewhere"), "serialization type.*'elsewhere'"),
}


@cache
def good_replies(kind: str) -> list[Message]:
    moved = shuffled(BAD_NET, neighbours(BAD_NET, start(BAD_NET)), seed=3)
    return replies_of(moved, kind=KINDS[kind])


@cache
def result_of_good_replies(kind: str) -> tuple[ArrayRecord | None, dict[str, Any]]:
    result, metrics = one_round(rebasin(BAD_NET), ArrayRecord(start(BAD_NET)), good_replies(kind))
    return result, lasting(metrics)


def bad_reply(change: Callable[[RecordDict], object], kind: str = "real") -> Message:
    content = content_of(near(start(BAD_NET), 9), 5, loss=2.5)
    change(content)
    return KINDS[kind](content, BAD_NODE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_reply_is_dropped_and_named(
    case: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, words = BAD[case]
    good = good_replies(kind)
    expected, expected_metrics = result_of_good_replies(kind)
    assert "dropped" not in caplog.text

    spy = Spy()
    mixed = [good[0], bad_reply(change, kind), *good[1:]]
    result, metrics = one_round(rebasin(BAD_NET, spy), ArrayRecord(start(BAD_NET)), mixed)
    assert_bitwise(result, expected)
    assert lasting(metrics) == expected_metrics | {"rebasin-dropped": 1}
    assert [message.metadata.src_node_id for message in spy.seen] == [1, 2, 3]
    (line,) = [record for record in caplog.records if "dropped" in record.getMessage()]
    assert line.levelno == logging.WARNING
    assert re.match(rf"reply of node {BAD_NODE} dropped: .*{words}", line.getMessage())


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_has_one_reply(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    good = good_replies(kind)
    expected, _ = result_of_good_replies(kind)
    again = KINDS[kind](content_of(near(start(BAD_NET), 9), 5, loss=2.5), 1)
    model = ArrayRecord(start(BAD_NET))
    result, metrics = one_round(rebasin(BAD_NET), model, [good[0], again, *good[1:]])
    assert_bitwise(result, expected)
    assert metrics is not None
    assert metrics["rebasin-dropped"] == 1
    assert "reply of node 1 dropped: it has replied before" in caplog.messages


def with_metrics(**metrics: Any) -> Callable[[RecordDict], object]:
    def change(content: RecordDict) -> None:
        content["metrics"] = MetricRecord(metrics)

    return change


def with_floats(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], object]:
    def changed(arrays: ArrayRecord) -> None:
        for key, array in arrays.items():
            if array.dtype == "float32":
                arrays[key] = Array(change(array.numpy()))

    return with_arrays(changed)


ODD: dict[str, Callable[[RecordDict], object]] = {
    "float64": with_floats(lambda old: old.astype(np.float64)),
    "complex": with_floats(lambda old: old.astype(np.complex64)),
    "other-record-name": lambda content: content.update(model=content.pop("arrays")),
    "other-metrics-name": lambda content: content.update(results=content.pop("metrics")),
    "more-metrics": with_metrics(**{"num-examples": 5, "loss": 0.5, "accuracy": 1.0}),
    "fewer-metrics": with_metrics(**{"num-examples": 5}),
    "list-for-number": with_metrics(**{"num-examples": 5, "loss": [0.5, 0.5]}),
    "two-metric-records": lambda content: content.update(more=MetricRecord({"accuracy": 1.0})),
    "nan-mean": with_array(filled(np.nan), "2.running_mean"),
    "infinite-variance": with_array(filled(np.inf), "2.running_var"),
    "nan-counter": with_array(
        lambda old: np.full_like(old, np.nan, float), "2.num_batches_tracked"
    ),
}


@pytest.mark.parametrize("place", [0, 3], ids=["first", "last"])
@pytest.mark.parametrize("case", ODD)
def test_odd_reply_neither_ends_the_run_nor_poisons_the_model(case: str, place: int) -> None:
    model = ArrayRecord(start(BAD_NET))
    replies = replies_of(shuffled(BAD_NET, neighbours(BAD_NET, tensors(model)), seed=3))
    replies.insert(place, bad_reply(ODD[case]))
    result, _ = one_round(rebasin(BAD_NET), model, replies)
    assert all(bool(torch.isfinite(value).all()) for value in tensors(result).values())
    # With or without the odd one, which is near as well: nothing else came.
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
def test_only_bad_replies_are_no_result(
    inner: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [bad_reply(change, kind) for change, _ in BAD.values()]
    strategy = rebasin(BAD_NET, INNER[inner]())
    model = ArrayRecord(start(BAD_NET))
    assert one_round(strategy, model, bad) == (None, None)
    assert caplog.text.count("dropped: ") == len(BAD)
    # The next round goes on as if nothing had been.
    replies = replies_of(neighbours(BAD_NET, tensors(model), 4), [1, 2, 4, 8])
    result, _ = one_round(strategy, model, replies)
    assert result is not None


def test_no_replies_are_no_result() -> None:
    assert one_round(rebasin("mlp"), ArrayRecord(start("mlp")), []) == (None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_error_replies_reach_the_inner_strategy(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = ArrayRecord(start("mlp"))
    good = replies_of(shuffled("mlp", neighbours("mlp", tensors(model)), 3), kind=KINDS[kind])
    expected, _ = one_round(rebasin("mlp"), model, good)
    failed = KINDS[kind](Error(code=7, reason="out of memory"), BAD_NODE)
    spy = Spy()
    result, _ = one_round(rebasin("mlp", spy), model, [failed, *good])
    assert_bitwise(result, expected)
    assert [message for message in spy.seen if message.has_error()] == [failed]
    assert len(spy.seen) == 4
    assert f"error in reply from node {BAD_NODE}: out of memory" in caplog.text
    assert "dropped" not in caplog.text
    assert one_round(rebasin("mlp"), model, [failed]) == (None, None)


# Everything else is the inner strategy's


def test_configuration_evaluation_and_summary_are_the_inner_strategys(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = Mock(spec=Strategy)
    strategy = rebasin("mlp", inner)
    model, config, grid = ArrayRecord(start("mlp")), ConfigRecord({"lr": 0.1}), Nodes([1, 2])
    message = real_reply(RecordDict({"metrics": MetricRecord({"accuracy": 0.5})}), 2)

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
    # 12 x 7 + 7 + 7 x 7 + 7 + 7 x 4 of these and the 4 of the last bias.
    assert "Re-Basin: 2 groups of units, 97.8 % of the parameters may move" in caplog.text


def test_inner_strategy_is_fedavg_by_default() -> None:
    assert type(made("mlp").strategy) is FedAvg


def test_global_model_of_another_architecture_is_refused() -> None:
    inner = Mock(spec=Strategy)
    strategy = rebasin("mlp", inner)
    other = ArrayRecord({**start("mlp"), "1.weight": torch.zeros(7, 13)})
    with pytest.raises(SpecError, match=r"1\.weight has shape \(7, 13\).*expects \(7, 12\)"):
        strategy.configure_train(1, other, ConfigRecord(), Nodes([1, 2]))
    with pytest.raises(SpecError, match="the state dict lacks 6 keys of the spec"):
        strategy.configure_train(1, ArrayRecord(), ConfigRecord(), Nodes([1, 2]))
    inner.configure_train.assert_not_called()


def test_aggregation_before_configuration_is_refused() -> None:
    with pytest.raises(RuntimeError, match="aggregate_train was called before configure_train"):
        rebasin("mlp").aggregate_train(1, replies_of([start("mlp")] * 3))


def test_model_that_gives_no_spec_is_refused() -> None:
    with pytest.raises(SpecError, match=r"cannot be run on the example inputs \(1, 5\)"):
        ReBasinStrategy(model=nn.Linear(3, 2), example_inputs=torch.zeros(1, 5))


def test_inner_strategy_that_changes_the_keys_is_named() -> None:
    inner = Mock(spec=Strategy)
    inner.configure_train.return_value = []
    model = start("mlp")
    more = ArrayRecord({**model, "spare": torch.zeros(1)})
    inner.aggregate_train.return_value = more, None
    with pytest.raises(ValueError, match=r"wrapped strategy changed .* keys: \['spare'\]"):
        one_round(rebasin("mlp", inner), ArrayRecord(model), replies_of([model] * 3))


@pytest.mark.parametrize("depth", range(3))
def test_weight_key_of_the_innermost_strategy_is_honoured(
    depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    inner: Strategy = FedAvg(weighted_by_key="steps")
    for _ in range(depth):
        inner = clipped(inner, 2, 1e6)
    strategy = rebasin("mlp", inner)
    assert strategy.weighted_by_key == "steps"
    # The example counts would say otherwise.
    model, left, right, lost = (start("mlp", seed) for seed in range(4))
    replies = [
        real_reply(content_of(left, 100, steps=2), 1),
        real_reply(content_of(right, 1, steps=6), 2),
        real_reply(content_of(lost, 100), BAD_NODE),
    ]
    result, _ = one_round(strategy, ArrayRecord(model), replies)
    merge = merge_many(strategy.spec, [left, right], weights=[2, 6], unit_order_of=model)
    assert_same(tensors(result), merge.state_dict, rtol=1e-4, atol=1e-5)
    reason = "expected one MetricRecord, with one number 'steps'"
    assert f"reply of node {BAD_NODE} dropped: {reason}" in caplog.text


def test_strategy_without_a_weight_key_weighs_by_examples() -> None:
    assert rebasin("mlp", Mock(spec=Strategy)).weighted_by_key == "num-examples"


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"matching": "weight"},
            "unknown matching 'weight': use one of none, weights, activations, "
            "activations-then-weights, straight-through",
        ),
        (
            {"least_squares": "layers"},
            "unknown least_squares 'layers': use one of none, layerwise, one-pass, rescaling",
        ),
        ({"align_to": "mean"}, "unknown align_to 'mean': use one of joint, global"),
        (
            {"align_to": "global", "matching": "activations"},
            "align_to='global' matches weights, matching='activations' does not",
        ),
        ({"min_replies": 0}, "min_replies must be at least 1, got 0"),
        ({"max_examples": 0}, "max_examples must be positive and finite, got 0"),
        ({"max_examples": float("inf")}, "max_examples must be positive and finite, got inf"),
        ({"max_update_norm": 0.0}, "max_update_norm must be positive, got 0.0"),
        ({"max_update_norm": float("nan")}, "max_update_norm must be positive, got nan"),
    ],
)
def test_unknown_option_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        made("mlp", **options)


def test_without_matching_replies_are_averaged_as_they_come() -> None:
    model = ArrayRecord(start("mlp"))
    replies = replies_of([start("mlp", seed) for seed in (1, 2, 3)])
    expected, _ = FedAvg().aggregate_train(1, replies)
    result, metrics = one_round(made("mlp", matching="none"), model, replies)
    assert_bitwise(result, expected)
    assert metrics is not None
    assert set(metrics) == {"loss", "rebasin-dropped"}


# Class-aware heads

LABELS = ([9, 0, 1, 5], [0, 3, 20, 1], [1, 1, 1, 0])


@cache
def with_heads() -> ReBasinStrategy:
    return made("mlp", label_counts="labels")


def labelled(states: Iterable[State], counts: Iterable[Any]) -> list[Message]:
    """Replies with label counts; of None there are none."""
    replies = []
    for node_id, (state, each) in enumerate(zip(states, counts, strict=True), start=1):
        metrics = {} if each is None else {"labels": each}
        replies.append(real_reply(content_of(state, WEIGHTS[node_id - 1], **metrics), node_id))
    return replies


def headed(model: State, counts: Iterable[Any]) -> tuple[State, State]:
    """What a round makes of three strangers; with class-aware heads, and plain."""
    strangers = [start("mlp", seed) for seed in (1, 2, 3)]
    merge = merge_many(with_heads().spec, strangers, weights=WEIGHTS, unit_order_of=model)
    pairs = list(zip(merge.permutations, strangers, counts, strict=True))
    known = [(with_heads().spec.apply(move, each), c) for move, each, c in pairs if c is not None]
    if not known:
        return merge.state_dict, merge.state_dict
    moved, tables = zip(*known, strict=True)
    head = class_aware_head(
        merge.state_dict, moved, [torch.tensor(each) for each in tables], "6.weight", "6.bias"
    )
    return head, merge.state_dict


def test_rows_of_the_last_layer_are_averaged_by_label_counts() -> None:
    model = start("mlp")
    strangers = [start("mlp", seed) for seed in (1, 2, 3)]
    result, metrics = one_round(with_heads(), ArrayRecord(model), labelled(strangers, LABELS))
    expected, plain = headed(model, LABELS)
    assert_same(tensors(result), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tensors(result)["6.weight"], plain["6.weight"], atol=1e-3)
    assert_same(
        {key: value for key, value in tensors(result).items() if not key.startswith("6.")},
        {key: value for key, value in plain.items() if not key.startswith("6.")},
        rtol=1e-5,
        atol=1e-6,
    )
    assert metrics is not None


def test_heads_do_not_depend_on_the_order_of_the_units() -> None:
    model = start("mlp")
    clients = neighbours("mlp", model)
    expected, _ = one_round(with_heads(), ArrayRecord(model), labelled(clients, LABELS))
    moved = shuffled("mlp", clients, seed=4)
    result, _ = one_round(with_heads(), ArrayRecord(model), labelled(moved, LABELS))
    assert_same(tensors(result), tensors(expected), rtol=1e-5, atol=1e-6)


BAD_COUNTS: dict[str, tuple[list[Any], str]] = {
    "negative": ([9, -1, 1, 5], r"labels holds what is no number of examples: \[9, -1, 1, 5\]"),
    "huge": ([9, 10**16, 1, 5], "labels holds what is no number of examples"),
    "nan": ([9.0, float("nan"), 1.0, 5.0], "labels holds what is no number of examples"),
    "infinite": ([9.0, float("inf"), 1.0, 5.0], "labels holds what is no number of examples"),
    "nothing": ([0, 0, 0, 0], "all label counts are 0"),
}


@pytest.mark.parametrize("case", BAD_COUNTS)
def test_bad_label_counts_are_dropped_and_named(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    counts, words = BAD_COUNTS[case]
    model = start("mlp")
    strangers = [start("mlp", seed) for seed in (1, 2, 3)]
    sent = [LABELS[0], counts, LABELS[2]]
    result, _ = one_round(with_heads(), ArrayRecord(model), labelled(strangers, sent))
    # The model of this client is averaged all the same.
    expected, _ = headed(model, [LABELS[0], None, LABELS[2]])
    assert_same(tensors(result), expected, rtol=1e-5, atol=1e-6)
    (line,) = [each for each in caplog.messages if "dropped" in each]
    assert re.match(rf"label counts of node 2 dropped: {words}", line), line


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (None, "expected one list 'labels' in its metrics"),
        (7, "expected one list 'labels' in its metrics"),
        ([1, 2, 3], r"label counts of shape \(3,\) for 4 classes"),
        ([], r"label counts of shape \(0,\) for 4 classes"),
    ],
)
def test_without_good_label_counts_the_head_is_the_plain_average(
    counts: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = start("mlp")
    strangers = [start("mlp", seed) for seed in (1, 2, 3)]
    replies = labelled(strangers, [counts] * 3)
    result, _ = one_round(with_heads(), ArrayRecord(model), replies)
    plain, _ = one_round(rebasin("mlp"), ArrayRecord(model), replies)
    assert_bitwise(result, plain)
    lines = [each for each in caplog.messages if "dropped" in each]
    assert len(lines) == 3
    for line in lines:
        assert re.match(rf"label counts of node \d dropped: {words}", line), line


def test_heads_of_a_model_that_ends_in_something_else_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with pytest.raises(ValueError, match="returns what a linear layer gives"):
        ReBasinStrategy(model=net, example_inputs=torch.zeros(1, 4), label_counts="labels")
