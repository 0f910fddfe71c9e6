"""The ServerApp's side of one seed: both arms of the comparison, on Flower's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from experiment.data import Dataset
from experiment.recorder import ModelState, Recorder
from experiment.seeding import shared_model
from experiment.settings import Settings
from fl_rebasin import ReBasinStrategy
from fl_rebasin.flower import BatchNormRecalibration, recalibrate_on_clients


class FederationError(RuntimeError):
    """A client of the simulation failed, so that the comparison would be of something else."""


@dataclass
class Federation:
    """What the federation of one seed gave.

    Attributes:
        clients: The clients' models after the first round, trained apart.
        aligned: The same models with their units permuted.
        merged: After the first round `naive`, `naive+bn`, `rebasin`, `rebasin+bn`; with more
            rounds the same names after the last one, each arm going on from its own model.
        rounds: For each round, for each arm, what `evaluate` said of its `+bn` model and the
            aggregated training metrics.
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

    In the first round both arms share the very same client models. Later rounds are ordinary
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

    averaging = Recorder(_fedavg())
    rebasin = ReBasinStrategy(averaging, model=model, example_inputs=example)
    arriving = Recorder(rebasin)
    rebasin_arrays, metrics = _one_round(arriving, settings, grid, initial, seed, 1, "rebasin")
    naive_arrays, naive_metrics = _fedavg().aggregate_train(1, arriving.replies)
    assert naive_arrays is not None
    assert naive_metrics is not None
    nodes = [reply.metadata.src_node_id for reply in arriving.replies]
    naive_bn_arrays, naive_own = recalibrate_on_clients(grid, nodes, model, naive_arrays)
    federation = Federation(
        clients=arriving.models(),
        aligned=averaging.models(),
        merged={
            "naive": _state(naive_arrays),
            "naive+bn": _state(naive_bn_arrays),
            "rebasin": _state(averaging.arrays),
            "rebasin+bn": _state(rebasin_arrays),
        },
    )

    def log_round(stage: int, results: dict[str, tuple[ArrayRecord, MetricRecord]]) -> None:
        entry: dict[str, Any] = {"round": stage}
        for arm, (arrays, train_metrics) in results.items():
            entry[f"{arm}+bn"] = evaluate(_state(arrays)) | {"train": dict(train_metrics)}
        federation.rounds.append(entry)

    results = {
        "naive": (naive_bn_arrays, MetricRecord({**naive_metrics, **naive_own})),
        "rebasin": (rebasin_arrays, metrics),
    }
    log_round(1, results)
    naive_averaging = Recorder(_fedavg())
    strategies = {
        "naive": (naive_averaging, BatchNormRecalibration(naive_averaging, model=model)),
        "rebasin": (averaging, rebasin),
    }
    for stage in range(2, settings.rounds + 1):
        for arm, (inner, strategy) in strategies.items():
            arrays = results[arm][0]
            results[arm] = _one_round(strategy, settings, grid, arrays, seed, stage, arm)
            federation.merged[arm] = _state(inner.arrays)
            federation.merged[f"{arm}+bn"] = _state(results[arm][0])
        log_round(stage, results)
    return federation
