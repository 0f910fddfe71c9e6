"""The server's side of one seed: all methods of the comparison, on Flower's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from experiment.data import Dataset
from experiment.errors import FederationError
from experiment.methods import (
    ALWAYS,
    BEST_BODY,
    CONTINUED,
    METHODS,
    UNTRAINED_BODY,
    Method,
)
from experiment.recorder import InitialModel, ModelState, OneClient, Recorder
from experiment.seeding import shared_model
from experiment.settings import Settings
from fl_rebasin.flower import ReBasinStrategy

Aggregate = tuple[ArrayRecord, MetricRecord]


@dataclass(frozen=True)
class Federation:
    """The models and the measurements of one seed.

    Attributes:
        clients: The clients' models after the first round, trained apart.
        aligned: The same models with their units permuted.
        merged: The merged models by method. With one round: `naive`, `naive+bn`, `rebasin`,
            `rebasin+bn` and all chosen methods. With more rounds: those that continue, after the
            last round.
        rounds: For each round and method, what `evaluate` returned for its model, and the
            aggregated training metrics.
    """

    clients: list[ModelState]
    aligned: list[ModelState]
    merged: dict[str, ModelState]
    rounds: list[dict[str, Any]]


def run_federation(
    settings: Settings,
    dataset: Dataset,
    grid: Grid,
    seed: int,
    evaluate: Callable[[ModelState], dict[str, float]],
) -> Federation:
    """Train and merge for one seed.

    In the first round all methods merge the same client models. Later rounds are ordinary ones:
    every method that continues gets the same number of rounds, messages and local epochs.

    Args:
        settings: The experiment.
        dataset: Determines the shape of the model.
        grid: Flower's grid.
        seed: The seed.
        evaluate: Measures a global model after each round.

    Raises:
        FederationError: A client failed.
    """
    server = _Server(settings, dataset, grid, seed)
    received, results = server.first_round()
    clients, aligned = received.models(), server.averages["rebasin"].models()
    rounds = [_round_entry(1, results, evaluate)]
    if settings.rounds > 1:
        results = {name: result for name, result in results.items() if name in CONTINUED}
    for stage in range(2, settings.rounds + 1):
        results = {
            name: server.run_round(server.strategies[name], name.removesuffix("+bn"), stage, arrays)
            for name, (arrays, _) in results.items()
        }
        rounds.append(_round_entry(stage, results, evaluate))
    merged = {}
    for name, (arrays, _) in results.items():
        plain = name.removesuffix("+bn")
        if plain in server.averages:
            # The average before BatchNorm is re-estimated.
            merged[plain] = _state(server.averages[plain].arrays)
        merged[name] = _state(arrays)
    return Federation(clients, aligned, merged, rounds)


class _Server:
    """The strategies of one seed and the means to run their rounds.

    Attributes:
        averages: The averaging inside `naive+bn` and `rebasin+bn`.
        strategies: One per method.
    """

    def __init__(self, settings: Settings, dataset: Dataset, grid: Grid, seed: int) -> None:
        self._settings, self._grid, self._seed = settings, grid, seed
        model = shared_model(settings, dataset, seed)
        example = dataset.normalise(dataset.train_images[:1])
        self._initial = ArrayRecord(model.state_dict())

        self.averages = {name.removesuffix("+bn"): Recorder(_fedavg()) for name in ALWAYS}

        def strategy_of(method: Method, averaging: Strategy) -> ReBasinStrategy:
            return ReBasinStrategy(
                averaging,
                model=model,
                example_inputs=example,
                align=method.align,
                finish=method.finish,
                guard=method.guard,
            )

        methods = ALWAYS | {name: METHODS[name] for name in settings.methods if name != BEST_BODY}
        inner = {**self.averages, UNTRAINED_BODY: InitialModel()}
        self.strategies = {
            name: strategy_of(method, inner.get(name.removesuffix("+bn"), _fedavg()))
            for name, method in methods.items()
        }
        if BEST_BODY in settings.methods:
            for client in range(settings.clients):
                self.strategies[body_row(client)] = strategy_of(
                    METHODS[BEST_BODY], OneClient(client)
                )

    def first_round(self) -> tuple[Recorder, dict[str, Aggregate]]:
        """Train once; merge the same replies with every strategy."""
        received = Recorder(self.strategies["rebasin+bn"])
        merged = self.run_round(received, "rebasin", 1, self._initial)
        results = {
            name: merged if name == "rebasin+bn" else self._merge(strategy, received.replies)
            for name, strategy in self.strategies.items()
        }
        return received, results

    def _merge(self, strategy: Strategy, replies: list[Message]) -> Aggregate:
        """Aggregate replies that another strategy has received."""
        list(strategy.configure_train(1, self._initial, ConfigRecord(), self._grid))
        arrays, metrics = strategy.aggregate_train(1, replies)
        assert arrays is not None
        assert metrics is not None
        return arrays, metrics

    def run_round(
        self, strategy: Strategy, name: str, stage: int, arrays: ArrayRecord
    ) -> Aggregate:
        """Run one round of a strategy; every client must take part."""
        settings, seed, first = self._settings, self._seed, stage == 1
        recorded = Recorder(strategy)
        config = ConfigRecord(
            {
                "seed": seed,
                "stage": stage,
                "epochs": settings.epochs if first else settings.round_epochs,
                "from-own-init": first and settings.init == "different",
                "label": f"seed {seed} round {stage}" + ("" if first else f" {name}"),
            }
        )
        result = recorded.start(self._grid, arrays, num_rounds=1, train_config=config)
        if len(recorded.replies) < settings.clients:
            reasons = "; ".join(dict.fromkeys(recorded.failures)) or "no reply"
            missing = settings.clients - len(recorded.replies)
            raise FederationError(f"{missing} of {settings.clients} clients failed: {reasons}")
        return result.arrays, result.train_metrics_clientapp[1]


def body_row(client: int) -> str:
    """Return the name of the result with one client's body and the joint head."""
    return f"body-{client}+head"


def is_body_row(name: str) -> bool:
    """Whether a result is that of one client's body and the joint head."""
    return name.startswith("body-")


def _fedavg() -> FedAvg:
    return FedAvg(fraction_evaluate=0.0)


def _state(arrays: ArrayRecord | None) -> ModelState:
    if arrays is None:
        raise FederationError("no round was aggregated")
    return dict(arrays.to_torch_state_dict())


def _round_entry(
    stage: int,
    results: dict[str, Aggregate],
    evaluate: Callable[[ModelState], dict[str, float]],
) -> dict[str, Any]:
    """Return the measurements of a round for `results.json`."""
    entry: dict[str, Any] = {"round": stage}
    for name, (arrays, metrics) in results.items():
        entry[name] = evaluate(_state(arrays)) | {"train": dict(metrics)}
    return entry
