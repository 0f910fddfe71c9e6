"""Alignment to the global model: the result, and the number of models held at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Nodes, prepare, replies_of, tensors
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedYogi,
    Strategy,
)
from helpers import State, assert_same, named_spec, nearby, random_state
from zoo import ZOO

from fl_rebasin import match_weights
from fl_rebasin.flower import Checkpointed, ReBasinStrategy, WeightMatching

NETS = ("mlp", "conv-batchnorm-flatten", "residual-batchnorm")
WEIGHTS = {1: 10, 2: 30, 3: 5, 4: 20}

INNER: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedProx": lambda: FedProx(proximal_mu=0.1),
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    "FedAdagrad": FedAdagrad,
    "FedAdam": lambda: FedAdam(eta=0.01),
    "FedYogi": lambda: FedYogi(eta=0.01),
    # These two need all replies at once.
    "its own metrics": lambda: FedAvg(train_metrics_aggr_fn=largest),
    "FedMedian": FedMedian,
}


def largest(contents: list[RecordDict], key: str) -> MetricRecord:
    return MetricRecord({"largest": max(each["metrics"]["loss"] for each in contents)})


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


def wrapped(name: str, inner: Strategy, **options: object) -> ReBasinStrategy:
    return ReBasinStrategy(
        inner,
        model=ZOO[name].build(),
        example_inputs=ZOO[name].inputs(),
        align=WeightMatching(to="global"),
        finish=[],
        **options,  # type: ignore[arg-type]
    )


def clients(name: str, model: State, server_round: int) -> dict[int, State]:
    """Models near the global one, with their units in random order."""
    spec, found = named_spec(name), {}
    for node in WEIGHTS:
        generator = torch.Generator().manual_seed(10 * server_round + node)
        found[node] = spec.apply(spec.random(generator), nearby(model, 10 * server_round + node))
    return found


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", NETS)
def test_each_model_is_matched_to_the_global_one_and_the_inner_strategy_aggregates(
    name: str, inner: str
) -> None:
    spec, plain = named_spec(name), INNER[inner]()
    strategy = wrapped(name, INNER[inner]())
    model = expected = ArrayRecord(random_state(ZOO[name], 0))
    losses = {node: float(node) for node in WEIGHTS}
    for server_round in (1, 2):
        states = clients(name, tensors(model), server_round)
        aligned = {
            node: spec.apply(match_weights(spec, tensors(model), state).permutation, state)
            for node, state in states.items()
        }
        list(plain.configure_train(server_round, expected, ConfigRecord(), Nodes(WEIGHTS)))
        list(strategy.configure_train(server_round, model, ConfigRecord(), Nodes(WEIGHTS)))
        wanted, wanted_metrics = plain.aggregate_train(
            server_round, replies_of(aligned, WEIGHTS, loss=losses)
        )
        found, metrics = strategy.aggregate_train(
            server_round, iter(replies_of(states, WEIGHTS, loss=losses))
        )
        assert wanted is not None
        assert found is not None
        assert metrics is not None
        assert wanted_metrics is not None
        for key, value in tensors(wanted).items():
            rounded = value if value.is_floating_point() else value.long()
            assert (
                torch.allclose(tensors(found)[key].double(), rounded.double(), rtol=1e-4, atol=1e-6)
                or not tensors(model)[key].is_floating_point()
            )
        assert {key: metrics[key] for key in wanted_metrics} == pytest.approx(dict(wanted_metrics))
        assert metrics["rebasin-units-moved"] > 0
        assert metrics["rebasin-dropped"] == 0
        model, expected = found, ArrayRecord(tensors(found))


def watched(messages: list[Message], alive: list[int]) -> Iterator[Message]:
    """Yield messages one by one; append to `alive` how many of the yielded ones still exist."""
    records: list[weakref.ref[Any]] = []
    while messages:
        message = messages.pop(0)
        records.append(weakref.ref(message.content["arrays"]))
        alive.append(sum(record() is not None for record in records))
        yield message
        del message


@pytest.mark.parametrize(("inner", "most"), [("FedAvg", 2), ("FedAdam", 2), ("FedMedian", 12)])
def test_each_reply_is_released_once_it_is_read(inner: str, most: int) -> None:
    name = "mlp"
    model = random_state(ZOO[name], 0)
    strategy = wrapped(name, INNER[inner]())
    list(strategy.configure_train(1, ArrayRecord(model), ConfigRecord(), Nodes(WEIGHTS)))
    states = {node: nearby(model, node) for node in range(1, 13)}
    alive: list[int] = []
    replies = watched(replies_of(states), alive)
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert len(alive) == 12
    assert max(alive) <= most


def test_a_strategy_that_needs_all_models_gets_them() -> None:
    name = "mlp"
    model = random_state(ZOO[name], 0)
    states = clients(name, model, 1)
    spec = named_spec(name)
    strategy = wrapped(name, FedMedian())
    list(strategy.configure_train(1, ArrayRecord(model), ConfigRecord(), Nodes(WEIGHTS)))
    arrays, metrics = strategy.aggregate_train(1, replies_of(states, WEIGHTS))
    aligned = [
        spec.apply(match_weights(spec, model, state).permutation, state)
        for state in states.values()
    ]
    for key, value in tensors(arrays).items():
        middle = torch.stack([each[key] for each in aligned]).quantile(0.5, dim=0)
        torch.testing.assert_close(value, middle)
    assert metrics is not None
    assert metrics["rebasin-similarity-after"] > metrics["rebasin-similarity-before"]


def test_a_reply_with_unusual_metrics_loses_only_the_metrics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = "mlp"
    model = random_state(ZOO[name], 0)
    replies = replies_of({node: nearby(model, node) for node in WEIGHTS}, WEIGHTS, loss=1.0)
    odd = replies_of({9: nearby(model, 9)}, {9: 10}, surprise=3.0)
    strategy = wrapped(name, FedAvg())
    list(strategy.configure_train(1, ArrayRecord(model), ConfigRecord(), Nodes(WEIGHTS)))
    arrays, metrics = strategy.aggregate_train(1, [*odd, *replies])
    plain, _ = FedAvg().aggregate_train(
        1, [*replies_of({9: nearby(model, 9)}, {9: 10}, loss=1.0), *replies]
    )
    assert_same(tensors(arrays), tensors(plain), rtol=1e-5, atol=1e-6)
    assert metrics is not None
    assert metrics["loss"] == pytest.approx(1.0)
    assert "surprise" not in metrics
    assert "metrics of node 9 dropped: its records differ" in caplog.text


class Mailbox(Nodes):
    """A grid that creates each reply when it is pulled, and counts the replies that still exist."""

    pull_interval = 0.0

    def __init__(self, states: dict[int, State]) -> None:
        super().__init__(states)
        self.states = states
        self.asked: dict[str, Message] = {}
        self.records: list[weakref.ref[Any]] = []
        self.most = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.asked = {str(place): message for place, message in enumerate(messages)}
        return list(self.asked)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        nodes = {each: self.asked[each].metadata.dst_node_id for each in message_ids}
        if BROKEN in nodes.values():
            raise TypeError("this reply cannot be parsed")
        return [self.reply(self.asked[each]) for each, node in nodes.items() if node != UNANSWERED]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return [self.reply(message) for message in messages]

    def reply(self, asked: Message) -> Message:
        node = asked.metadata.dst_node_id
        (reply,) = replies_of({node: self.states[node]})
        self.records.append(weakref.ref(reply.content["arrays"]))
        self.most = max(self.most, sum(record() is not None for record in self.records))
        return reply


UNANSWERED, BROKEN = 5, 8


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpoints"])
@pytest.mark.parametrize("inner", [FedAvg, FedMedian])
def test_a_run_reads_replies_one_by_one(
    inner: type[FedAvg], checkpoints: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "mlp"
    model = random_state(ZOO[name], 0)
    strategy: Strategy = wrapped(name, inner(fraction_evaluate=0.0))
    if checkpoints:
        strategy = Checkpointed(strategy, tmp_path)
    grid = Mailbox({node: nearby(model, node) for node in range(1, 13)})
    result = strategy.start(grid, ArrayRecord(model), num_rounds=2, timeout=0.2)  # type: ignore[arg-type]
    assert set(result.train_metrics_clientapp) == {1, 2}
    if inner is FedAvg:
        # The node that never answers costs the timeout, and nothing else.
        assert len(grid.records) == 2 * 10
        assert caplog.text.count("dropped: it cannot be parsed") == 2
        assert grid.most <= 2
    else:
        assert len(grid.records) == 2 * 12
