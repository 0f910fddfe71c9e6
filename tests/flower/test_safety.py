"""Whatever clients send, it neither ends a round nor poisons the model, and is not unpickled."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from federation import (
    Aggregate,
    Federation,
    dropped,
    one_round,
    prepare,
    replies_of,
    strategy_for,
    tensors,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.serverapp.strategy import (
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)
from helpers import State, named_spec, nearby, random_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

from fl_rebasin import PermutationSpec, derive_spec
from fl_rebasin.flower import Limits, ReBasinStrategy, WeightMatching

NET = "conv-batchnorm-flatten"


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


@cache
def averaging(**options: Any) -> ReBasinStrategy:
    return strategy_for(NET, finish=[], **options)


def a_round(strategy: Strategy, model: State, replies: list[Message]) -> Aggregate:
    """Run a round with these replies, whose clients answer no questions."""
    return one_round(strategy, Federation(dict.fromkeys(range(1, 11))), model, replies)


# --- arbitrary replies -------------------------------------------------------------------------


@cache
def start() -> State:
    return random_state(ZOO[NET], 0)


def valid(node: int) -> Message:
    return replies_of({node: nearby(start(), node)}, loss=0.5)[0]


DESCRIPTIONS = st.one_of(
    st.sampled_from(["<f4", ">f4", "<f8", "<i8", "|b1", "|O", "<U9", "<M8[s]", "<c16", "|V4"]),
    st.text("<>|fiuObScV0123456789[], '", max_size=6),
)
SHAPES = st.one_of(
    st.sampled_from([(6, 3, 3, 3), (6,), (), (5, 54), (10**13,), (2**63,), (-1, 4)]),
    st.lists(st.integers(-2, 2**70), max_size=5).map(tuple),
)


@st.composite
def payloads(draw: st.DrawFn, old: bytes) -> bytes:
    """Bytes to replace an array's payload."""
    kind = draw(
        st.sampled_from(["bytes", "cut", "damaged", "header"] if old else ["bytes", "header"])
    )
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "cut":
        return old[: draw(st.integers(0, len(old)))] + draw(st.binary(max_size=3))
    if kind == "damaged":
        damaged = bytearray(old)
        changes = st.tuples(st.integers(0, len(old) - 1), st.integers(0, 255))
        for position, byte in draw(st.lists(changes, min_size=1, max_size=8)):
            damaged[position] = byte
        return bytes(damaged)
    file = io.BytesIO()
    header = {
        "descr": draw(DESCRIPTIONS),
        "fortran_order": draw(st.booleans()),
        "shape": draw(SHAPES),
    }
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + draw(st.binary(max_size=100))


NUMBERS = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from([0, -1, 10**18, 10**400, 2**63]),
    st.lists(st.floats(), max_size=3),
    st.lists(st.integers(), max_size=3),
)


@st.composite
def contents(draw: st.DrawFn) -> RecordDict:
    """A valid reply with one or two changes."""
    content = valid(7).content
    for _ in range(draw(st.integers(1, 2))):
        arrays = next(iter(content.array_records.values()), ArrayRecord())
        keys = sorted(arrays)
        kind = draw(
            st.sampled_from(["payload", "values", "declared", "keys", "metrics", "records"])
        )
        if kind in ("payload", "values", "declared") and keys:
            key = draw(st.sampled_from(keys))
            old = arrays[key]
            if kind == "payload":
                arrays[key] = Array(old.dtype, old.shape, old.stype, draw(payloads(old.data)))
            elif kind == "values":
                usual = tuple(start()[key].shape) if key in start() else ()
                shape = draw(st.sampled_from([usual, (1,), (2, 2)]))
                value = draw(st.sampled_from([np.nan, np.inf, 3e38, 1e300, 0.0, -0.0, 5e-324]))
                dtype = draw(st.sampled_from(["f2", "f4", "f8", "i1", "i8", "u8", "c8", "?"]))
                with np.errstate(all="ignore"):
                    arrays[key] = Array(np.full(shape, value).astype(dtype))
            else:
                dtype = draw(st.sampled_from(["float32", "", "object", "nonsense", "i8"]))
                stype = draw(st.sampled_from([old.stype, "pickle", ""]))
                arrays[key] = Array(dtype, draw(SHAPES), stype, old.data)
        elif kind == "keys" and keys:
            arrays[draw(st.text(max_size=3))] = arrays.pop(draw(st.sampled_from(keys)))
        elif kind == "metrics":
            name = draw(st.sampled_from(["num-examples", "loss", "other"]))
            content["metrics"] = MetricRecord({"num-examples": 5, "loss": 0.5, name: draw(NUMBERS)})
        else:
            name = draw(st.sampled_from(["arrays", "metrics", "more"]))
            record = draw(st.sampled_from([ArrayRecord, MetricRecord, ConfigRecord]))()
            content = RecordDict({**{k: v for k, v in content.items() if k != name}, name: record})
    return content


def sent(content: RecordDict, node: int = 7) -> Message:
    asked = Message(RecordDict(), dst_node_id=node, message_type="train")
    return Message(content, reply_to=asked)


def check_round(odd: RecordDict, align: WeightMatching) -> None:
    replies = [valid(1), sent(odd), valid(2)]
    arrays, _ = a_round(averaging(align=align), start(), replies)
    assert arrays is not None
    for key, value in tensors(arrays).items():
        assert value.dtype == start()[key].dtype
        assert value.shape == start()[key].shape
        assert bool(torch.isfinite(value).all()), key


def tried(examples: int) -> settings:
    # The same examples each time; `benchmarks/fuzz_replies.py` tries new ones.
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        derandomize=True,
        database=None,
    )


WIRE_CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6)


def check_wire(changes: list[tuple[int, int]]) -> None:
    raw = bytearray(recorddict_to_proto(valid(7).content).SerializeToString())
    for position, byte in changes:
        raw[position % len(raw)] = byte
    try:
        odd = recorddict_from_proto(RecordDictProto.FromString(bytes(raw)))
    except Exception:  # Flower rejects it before the strategy sees it.
        return
    check_round(odd, WeightMatching(to="global"))


@pytest.mark.parametrize("align", [WeightMatching(), WeightMatching(to="global")], ids=str)
@tried(60)
@given(odd=contents())
def test_no_reply_ends_a_round_or_poisons_the_model(align: WeightMatching, odd: RecordDict) -> None:
    check_round(odd, align)


@tried(60)
@given(changes=WIRE_CHANGES)
def test_no_bytes_on_the_wire_end_a_round_or_poison_the_model(
    changes: list[tuple[int, int]],
) -> None:
    check_wire(changes)


@pytest.mark.slow
@tried(400)
@given(odd=contents())
def test_no_reply_of_several_hundred_ends_a_round_or_poisons_the_model(odd: RecordDict) -> None:
    check_round(odd, WeightMatching(to="global"))


@pytest.mark.slow
@tried(400)
@given(changes=WIRE_CHANGES)
def test_no_bytes_of_several_hundred_end_a_round_or_poison_the_model(
    changes: list[tuple[int, int]],
) -> None:
    check_wire(changes)


def replied(node: int, **records: Any) -> Message:
    return sent(RecordDict({"arrays": ArrayRecord(nearby(start(), node)), **records}), node)


COUNTED = MetricRecord({"num-examples": 10, "list": [1.0, 2.0]})
COLLIDING: dict[str, dict[str, Any]] = {
    "list-as-a-name": {"metrics": MetricRecord({"num-examples": 10, "list[2]": 1.0})},
    "record-as-a-name": {"metrics": COUNTED, "more": MetricRecord({"ConfigRecord": 1.0})},
    "two-records": {"metrics": COUNTED, "more": MetricRecord({"other": 1.0})},
    "no-list": {"metrics": MetricRecord({"num-examples": 10, "list": 1.0})},
}


@pytest.mark.parametrize("align", [WeightMatching(), WeightMatching(to="global")], ids=str)
@pytest.mark.parametrize("position", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("case", COLLIDING)
def test_records_that_look_alike_do_not_end_a_round(
    case: str, position: int, align: WeightMatching
) -> None:
    replies = [replied(node, metrics=COUNTED) for node in (1, 2)]
    replies.insert(position, replied(7, **COLLIDING[case]))
    arrays, metrics = a_round(averaging(align=align), start(), replies)
    assert arrays is not None
    assert metrics is not None
    assert metrics["list"] == pytest.approx([1.0, 2.0])


class TakesOne(FedAvg):
    """Like Krum: the aggregate is one client's model."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        (reply,) = replies
        return reply.content["arrays"], MetricRecord({})


@pytest.mark.parametrize("dtype", ["", "float32"])
@pytest.mark.parametrize("shaped", [False, True])
def test_an_array_may_declare_no_dtype_and_no_shape(dtype: str, shaped: bool) -> None:
    """Its payload has both."""
    strategy = strategy_for(NET, TakesOne(), finish=[])
    reply = replied(1, metrics=COUNTED)
    record = reply.content["arrays"]
    for key, array in list(record.items()):
        if array.dtype == "float32":
            shape = tuple(array.shape) if shaped else ()
            record[key] = Array(dtype=dtype, shape=shape, stype=array.stype, data=array.data)
    arrays, _ = a_round(strategy, start(), [reply])
    assert arrays is not None
    for key, array in ArrayRecord(start()).items():
        assert (arrays[key].dtype, tuple(arrays[key].shape)) == (array.dtype, tuple(array.shape))
    torch.testing.assert_close(tensors(arrays), nearby(start(), 1))


@pytest.mark.parametrize("align", [WeightMatching(), WeightMatching(to="global")], ids=str)
def test_a_rejected_aggregate_does_not_change_the_state_of_the_strategy(
    align: WeightMatching,
) -> None:
    def with_momentum() -> ReBasinStrategy:
        inner = FedAvgM(server_momentum=0.9, server_learning_rate=2.0)
        return strategy_for(NET, inner, align=align, finish=[])

    strategy = with_momentum()
    huge = {k: v * 0 - 3e38 if v.is_floating_point() else v for k, v in start().items()}
    heavy = replies_of({7: huge}, {7: 1e15}, loss=0.5)
    arrays, _ = a_round(strategy, start(), [valid(1), *heavy, valid(2)])
    assert arrays is None
    arrays, _ = a_round(strategy, start(), [valid(1), valid(2)])
    fresh, _ = a_round(with_momentum(), start(), [valid(1), valid(2)])
    assert arrays == fresh


@pytest.mark.parametrize("align", [WeightMatching(), WeightMatching(to="global")], ids=str)
def test_huge_values_of_a_float64_model_are_dropped(
    align: WeightMatching, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    state = {key: value.detach().clone() for key, value in net.state_dict().items()}
    strategy = ReBasinStrategy(
        FedAvg(), model=net, example_inputs=torch.zeros(1, 3, dtype=torch.float64), align=align
    )
    huge = {key: value * 0 + 1e308 for key, value in state.items()}
    arrays, _ = a_round(strategy, state, replies_of({1: state, 7: huge, 2: state}))
    for key, value in tensors(arrays).items():
        torch.testing.assert_close(value, state[key])
    (line,) = dropped(caplog)
    assert "0.weight holds values beyond 1e+60" in line


def test_log_lines_that_quote_a_client_are_short_and_printable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    odd = valid(7).content
    odd["arrays"]["x" * 10**6 + "\x1b[2J"] = Array(np.zeros(1, np.float32))
    old = odd["arrays"]["0.weight"]
    a_round(averaging(), start(), [valid(1), sent(odd)])
    named = valid(7).content
    name = ",".join(["f4"] * 10**5)
    named["arrays"]["0.weight"] = Array(name, old.shape, old.stype, old.data)
    a_round(averaging(), start(), [valid(1), sent(named)])
    first, second = dropped(caplog)
    assert len(first) < 400
    assert first.isprintable()
    assert "it declares a dtype of 299999 characters" in second


# --- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", [WeightMatching(), WeightMatching(to="global")], ids=str)
def test_too_few_valid_replies_leave_the_model_unchanged(
    align: WeightMatching, caplog: pytest.LogCaptureFixture
) -> None:
    bad = sent(RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord({"num-examples": 1})}))
    strategy = averaging(limits=Limits(min_replies=3), align=align)
    assert a_round(strategy, start(), [valid(1), bad, valid(2)]) == (None, None)
    assert "round 1: 2 valid replies, 3 are needed: the global model stays unchanged" in caplog.text
    arrays, metrics = a_round(strategy, start(), [valid(1), bad, valid(2), valid(3)])
    assert arrays is not None
    assert metrics is not None
    assert metrics["rebasin-dropped"] == 1


def test_the_limit_on_examples_can_be_set(caplog: pytest.LogCaptureFixture) -> None:
    replies = replies_of({node: nearby(start(), node) for node in (1, 2)}, {1: 500, 2: 501})
    arrays, metrics = a_round(averaging(limits=Limits(max_examples=500)), start(), replies)
    alone, _ = a_round(averaging(limits=Limits(max_examples=500)), start(), replies[:1])
    assert arrays == alone
    assert metrics is not None
    assert metrics["rebasin-dropped"] == 1
    assert "reply of node 2 dropped: num-examples is 501, it must be" in caplog.text


@pytest.mark.parametrize("align", [WeightMatching(), WeightMatching(to="global")], ids=str)
def test_an_update_beyond_the_norm_is_dropped_and_a_permuted_one_is_not(
    align: WeightMatching, caplog: pytest.LogCaptureFixture
) -> None:
    model, spec = start(), named_spec(NET)
    shuffle = spec.random(torch.Generator().manual_seed(1))
    far = {k: v + 1.0 if v.is_floating_point() else v for k, v in nearby(model, 3).items()}
    states = {1: nearby(model, 1), 2: spec.apply(shuffle, nearby(model, 2)), 3: far}
    numbers = [v.double() - model[k].double() for k, v in far.items() if v.is_floating_point()]
    norm = float(torch.cat([each.flatten() for each in numbers]).norm())
    strategy = averaging(limits=Limits(max_update_norm=1.0), align=align)
    arrays, metrics = a_round(strategy, model, replies_of(states))
    expected, _ = a_round(strategy, model, replies_of({1: states[1], 2: states[2]}))
    assert metrics is not None
    assert metrics["rebasin-dropped"] == 1
    for key, value in tensors(arrays).items():
        torch.testing.assert_close(value, tensors(expected)[key])
    line = re.search(r"node 3 dropped: its update has norm (at least )?([\d.]+), at", caplog.text)
    assert line is not None
    # Joint alignment drops it before it aligns anything: the tensors' norms show the distance.
    assert (line[1] is not None) == (align.to == "others")
    assert 1 < float(line[2]) <= norm if line[1] else line[2] == f"{norm:.4g}"
    wider = averaging(limits=Limits(max_update_norm=1.01 * norm), align=align)
    kept, _ = a_round(wider, model, replies_of(states))
    assert kept is not None
    assert not torch.equal(tensors(kept)["0.weight"], tensors(expected)["0.weight"])


def test_a_huge_update_beyond_the_norm_does_not_affect_how_others_are_aligned() -> None:
    model, spec = start(), named_spec(NET)
    shuffle = spec.random(torch.Generator().manual_seed(1))
    states = {1: nearby(model, 1), 2: spec.apply(shuffle, nearby(model, 2))}
    # All its units are the same: a model matched to it would not be permuted.
    same = {
        key: torch.full_like(value, 1e6) if value.is_floating_point() else value
        for key, value in model.items()
    }
    strategy = averaging(limits=Limits(max_update_norm=1.0))
    expected, _ = a_round(strategy, model, replies_of(states))
    arrays, metrics = a_round(strategy, model, replies_of({**states, 3: same}))
    assert metrics is not None
    assert metrics["rebasin-dropped"] == 1
    assert arrays == expected


def test_an_aggregate_that_is_not_finite_is_rejected(caplog: pytest.LogCaptureFixture) -> None:
    class Overflowing(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert arrays is not None
            arrays["8.bias"] = Array(np.full(4, np.inf, np.float32))
            return arrays, metrics

    arrays, _ = a_round(strategy_for(NET, Overflowing(), finish=[]), start(), [valid(1), valid(2)])
    assert arrays is None
    assert "round 1: the aggregated model holds NaN or infinite values" in caplog.text


INVALID_EVALUATIONS: dict[str, tuple[RecordDict, str]] = {
    "no-weight": (RecordDict({"metrics": MetricRecord({"accuracy": 0.5})}), "with one number"),
    "negative": (
        RecordDict({"metrics": MetricRecord({"num-examples": -4, "accuracy": 0.5})}),
        "num-examples is -4",
    ),
    "nan": (
        RecordDict({"metrics": MetricRecord({"num-examples": 4, "accuracy": float("nan")})}),
        "its metric 'accuracy' is NaN or infinite",
    ),
    "infinite-list": (
        RecordDict({"metrics": MetricRecord({"num-examples": 4, "accuracy": [0.5, float("inf")]})}),
        "its metric 'accuracy' is NaN or infinite",
    ),
    "beyond-floats": (
        RecordDict({"metrics": MetricRecord({"num-examples": 4, "accuracy": 10**400})}),
        "its metric 'accuracy' is too large for a float",
    ),
    "empty": (RecordDict(), "with one number"),
    "other-metrics": (
        RecordDict({"metrics": MetricRecord({"num-examples": 4, "loss": 0.5})}),
        "its records differ from those of most replies",
    ),
    "other-record": (
        RecordDict({"results": MetricRecord({"num-examples": 4, "accuracy": 0.5})}),
        "its records differ from those of most replies",
    ),
}


@pytest.mark.parametrize("case", INVALID_EVALUATIONS)
def test_invalid_evaluations_are_dropped_and_logged(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    def evaluation(node: int, content: RecordDict) -> Message:
        question = Message(RecordDict(), dst_node_id=node, message_type="evaluate")
        return Message(content, reply_to=question)

    content, words = INVALID_EVALUATIONS[case]
    replies = [
        evaluation(
            node, RecordDict({"metrics": MetricRecord({"num-examples": n, "accuracy": accuracy})})
        )
        for node, n, accuracy in ((1, 10, 0.5), (2, 30, 0.9))
    ]
    metrics = averaging().aggregate_evaluate(1, [replies[0], evaluation(7, content), replies[1]])
    assert metrics is not None
    assert dict(metrics) == pytest.approx({"accuracy": 0.8})
    (line,) = dropped(caplog)
    assert line.startswith("reply of node 7 dropped: ")
    assert words in line


# --- robust strategies -------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def trained(state: State, images: Tensor, labels: Tensor, epochs: int, seed: int) -> State:
    model = mlp()
    model.load_state_dict(state)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(25):
            optimiser.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimiser.step()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.data[order] / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(data.target[order])
    return images[:1300], labels[:1300], images[1300:], labels[1300:]


@cache
def honest() -> tuple[State, dict[int, State]]:
    """A trained global model, and ten clients that trained it further."""
    images, labels, _, _ = digits()
    torch.manual_seed(0)
    model = trained(dict(mlp().state_dict()), images[:300], labels[:300], 10, 0)
    return model, {
        node: trained(
            model, images[100 + 120 * place :][:120], labels[100 + 120 * place :][:120], 8, node
        )
        for place, node in enumerate(range(1, 11))
    }


def accuracy(state: State) -> float:
    _, _, images, labels = digits()
    model = mlp()
    model.load_state_dict(state)
    return float((model(images).argmax(1) == labels).double().mean())


@cache
def spec() -> PermutationSpec:
    return derive_spec(mlp(), torch.zeros(1, 64))


def shuffled(state: State, seed: int) -> State:
    return spec().apply(spec().random(torch.Generator().manual_seed(seed)), state)


def noise(state: State, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in state.items()}


ATTACKS: dict[str, Callable[[State, int], State]] = {
    "random": noise,
    "sign-flipped": lambda state, seed: {key: -value for key, value in state.items()},
    "scaled": lambda state, seed: {key: 100 * value for key, value in state.items()},
    "boosted": lambda state, seed: {
        key: honest()[0][key] + 100 * (value - honest()[0][key]) for key, value in state.items()
    },
    "permuted": shuffled,
    "permuted-and-flipped": lambda state, seed: {
        key: -value for key, value in shuffled(state, seed).items()
    },
}
ROBUST: dict[str, Callable[[], Strategy]] = {
    "FedMedian": FedMedian,
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.2),
    "Krum": lambda: Krum(num_malicious_nodes=2),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5),
}
ATTACKERS = (2, 9)


@cache
def robust_strategy(inner: str, **options: Any) -> ReBasinStrategy:
    # These strategies have no state, so one of each is enough.
    return ReBasinStrategy(
        ROBUST[inner](), model=mlp(), example_inputs=torch.zeros(1, 64), **options
    )


def robust(inner: str, align: WeightMatching, states: dict[int, State]) -> State:
    arrays, _ = a_round(robust_strategy(inner, align=align), honest()[0], replies_of(states))
    return tensors(arrays)


@cache
def honest_accuracy(inner: str, align: WeightMatching) -> float:
    return accuracy(robust(inner, align, honest()[1]))


@pytest.mark.parametrize("align", [WeightMatching(), WeightMatching(to="global")], ids=str)
@pytest.mark.parametrize("inner", ROBUST)
@pytest.mark.parametrize("attack", ATTACKS)
def test_two_of_ten_clients_cannot_harm_a_robust_aggregate(
    attack: str, inner: str, align: WeightMatching
) -> None:
    states = {
        node: ATTACKS[attack](state, node) if node in ATTACKERS else state
        for node, state in honest()[1].items()
    }
    reached = accuracy(robust(inner, align, states))
    assert honest_accuracy(inner, align) > 0.85
    assert reached >= honest_accuracy(inner, align) - 0.02


@pytest.mark.parametrize("align", [WeightMatching(), WeightMatching(to="global")], ids=str)
@pytest.mark.parametrize("inner", ROBUST)
def test_permuted_honest_models_are_aligned_rather_than_rejected(
    inner: str, align: WeightMatching
) -> None:
    """All ten clients permute their units, so a robust aggregate alone could not help."""
    states = {node: shuffled(state, node) for node, state in honest()[1].items()}
    found, wanted = robust(inner, align, states), robust(inner, align, honest()[1])
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    # Without alignment the aggregate is much worse.
    arrays, _ = a_round(robust_strategy(inner, align=None), honest()[0], replies_of(states))
    if inner != "Krum":  # It selects one model, which still computes the same function.
        assert accuracy(tensors(arrays)) < accuracy(wanted) - 0.1
