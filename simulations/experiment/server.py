"""The ServerApp's side of one seed: both arms of the comparison, on Flower's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from experiment.data import Dataset
from experiment.methods import METHODS, ORDINARY
from experiment.recorder import ModelState, Recorder
from experiment.seeding import shared_model
from experiment.settings import Settings
from fl_rebasin import ReBasinStrategy


class FederationError(RuntimeError):
    """A client of the simulation failed, so that the comparison would be of something else."""


@dataclass
class Federation:
    """What the federation of one seed gave.

    Attributes:
        clients: The clients' models after the first round, trained apart.
        aligned: The same models with their units permuted.
        merged: After the first round `naive`, `rebasin`, `naive+bn`, `rebasin+bn` and the chosen
            methods; with more rounds those that go on, each from its own model, after the last.
        rounds: For each round, for each arm, what `evaluate` said of its model and the aggregated
            training metrics.
    """

    clients: list[ModelState]
    aligned: list[ModelState]
    merged: dict[str, ModelState]
    rounds: list[dict[str, Any]] = field(default_factory=list)


def _fedavg() -> FedAvg:
    return FedAvg(fraction_evaluate=0.0)


def _state(arrays: ArrayRecord | None) -> ModelState:
    if arrays is None:
        raise FederationError("no round was aggregated")
    return dict(arrays.to_torch_state_dict())


def _one_round(
    strategy: Strategy, settings: Settings, grid: Grid, arrays: ArrayRecord, seed: int, stage: int,
    arm: str,
) -> tuple[ArrayRecord, MetricRecord]:  # fmt: skip
    """Run one round of a strategy; every client must take part."""
    watched = Recorder(strategy)
    first = stage == 1
    config = ConfigRecord(
        {
            "seed": seed,
            "stage": stage,
            "epochs": settings.epochs if first else settings.round_epochs,
            "from-own-init": first and settings.init == "different",
            "label": f"seed {seed} round {stage}" + ("" if first else f" {arm}"),
        }
    )
    result = watched.start(grid, arrays, num_rounds=1, train_config=config)
    if len(watched.replies) < settings.clients:
        reasons = "; ".join(dict.fromkeys(watched.failures)) or "no answer"
        missing = settings.clients - len(watched.replies)
        raise FederationError(f"{missing} of {settings.clients} clients failed: {reasons}")
    return result.arrays, result.train_metrics_clientapp[1]


def run_federation(
    settings: Settings,
    dataset: Dataset,
    grid: Grid,
    seed: int,
    evaluate: Callable[[ModelState], dict[str, float]],
) -> Federation:
    """Train and merge for one seed.

    In the first round all arms share the very same client models. Later rounds are ordinary
    ones, each arm with as many as the other: the same communication, the same local epochs.

    Args:
        settings: The experiment.
        dataset: For the shape of the model.
        grid: Flower's grid.
        seed: The seed.
        evaluate: Measures a global model after each round.

    Raises:
        FederationError: A client failed.
    """
    model = shared_model(settings, dataset, seed)
    example = dataset.normalise(dataset.train_images[:1])
    initial = ArrayRecord(model.state_dict())

    def rebasin_around(inner: Strategy, **options: Any) -> ReBasinStrategy:
        return ReBasinStrategy(inner, model=model, example_inputs=example, **options)

    averaging = Recorder(_fedavg())
    rebasin = rebasin_around(averaging)
    arriving = Recorder(rebasin)
    rebasin_arrays, metrics = _one_round(arriving, settings, grid, initial, seed, 1, "rebasin")
    naive_averaging = Recorder(_fedavg())
    arms = {
        "naive+bn": rebasin_around(naive_averaging, matching="none"),
        **{name: rebasin_around(_fedavg(), **METHODS[name]) for name in settings.methods},
    }
    results = {"rebasin+bn": (rebasin_arrays, metrics)}
    for name, strategy in arms.items():
        # Not through `start`: all arms share the client models of the first round.
        list(strategy.configure_train(1, initial, ConfigRecord(), grid))
        arrays, own = strategy.aggregate_train(1, arriving.replies)
        assert arrays is not None
        assert own is not None
        results[name] = arrays, own
    federation = Federation(
        clients=arriving.models(),
        aligned=averaging.models(),
        merged={
            "naive": _state(naive_averaging.arrays),
            "naive+bn": _state(results["naive+bn"][0]),
            "rebasin": _state(averaging.arrays),
            **{name: _state(results[name][0]) for name in ("rebasin+bn", *settings.methods)},
        },
    )

    def log_round(stage: int) -> None:
        entry: dict[str, Any] = {"round": stage}
        for arm, (arrays, train_metrics) in results.items():
            entry[arm] = evaluate(_state(arrays)) | {"train": dict(train_metrics)}
        federation.rounds.append(entry)

    log_round(1)
    # Those that only differ in how they align go on like the others of their kind.
    going_on = {"naive+bn": arms["naive+bn"], "rebasin+bn": rebasin} | {
        name: arms[name] for name in settings.methods if name in ORDINARY
    }
    if settings.rounds > 1:
        for name in results.keys() - going_on.keys():
            del results[name], federation.merged[name]
    for stage in range(2, settings.rounds + 1):
        for arm, strategy in going_on.items():
            results[arm] = _one_round(
                strategy, settings, grid, results[arm][0], seed, stage, arm.removesuffix("+bn")
            )
            federation.merged[arm] = _state(results[arm][0])
        federation.merged["naive"] = _state(naive_averaging.arrays)
        federation.merged["rebasin"] = _state(averaging.arrays)
        log_round(stage)
    return federation
