"""Laws of the guard: the best candidate wins, the wrapped strategy keeps that one's memory."""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from federation import (
    ODD_NODE,
    Aggregate,
    Answer,
    Federation,
    batches_of,
    changing,
    client,
    dropped,
    failing,
    one_round,
    prepare,
    replies_of,
    tensors,
)
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    Strategy,
)
from helpers import State, assert_same, random_state
from torch.nn import functional as F
from zoo import ZOO

from fl_rebasin.flower import BatchNormRecalibration, ReBasinStrategy, add_guard_handler
from fl_rebasin.flower.guard import _mean_loss
from fl_rebasin.matching.many import align_many
from fl_rebasin.merging.heads import class_aware_head, without_label_prior
from fl_rebasin.merging.least_squares import fit_least_squares
from fl_rebasin.merging.merge_many import merge_many
from fl_rebasin.state_dicts import average

NET = "mlp"
WITH_NORM = "conv-batchnorm-flatten"
CLASSES = 4
WEIGHTS = {1: 10.0, 2: 40.0, ODD_NODE: 20.0}
NAMES = ("aligned", "naive", "reference")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


def guarded(inner: Strategy | None = None, name: str = NET, **options: Any) -> ReBasinStrategy:
    return ReBasinStrategy(
        inner, model=ZOO[name].build(), example_inputs=ZOO[name].inputs(), guard=True, **options
    )


@cache
def strategy_for(name: str = NET) -> ReBasinStrategy:
    """FedAvg has no memory: one strategy serves many tests."""
    return guarded(name=name, recalibrate_batchnorm=False)


@cache
def strangers(name: str = NET) -> dict[int, State]:
    return {node_id: random_state(ZOO[name], seed) for seed, node_id in enumerate(WEIGHTS, start=7)}


def held_back(node_id: int, name: str = NET) -> list[Any]:
    shape = ZOO[name].inputs().shape[1:]
    return batches_of(shape, [6, 2 + node_id % 5], seed=node_id % 6, classes=CLASSES)


def judging(count: Any, losses: Any) -> Answer:
    """A client that answers the guard with these numbers."""
    app = ClientApp()

    @app.query("rebasin_guard")
    def evaluate(message: Message, context: Context) -> Message:
        metrics = {"num-examples": count, "loss": losses}
        return Message(RecordDict({"scores": MetricRecord(metrics)}), reply_to=message)

    return app


def choosing(best: int, candidates: int = 3) -> Federation:
    """A federation that finds one candidate best."""
    losses = [1.0 + (place != best) for place in range(candidates)]
    return Federation({node_id: judging(5, losses) for node_id in WEIGHTS})


def run_round(
    strategy: Strategy,
    world: Federation,
    name: str = NET,
    gauge: State | None = None,
    states: Mapping[int, State] | None = None,
    server_round: int = 1,
    **metrics: Any,
) -> tuple[State, MetricRecord]:
    gauge = random_state(ZOO[name], 0) if gauge is None else gauge
    states = strangers(name) if states is None else states
    replies = replies_of(states, {key: WEIGHTS[key] for key in states}, **metrics)
    result, own = one_round(strategy, world, gauge, replies, server_round)
    assert own is not None
    return tensors(result), own


def offered(world: Federation) -> list[State]:
    """The candidates that the clients got to see; all of them the same."""
    messages = [
        message for message in world.sent if message.metadata.message_type == "query.rebasin_guard"
    ]
    found = [
        [tensors(record) for record in message.content.array_records.values()]
        for message in messages
    ]
    for others in found[1:]:
        for left, right in zip(found[0], others, strict=True):
            assert_same(left, right, rtol=0, atol=0)
    return found[0]


def candidates(name: str = NET, gauge: State | None = None) -> dict[str, list[State]]:
    """The models that each candidate averages, found in one place."""
    models, weights = list(strangers(name).values()), list(WEIGHTS.values())
    gauge = random_state(ZOO[name], 0) if gauge is None else gauge
    spec = strategy_for(name).spec
    found = {
        "aligned": merge_many(spec, models, weights, unit_order_of=gauge).permutations,
        "naive": [spec.identity()] * 3,
        "reference": align_many(
            spec, models, weights, unit_order_of=gauge, method="reference"
        ).permutations,
    }
    return {
        candidate: [spec.apply(*pair) for pair in zip(orders, models, strict=True)]
        for candidate, orders in found.items()
    }


# What there is to choose from


@pytest.mark.parametrize("name", [NET, WITH_NORM])
def test_candidates_are_the_aligned_the_naive_and_the_one_in_the_heaviests_order(name: str) -> None:
    world = choosing(0)
    _, metrics = run_round(strategy_for(name), world, name)
    models = offered(world)
    assert len(models) == 3
    for (_, aligned), model in zip(candidates(name).items(), models, strict=True):
        assert_same(model, average(aligned, list(WEIGHTS.values())), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(models[0]["1.weight" if name == NET else "0.weight"],
                              models[2]["1.weight" if name == NET else "0.weight"])  # fmt: skip
    assert [key for key in metrics if key.startswith("guard-loss-")] == [
        f"guard-loss-{candidate}" for candidate in NAMES
    ]


def test_two_clients_have_no_third_candidate() -> None:
    world = choosing(0, candidates=2)
    states = {node_id: strangers()[node_id] for node_id in (1, 2)}
    _, metrics = run_round(strategy_for(), world, states=states)
    assert len(offered(world)) == 2
    assert metrics["guard-clients"] == 2
    assert "guard-loss-reference" not in metrics


def test_least_squares_and_heads_are_tried_on_each() -> None:
    data = {node_id: batches_of((3, 2, 2), [30], seed=node_id % 6) for node_id in WEIGHTS}
    counts = {1: [9, 0, 1, 5], 2: [0, 3, 20, 1], ODD_NODE: [1, 1, 1, 0]}
    apps = {
        node_id: client(ZOO[NET].build, data[node_id], held_back(node_id)) for node_id in WEIGHTS
    }
    world = Federation(dict(apps))
    strategy = guarded(least_squares="layerwise", label_counts="labels")
    _, metrics = run_round(strategy, world, labels=counts)
    variants = ("", "+heads", "+lsq")
    names = [candidate + variant for candidate in NAMES for variant in variants]
    assert [key for key in metrics if key.startswith("guard-loss-")] == [
        f"guard-loss-{name}" for name in names
    ]
    models = dict(zip(names, offered(world), strict=True))
    tables = [torch.tensor(each) for each in counts.values()]
    everybody = sum(tables)
    for candidate, aligned in candidates().items():
        plain = average(aligned, list(WEIGHTS.values()))
        corrected = [
            without_label_prior(model, own, everybody, "6.bias")
            for model, own in zip(aligned, tables, strict=True)
        ]
        expected = {
            "": plain,
            "+heads": class_aware_head(plain, aligned, tables, "6.weight", "6.bias"),
            "+lsq": fit_least_squares(ZOO[NET].build(), plain, corrected, list(data.values())),
        }
        for variant, model in expected.items():
            assert_same(models[candidate + variant], model, rtol=2e-4, atol=2e-5)
    # What was asked three times is added up.
    assert metrics["least-squares-messages"] == 9
    assert metrics["least-squares-bytes"] == world.bytes_of("least_squares")


def test_bad_label_counts_are_named_once_for_all_candidates(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strategy = guarded(least_squares="one-pass", label_counts="labels")
    counts = {1: [9, 0, 1, 5], 2: [0, -3, 20, 1], ODD_NODE: [1, 1, 1, 0]}
    world = Federation(
        {node_id: client(ZOO[NET].build, batches_of((3, 2, 2), [9], seed=1), held_back(node_id))
         for node_id in WEIGHTS}
    )  # fmt: skip
    run_round(strategy, world, labels=counts)
    assert len(offered(world)) == 9
    (line,) = dropped(caplog)
    assert line.startswith("label counts of node 2 dropped: ")


def test_candidates_have_batchnorm_statistics_of_their_own() -> None:
    data = {
        node_id: batches_of(ZOO[WITH_NORM].inputs().shape[1:], [30], seed=node_id % 6)
        for node_id in WEIGHTS
    }
    apps = {
        node_id: client(ZOO[WITH_NORM].build, data[node_id], held_back(node_id, WITH_NORM))
        for node_id in WEIGHTS
    }
    world = Federation(dict(apps))
    _, metrics = run_round(guarded(name=WITH_NORM), world, WITH_NORM)
    assert world.asked("batchnorm") == sorted(3 * list(WEIGHTS))
    assert metrics["batchnorm-bytes"] == world.bytes_of("batchnorm")
    joint = torch.cat([batch for batches in data.values() for batch in batches])
    for model in offered(world):
        seen = F.max_pool2d(F.conv2d(joint, model["0.weight"]), 2)
        torch.testing.assert_close(
            model["2.running_mean"], seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-4
        )


def test_where_nothing_moves_nobody_judges() -> None:
    gauge = random_state(ZOO[NET], 0)
    states = {node_id: {k: v * (1 + 1e-3 * i) for k, v in gauge.items()}
              for i, node_id in enumerate(WEIGHTS)}  # fmt: skip
    world = choosing(1)
    inner = Counting()
    result, metrics = run_round(guarded(inner), world, gauge=gauge, states=states)
    assert world.sent == []
    assert inner.rounds == 1
    assert not any(key.startswith("guard") for key in metrics)
    assert_same(result, average(list(states.values()), list(WEIGHTS.values())), rtol=0, atol=1e-6)


def test_where_nothing_moves_least_squares_are_judged_all_the_same() -> None:
    gauge = random_state(ZOO[NET], 0)
    states = {node_id: {k: v * (1 + 1e-3 * i) for k, v in gauge.items()}
              for i, node_id in enumerate(WEIGHTS)}  # fmt: skip
    data = batches_of((3, 2, 2), [30], seed=3)
    world = Federation(
        {node_id: client(ZOO[NET].build, data, held_back(node_id)) for node_id in WEIGHTS}
    )
    _, metrics = run_round(guarded(least_squares="layerwise"), world, gauge=gauge, states=states)
    assert world.asked("guard") == sorted(WEIGHTS)
    assert [key for key in metrics if key.startswith("guard-loss-")] == [
        "guard-loss-aligned", "guard-loss-aligned+lsq"
    ]  # fmt: skip


# Who wins


VERDICTS: dict[str, tuple[dict[int, tuple[int, list[float]]], str]] = {
    "first": ({1: (5, [1.0, 2.0, 3.0]), 2: (5, [1.0, 2.0, 3.0])}, "aligned"),
    "second": ({1: (5, [2.0, 1.0, 3.0]), 2: (5, [2.0, 1.5, 3.0])}, "naive"),
    "third": ({1: (5, [2.0, 3.0, 1.0]), 2: (5, [2.0, 2.0, 1.0])}, "reference"),
    "all-alike": ({1: (5, [2.0, 2.0, 2.0]), 2: (7, [3.0, 3.0, 3.0])}, "aligned"),
    # Means 2.5, 2.0; by examples 1.3, 2.0.
    "by-examples": ({1: (9, [1.0, 2.0, 9.0]), 2: (1, [4.0, 2.0, 9.0])}, "aligned"),
    "by-other-examples": ({1: (1, [1.0, 2.0, 9.0]), 2: (9, [4.0, 2.0, 9.0])}, "naive"),
    "diverged-on-one": ({1: (1, [NAN, 2.0, 3.0]), 2: (99, [1.0, 2.0, 3.0])}, "naive"),
    "infinite-on-one": ({1: (1, [INF, 2.0, 3.0]), 2: (99, [1.0, 2.0, 3.0])}, "naive"),
    "vast-on-one": ({1: (1, [1e7, 2.0, 3.0]), 2: (10**9, [1.0, 2.0, 3.0])}, "naive"),
    "integers": ({1: (5, [2, 1, 3]), 2: (5, [2, 1, 3])}, "naive"),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
def test_least_example_weighted_loss_wins(case: str) -> None:
    scores, best = VERDICTS[case]
    apps: dict[int, Answer | None] = dict.fromkeys(WEIGHTS)
    apps |= {node_id: judging(*score) for node_id, score in scores.items()}
    world = Federation(apps)
    result, metrics = run_round(strategy_for(), world)
    models = dict(zip(NAMES, offered(world), strict=True))
    assert_same(result, models[best], rtol=0, atol=0)
    assert metrics["guard-clients"] == len(scores)
    total = sum(count for count, _ in scores.values())
    for place, name in enumerate(NAMES):
        found = [losses[place] if losses[place] < 1e6 else INF for _, losses in scores.values()]
        counts = [count for count, _ in scores.values()]
        expected = sum(count * loss for count, loss in zip(counts, found, strict=True)) / total
        assert metrics[f"guard-loss-{name}"] == pytest.approx(expected)


@pytest.mark.parametrize("name", [NET, WITH_NORM])
def test_losses_are_those_of_the_candidates_on_the_data_held_back(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = Federation(
        {node_id: client(ZOO[name].build, (), held_back(node_id, name)) for node_id in WEIGHTS}
    )
    result, metrics = run_round(strategy_for(name), world, name)
    losses = {}
    for candidate, state in zip(NAMES, offered(world), strict=True):
        model = ZOO[name].build().eval()
        model.load_state_dict(state)
        total = 0.0
        for node_id in WEIGHTS:
            inputs, labels = (
                torch.cat(parts) for parts in zip(*held_back(node_id, name), strict=True)
            )
            with torch.no_grad():
                logits = model(inputs)
            total += len(labels) * min(
                float(F.cross_entropy(logits / temperature, labels))
                for temperature in np.sqrt(2) ** np.arange(-6, 9)
            )
        losses[candidate] = total / sum(
            len(labels) for node_id in WEIGHTS for _, labels in held_back(node_id, name)
        )
        assert metrics[f"guard-loss-{candidate}"] == pytest.approx(losses[candidate], rel=1e-5)
    best = min(losses, key=losses.__getitem__)
    assert_same(result, offered(world)[NAMES.index(best)], rtol=0, atol=0)
    assert metrics["guard-bytes"] == world.bytes_of("guard")
    assert re.search(rf"held-back loss of the candidates: aligned .*; {best} is taken", caplog.text)


def test_a_model_that_is_only_surer_of_itself_is_worth_the_same() -> None:
    torch.manual_seed(0)
    net, inputs = ZOO[NET].build(), torch.randn(200, 3, 2, 2)
    with torch.no_grad():
        pairs = [(inputs, torch.softmax(4 * net(inputs), 1).multinomial(1).flatten())]
    surer = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in list(surer.parameters())[-2:]:
            parameter.mul_(2)
    assert _mean_loss(net, pairs) == pytest.approx(_mean_loss(surer, pairs))
    turned = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in list(turned.parameters())[-2:]:
            parameter.copy_(parameter.roll(1, 0))
    assert _mean_loss(net, pairs) != pytest.approx(_mean_loss(turned, pairs))


def test_judging_leaves_the_clients_model_in_its_modes_and_without_gradients() -> None:
    own = ZOO[WITH_NORM].build().train()
    own[3].eval()
    app = ClientApp()
    add_guard_handler(app, lambda context: (own, held_back(1, WITH_NORM)))
    world = Federation(dict.fromkeys(WEIGHTS, app))
    run_round(strategy_for(WITH_NORM), world, WITH_NORM)
    assert [module.training for module in own] == [True, True, True, False, *[True] * 5]
    assert all(parameter.grad is None for parameter in own.parameters())
    # Evaluation changes no statistics: they are those of the last candidate.
    assert_same(dict(own.state_dict()), offered(world)[-1], rtol=0, atol=0)


# Scores that are no good


def scores(**changed: Any) -> Answer:
    good = {"num-examples": 1000, "loss": [9.0, 1.0, 9.0]}

    def change(content: RecordDict) -> None:
        kept = {**good, **{key.replace("_", "-"): value for key, value in changed.items()}}
        content["scores"] = MetricRecord({k: v for k, v in kept.items() if v is not None})

    return changing(judging(1, [1.0]), "guard", change)


BAD: dict[str, tuple[Answer | None, str]] = {
    "no-handler": (ClientApp(), "No query function registered"),
    "failing": (failing, "disk is full"),
    "silent": (None, "no answer"),
    "zero-count": (scores(num_examples=0), "0 is no number of examples"),
    "negative-count": (scores(num_examples=-3), "-3 is no number of examples"),
    "huge-count": (scores(num_examples=10**16), "10000000000000000 is no number of examples"),
    "vast-count": (scores(num_examples=10**400), "10000000000000000000 is no number"),
    "float-count": (scores(num_examples=5.0), r"5\.0 is no number of examples"),
    "nan-count": (scores(num_examples=NAN), "nan is no number of examples"),
    "list-of-counts": (scores(num_examples=[5]), r"\[5\] is no number of examples"),
    "bool-count": (judging(True, [9.0, 1.0, 9.0]), "Not all values are of valid type"),
    "no-count": (scores(num_examples=None), "'num-examples' is missing"),
    "no-losses": (scores(loss=None), "'loss' is missing"),
    "one-loss": (scores(loss=1.0), "3 losses were asked for"),
    "two-losses": (scores(loss=[9.0, 1.0]), "3 losses were asked for"),
    "four-losses": (scores(loss=[9.0, 1.0, 9.0, 9.0]), "3 losses were asked for"),
    "empty-losses": (scores(loss=[]), "3 losses were asked for"),
    "negative-loss": (scores(loss=[9.0, -1.0, 9.0]), r"a loss of -1\.0 is impossible"),
    "minus-infinite": (scores(loss=[9.0, -INF, 9.0]), "a loss of -inf is impossible"),
    "all-nan": (scores(loss=[NAN, NAN, NAN]), "none of its losses is finite"),
    "all-infinite": (scores(loss=[INF, NAN, 1e300]), "none of its losses is finite"),
    "beyond-floats": (scores(loss=[9, 10**400, 9]), "too large"),
    "bools": (judging(5, [True, False, True]), "valid type"),
    "no-record": (
        changing(judging(1, [1.0]), "guard", lambda content: content.pop("scores")),
        "'scores' is missing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_scores_are_dropped_and_named(case: str, caplog: pytest.LogCaptureFixture) -> None:
    odd, words = BAD[case]
    world = choosing(2)
    world.apps[ODD_NODE] = odd
    result, metrics = run_round(strategy_for(), world)
    assert_same(result, offered(world)[2], rtol=0, atol=0)
    assert metrics["guard-clients"] == 2
    assert metrics["guard-loss-naive"] == 2
    (line,) = dropped(caplog)
    assert re.match(rf"evaluation of candidates of node {ODD_NODE} dropped: .*{words}", line), line


def test_scores_of_the_table_would_decide_if_they_were_good() -> None:
    world = choosing(2)
    world.apps[ODD_NODE] = scores()
    result, metrics = run_round(strategy_for(), world)
    assert metrics["guard-clients"] == 3
    assert_same(result, offered(world)[1], rtol=0, atol=0)


def test_nobody_judges_and_the_first_is_taken_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = Federation({1: None, 2: failing, ODD_NODE: ClientApp()})
    result, metrics = run_round(strategy_for(), world)
    assert_same(result, offered(world)[0], rtol=0, atol=0)
    assert metrics["guard-clients"] == 0
    assert not any(key.startswith("guard-loss") for key in metrics)
    assert len(dropped(caplog)) == 3
    (line,) = [record for record in caplog.records if "no client judged" in record.getMessage()]
    assert line.levelno == logging.WARNING
    assert line.getMessage() == "no client judged the candidates: aligned is taken"


# The wrapped strategy and its memory


class Counting(FedAvg):
    """Remembers how often it has aggregated, and tells all its copies together."""

    calls: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.rounds = 0
        self.log = logging.getLogger("flwr")

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        self.rounds += 1
        type(self).calls.append(self.rounds)
        return super().aggregate_train(server_round, replies)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    Counting.calls = []


def test_each_candidate_is_aggregated_once_from_the_same_memory() -> None:
    inner = Counting()
    strategy = guarded(inner)
    for server_round in (1, 2, 3):
        run_round(strategy, choosing(server_round % 3), server_round=server_round)
        assert strategy.strategy is inner
        assert inner.rounds == server_round
    assert Counting.calls == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def adaptive(inner: Strategy) -> Strategy:
    return DifferentialPrivacyServerSideAdaptiveClipping(
        inner, 0.0, num_sampled_clients=3, initial_clipping_norm=2.0
    )


INNER: dict[str, Callable[[], Strategy]] = {
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    "FedAdam": lambda: FedAdam(eta=0.05, beta_1=0.9, beta_2=0.99),
    "clipping": lambda: adaptive(FedAvg()),
    "clipping-FedAdam": lambda: adaptive(FedAdam(eta=0.05, beta_1=0.9, beta_2=0.99)),
    "clipping-clipping-FedAvgM": lambda: adaptive(adaptive(FedAvgM(server_momentum=0.9))),
}
MEMORY = ("momentum_vector", "current_arrays", "m_t", "v_t", "clipping_norm")


def levels(strategy: Strategy) -> list[Strategy]:
    found = [strategy]
    while isinstance(inner := getattr(found[-1], "strategy", None), Strategy):
        found.append(inner)
    return found


def memory(strategy: Strategy) -> list[np.ndarray]:
    """All numbers that a strategy and those that it wraps keep from round to round."""
    found: list[np.ndarray] = []
    for level in levels(strategy):
        for name in MEMORY:
            value = getattr(level, name, None)
            if isinstance(value, Mapping):
                arrays: Sequence[Any] = [value[key] for key in sorted(value)]
            else:
                arrays = value if isinstance(value, list) else [value]
            found += [
                np.asarray(each.numpy() if hasattr(each, "numpy") else each, dtype=float)
                for each in arrays
                if each is not None
            ]
    return found


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("picks", [(0, 1), (1, 2)])
def test_memory_is_that_of_the_chosen_candidates(inner: str, picks: tuple[int, int]) -> None:
    wrapped, plain = INNER[inner](), INNER[inner]()
    objects = levels(wrapped)
    strategy = guarded(wrapped)
    gauge = random_state(ZOO[NET], 0)
    for server_round, pick in enumerate(picks, start=1):
        result, _ = run_round(strategy, choosing(pick), gauge=gauge, server_round=server_round)
        moved = list(candidates(gauge=gauge).values())[pick]
        states = dict(zip(WEIGHTS, moved, strict=True))
        expected, _ = run_round(
            plain, Federation(dict.fromkeys(WEIGHTS)), gauge=gauge, states=states,
            server_round=server_round,
        )  # fmt: skip
        wanted = {key: value.float() for key, value in expected.items()}
        assert_same(result, wanted, rtol=1e-5, atol=1e-6)
        kept, known = memory(wrapped), memory(plain)
        assert len(kept) == len(known) > 0
        for left, right in zip(kept, known, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
        gauge = result
    # The objects are those that the user made, at every level.
    assert strategy.strategy is wrapped
    assert all(now is before for now, before in zip(levels(wrapped), objects, strict=True))


class Bound(FedAvg):
    """Hands one of its own methods to Flower, as users do."""

    def __init__(self) -> None:
        super().__init__(train_metrics_aggr_fn=self.count)
        self.seen = 0

    def count(self, records: list[RecordDict], key: str) -> MetricRecord:
        self.seen += 1
        return MetricRecord({"seen": self.seen})


def test_methods_that_a_strategy_keeps_are_its_own_afterwards() -> None:
    inner = Bound()
    strategy = guarded(inner)
    for server_round in (1, 2, 3):
        _, metrics = run_round(strategy, choosing(1), server_round=server_round)
        assert metrics["seen"] == inner.seen == server_round
        assert inner.train_metrics_aggr_fn.__self__ is inner


class Locked(FedAvg):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_strategy_that_cannot_be_copied_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"wrapped strategy that can be copied, Locked cannot: .*"):
        guarded(Locked())
    # Without the guard it is nobody's business.
    ReBasinStrategy(Locked(), model=ZOO[NET].build(), example_inputs=ZOO[NET].inputs())


def test_grid_that_a_wrapped_strategy_keeps_is_not_copied() -> None:
    # As that of a real server, which holds connections.
    data = batches_of(ZOO[WITH_NORM].inputs().shape[1:], [9], seed=1)
    world = Federation(
        {node_id: client(ZOO[WITH_NORM].build, data, held_back(node_id, WITH_NORM))
         for node_id in WEIGHTS}
    )  # fmt: skip
    world.grid.connection = threading.Lock()
    inner = BatchNormRecalibration(model=ZOO[WITH_NORM].build())
    strategy = guarded(inner, WITH_NORM, recalibrate_batchnorm=False)
    _, metrics = run_round(strategy, world, WITH_NORM)
    assert metrics["guard-clients"] == 3
    assert metrics["batchnorm-clients"] == 3
    assert strategy.strategy is inner
    assert inner._grid is world.grid


class Choosy(FedAvg):
    """Takes no models whose first weight begins with a certain value."""

    refused: float = 0.0

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        if abs(float(arrays["1.weight"].numpy().flat[0]) - self.refused) < 1e-6:
            return None, None
        return arrays, metrics


def test_candidate_that_the_wrapped_strategy_refuses_is_none() -> None:
    first = choosing(0)
    run_round(strategy_for(), first)
    inner = Choosy()
    inner.refused = float(offered(first)[1]["1.weight"].flatten()[0])
    world = choosing(1, candidates=2)
    result, metrics = run_round(guarded(inner), world)
    assert [key for key in metrics if key.startswith("guard-loss-")] == [
        "guard-loss-aligned", "guard-loss-reference"
    ]  # fmt: skip
    assert_same(result, offered(first)[2], rtol=0, atol=0)


def test_round_in_which_every_candidate_is_refused_has_no_result() -> None:
    class Refusing(Counting):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
            super().aggregate_train(server_round, replies)
            return None, None

    inner = Refusing()
    world = choosing(0)
    replies = replies_of(strangers(), WEIGHTS)
    assert one_round(guarded(inner), world, random_state(ZOO[NET], 0), replies) == (None, None)
    assert world.sent == []
    assert inner.rounds == 1


def test_summary_says_what_is_on(caplog: pytest.LogCaptureFixture) -> None:
    guarded(matching="activations", least_squares="one-pass").summary()
    assert "matching: activations; least squares: one-pass; guard: on" in caplog.text
