"""One seed of an experiment: run the federation, then measure every method and control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from experiment.curves import curves
from experiment.data import Dataset
from experiment.evaluation import Evaluator, Row, debiased, ensemble
from experiment.methods import BEST_BODY, UNTRAINED_BODY
from experiment.progress import progress_writer
from experiment.seeding import client_parts, derived_seed, shared_model
from experiment.server import Federation, is_body_row, run_federation
from experiment.settings import Settings
from experiment.splits import evaluation_parts
from experiment.training import train


def compare(
    settings: Settings, dataset: Dataset, grid: Grid, seed: int, progress: Path
) -> dict[str, Any]:
    """Run and measure all methods for one seed.

    Args:
        settings: The experiment.
        dataset: Its data.
        grid: Flower's grid.
        seed: The seed.
        progress: Folder for the state of the progress bars.

    Returns:
        One entry of `runs` in `results.json`; `curves` holds the interpolations.
    """
    parts = evaluation_parts(settings.split, dataset.num_classes)
    evaluator = Evaluator(shared_model(settings, dataset, seed), dataset, parts)
    federation = run_federation(settings, dataset, grid, seed, evaluator.measure)
    indices = [torch.from_numpy(trained) for trained, _ in client_parts(settings, dataset, seed)]
    logits = [evaluator.logits(state) for state in federation.clients]
    methods = (
        _client_rows(evaluator, logits, indices)
        | _merged_rows(evaluator, federation)
        | _ensemble_rows(evaluator, logits, indices)
    )
    if settings.oracle:
        methods["oracle"] = _oracle_row(settings, evaluator, seed, torch.cat(indices), progress)
    (first, second), (first_aligned, second_aligned) = (
        federation.clients[:2],
        federation.aligned[:2],
    )
    lines = {"naive": (first, second), "rebasin": (first_aligned, second_aligned)}
    measured = curves(settings, dataset, seed, lines, progress)
    barriers = {
        name: {key: each[key] for key in ("loss", "accuracy")} for name, each in measured.items()
    }
    for name, barrier in barriers.items():
        methods[name] |= {f"{key}_barrier": value for key, value in barrier.items()}
    return {
        "seed": seed,
        "images": [len(index) for index in indices],
        "methods": methods,
        "barrier": barriers,
        "rounds": federation.rounds,
        "curves": measured,
    }


def _client_rows(
    evaluator: Evaluator, logits: list[Tensor], indices: list[Tensor]
) -> dict[str, Row]:
    """Measure each client, and the best client once its label prior is removed.

    The second is the strongest control: the client is chosen by its accuracy on the test set.
    """
    dataset = evaluator.dataset
    counts = [
        torch.bincount(dataset.train_labels[index], minlength=dataset.num_classes)
        for index in indices
    ]
    rows = {f"client-{i}": evaluator.measure_logits(each) for i, each in enumerate(logits)}
    corrected = [
        evaluator.measure_logits(debiased(each, count))
        for each, count in zip(logits, counts, strict=True)
    ]
    rows["best-client-debiased"] = max(corrected, key=lambda row: row["joint_accuracy"])
    return rows


def _merged_rows(evaluator: Evaluator, federation: Federation) -> dict[str, Row]:
    """Measure the merged models; a model that the last round has measured is not measured again.

    The controls with a joint head are those of the first round, of the clients trained apart.
    """
    rows = {}
    for name, state in federation.merged.items():
        if not is_body_row(name):
            rows[name] = _measured(federation.rounds[-1], name) or evaluator.measure(state)
    first = federation.rounds[0]
    if UNTRAINED_BODY in first:
        rows[UNTRAINED_BODY] = _measured(first, UNTRAINED_BODY)
    bodies = [_measured(first, name) for name in first if is_body_row(name)]
    if bodies:
        # The strongest control: the body that is best on the test set.
        rows[BEST_BODY] = max(bodies, key=lambda row: row["joint_accuracy"])
    return rows


def _measured(entry: dict[str, Any], name: str) -> Row:
    """Return what a round has measured of a method; empty if the method took no part."""
    return {key: value for key, value in entry.get(name, {}).items() if key != "train"}


def _ensemble_rows(
    evaluator: Evaluator, logits: list[Tensor], indices: list[Tensor]
) -> dict[str, Row]:
    """Measure the ensembles of the clients, weighted by their numbers of images."""
    log_probabilities, mean_logits = ensemble(logits, [len(index) for index in indices])
    return {
        "ensemble-prob": evaluator.measure_logits(log_probabilities),
        "ensemble-logit": evaluator.measure_logits(mean_logits),
    }


def _oracle_row(
    settings: Settings, evaluator: Evaluator, seed: int, index: Tensor, progress: Path
) -> Row:
    """Train one model on the data of all clients and measure it."""
    dataset = evaluator.dataset
    model = shared_model(settings, dataset, seed)
    train(
        model,
        dataset,
        dataset.train_images[index],
        dataset.train_labels[index],
        recipe=settings.recipe,
        first_round=True,
        epochs=settings.epochs,
        seed=derived_seed(seed, "train oracle"),
        on_step=progress_writer(progress, f"seed {seed} one model on all the data"),
    )
    return evaluator.measure(model.state_dict())
