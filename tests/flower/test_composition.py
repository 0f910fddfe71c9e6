"""With every strategy: permuted replies give what the strategy alone computes from plain ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from federation import Federation, one_round, replies_of, strategy_for, tensors
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)
from helpers import State, assert_same, named_spec, nearby, random_state
from zoo import ZOO

CLIENTS = 5
WEIGHTS = dict(enumerate((3, 5, 4, 6, 2), start=1))
LOSSES = dict(enumerate((0.5, 0.9, 0.2, 0.4, 1.5), start=1))
OWN_METRICS = {
    "rebasin-margin",
    "rebasin-similarity-before",
    "rebasin-similarity-after",
    "rebasin-units-moved",
    "rebasin-sweeps",
    "rebasin-seconds",
    "rebasin-dropped",
}
NORM_BITS = dict(enumerate((1, 0, 1, 1, 0), start=1))

INNER: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedProx": lambda: FedProx(proximal_mu=0.1),
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    "FedAdagrad": lambda: FedAdagrad(eta=0.01),
    "FedAdam": lambda: FedAdam(eta=0.01, beta_1=0.9, beta_2=0.99),
    "FedYogi": lambda: FedYogi(eta=0.01, beta_1=0.9, beta_2=0.99),
    "FedMedian": FedMedian,
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.25),
    "Krum": lambda: Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
}
NOISE = 0.05
CLIPPING: dict[str, Callable[[Strategy], Strategy]] = {
    "server-fixed": lambda inner: DifferentialPrivacyServerSideFixedClipping(
        inner, NOISE, clipping_norm=0.01, num_sampled_clients=CLIENTS
    ),
    "server-adaptive": lambda inner: DifferentialPrivacyServerSideAdaptiveClipping(
        inner, NOISE, num_sampled_clients=CLIENTS, initial_clipping_norm=0.01
    ),
    "client-fixed": lambda inner: DifferentialPrivacyClientSideFixedClipping(
        inner, NOISE, clipping_norm=0.01, num_sampled_clients=CLIENTS
    ),
    "client-adaptive": lambda inner: DifferentialPrivacyClientSideAdaptiveClipping(
        inner, NOISE, num_sampled_clients=CLIENTS, initial_clipping_norm=0.01
    ),
}


def aligning(name: str) -> Callable[[Strategy], Strategy]:
    """Wrap another strategy in one that aligns."""
    return lambda inner: strategy_for(name, inner, finish=[])


@dataclass(frozen=True)
class Pair:
    """A strategy, and the same strategy with alignment."""

    plain: Callable[[], Strategy]
    aligned: Callable[[Callable[[Strategy], Strategy]], Strategy]


def around(inner: Callable[[], Strategy]) -> Pair:
    """Alignment first, then the whole strategy."""
    return Pair(inner, lambda align: align(inner()))


def inside(clip: Callable[[Strategy], Strategy], inner: Callable[[], Strategy]) -> Pair:
    """The wrapper outermost, alignment between it and the strategy that aggregates."""
    return Pair(lambda: clip(inner()), lambda align: clip(align(inner())))


PLAIN = {name: around(inner) for name, inner in INNER.items()}
PRIVATE = {
    # Alignment comes before clipping on the server: without it, updates only seem large.
    **{
        f"{name}({inner})": around(lambda clip=clip, inner=inner: clip(INNER[inner]()))
        for name, clip in CLIPPING.items()
        for inner in ("FedAvg", "FedAvgM")
    },
    "server-fixed(server-adaptive(FedAdam))": around(
        lambda: CLIPPING["server-fixed"](CLIPPING["server-adaptive"](INNER["FedAdam"]()))
    ),
    # The clients have clipped their updates already: only noise is left to add.
    **{
        f"{name}(ReBasin({inner}))": inside(CLIPPING[name], INNER[inner])
        for name in ("client-fixed", "client-adaptive")
        for inner in ("FedAvg", "FedAdam")
    },
}
WITH_NORM = "residual-batchnorm"
# Integer buffers are averaged as well, but would dominate the norm of a clipped update.
CASES = {
    **{f"mlp-{name}": ("mlp", pair) for name, pair in {**PLAIN, **PRIVATE}.items()},
    **{
        f"{WITH_NORM}-{name}": (WITH_NORM, pair)
        for name, pair in PLAIN.items()
        if name not in ("FedAdagrad", "FedYogi")
    },
}


def neighbours(model: State, server_round: int) -> dict[int, State]:
    # The clients' updates differ, so that a median is not a mean and Krum has a choice.
    return {
        node_id: nearby(model, 10 * server_round + node_id, scale=1e-3 * (1 + node_id % 3))
        for node_id in WEIGHTS
    }


def shuffled(name: str, states: dict[int, State], seed: int) -> dict[int, State]:
    spec, generator = named_spec(name), torch.Generator().manual_seed(seed)
    return {node_id: spec.apply(spec.random(generator), state) for node_id, state in states.items()}


def aggregated(
    strategy: Strategy, model: State | ArrayRecord, states: dict[int, State], server_round: int
) -> tuple[ArrayRecord, MetricRecord]:
    np.random.seed(server_round)  # Flower draws its noise from this generator.
    # Some strategies empty the replies they are given: each strategy gets its own.
    replies = replies_of(states, WEIGHTS, loss=LOSSES, norm_bit=NORM_BITS)
    world = Federation(dict.fromkeys(WEIGHTS))
    arrays, metrics = one_round(strategy, world, model, replies, server_round)
    assert world.sent == []
    assert arrays is not None
    assert metrics is not None
    return arrays, metrics


def as_model(state: State, model: State) -> State:
    """Convert to the dtypes of a model: Flower averages integers to floats."""
    return {
        key: (value if model[key].is_floating_point() else value.round()).to(model[key].dtype)
        for key, value in state.items()
    }


def distance(left: State, right: State) -> float:
    """Relative distance over the floating tensors."""
    keys = [key for key, value in right.items() if value.is_floating_point()]
    gap = sum(float((left[key] - right[key]).double().square().sum()) for key in keys)
    return (gap / sum(float(right[key].double().square().sum()) for key in keys)) ** 0.5


def assert_alignment_matters(net: str, pair: Pair, model: State) -> None:
    """Without alignment, permuted replies give another model than plain ones."""
    states = neighbours(model, 1)
    expected, _ = aggregated(pair.plain(), model, states, 1)
    unaligned, _ = aggregated(pair.plain(), model, shuffled(net, states, 1), 1)
    assert distance(tensors(unaligned), tensors(expected)) > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_permuted_replies_give_what_plain_ones_give_round_after_round(case: str) -> None:
    # Momentum follows the unit order of the global model: only a second round tests it.
    net, pair = CASES[case]
    plain, aligned = pair.plain(), pair.aligned(aligning(net))
    model = random_state(ZOO[net], 0)
    assert_alignment_matters(net, pair, model)
    for server_round in (1, 2):
        states = neighbours(model, server_round)
        moved = shuffled(net, states, server_round)
        expected, expected_metrics = aggregated(plain, model, states, server_round)
        result, metrics = aggregated(aligned, model, moved, server_round)
        wanted = as_model(tensors(expected), model)
        assert list(result) == list(model)
        assert_same(tensors(result), wanted, rtol=1e-5, atol=1e-5)
        assert metrics["loss"] == pytest.approx(expected_metrics["loss"])
        assert metrics["rebasin-units-moved"] > 0
        model = wanted


# With FedAdam inside, noise is added to values that are float32 already, not float64.
BITWISE = {
    name: pair for name, pair in {**PLAIN, **PRIVATE}.items() if "ReBasin(FedAdam)" not in name
}


@pytest.mark.parametrize("name", BITWISE)
def test_plain_replies_give_bitwise_the_same_model_round_after_round(name: str) -> None:
    net = "mlp"
    pair = BITWISE[name]
    plain, aligned = pair.plain(), pair.aligned(aligning(net))
    model = ArrayRecord(random_state(ZOO[net], 0))
    for server_round in (1, 2):
        states = neighbours(tensors(model), server_round)
        expected, expected_metrics = aggregated(plain, model, states, server_round)
        result, metrics = aggregated(aligned, model, states, server_round)
        assert list(result) == list(expected) == list(model)
        for key, array in expected.items():
            assert result[key].numpy().dtype == np.float32
            # FedAdam and its relatives return float64, which is cast to the model's dtype.
            wanted = array.numpy().astype(np.float32)
            assert result[key].numpy().tobytes() == wanted.tobytes(), key
        assert metrics["rebasin-units-moved"] == 0
        assert dict(metrics) == {**metrics, **expected_metrics}
        model = result


@pytest.mark.parametrize("clip", ["server-fixed", "server-adaptive"])
def test_server_side_clipping_may_be_outermost_if_it_has_nothing_to_clip(clip: str) -> None:
    net = WITH_NORM
    wide: dict[str, Callable[[Strategy], Strategy]] = {
        "server-fixed": lambda inner: DifferentialPrivacyServerSideFixedClipping(
            inner, 0.0, clipping_norm=1e6, num_sampled_clients=CLIENTS
        ),
        "server-adaptive": lambda inner: DifferentialPrivacyServerSideAdaptiveClipping(
            inner, 0.0, num_sampled_clients=CLIENTS, initial_clipping_norm=1e6
        ),
    }
    pair = inside(wide[clip], FedAvg)
    model = random_state(ZOO[net], 0)
    states = neighbours(model, 1)
    expected, expected_metrics = aggregated(pair.plain(), model, states, 1)
    moved = shuffled(net, states, 1)
    result, metrics = aggregated(pair.aligned(aligning(net)), model, moved, 1)
    wanted = as_model(tensors(expected), model)
    assert_same(as_model(tensors(result), model), wanted, rtol=1e-5, atol=1e-5)
    assert metrics["rebasin-units-moved"] > 0
    assert metrics.keys() - expected_metrics.keys() == OWN_METRICS


def test_the_configuration_of_every_wrapped_strategy_reaches_the_clients() -> None:
    inner = CLIPPING["client-fixed"](FedProx(proximal_mu=0.1, fraction_train=1.0))
    strategy = aligning("mlp")(inner)
    model = ArrayRecord(random_state(ZOO["mlp"], 0))
    grid = Federation(dict.fromkeys(WEIGHTS)).grid
    messages = list(strategy.configure_train(1, model, ConfigRecord({"lr": 0.1}), grid))
    assert {message.metadata.dst_node_id for message in messages} == WEIGHTS.keys()
    for message in messages:
        config = message.content.config_records["config"]
        assert config["proximal-mu"] == 0.1
        assert config["clipping_norm"] == 0.01
        assert config["lr"] == 0.1
