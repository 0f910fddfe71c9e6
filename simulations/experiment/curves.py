"""Loss and accuracy on the line between two models, and the barriers on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiment.data import Dataset
from experiment.progress import counter, progress_writer
from experiment.recorder import ModelState
from experiment.seeding import derived_seed, shared_model
from experiment.settings import Settings
from experiment.training import predict, statistics_batches
from fl_rebasin import interpolate, recalibrate_batchnorm
from fl_rebasin.metrics import POINTS, accuracy, barrier_of, log_loss

CURVE_STATISTICS_IMAGES = 1000
"""Number of training images for the BatchNorm statistics at each point of a curve."""


def curves(
    settings: Settings,
    dataset: Dataset,
    seed: int,
    lines: dict[str, tuple[ModelState, ModelState]],
    progress: Path,
) -> dict[str, dict[str, Any]]:
    """Measure lines between models, without and with ("+bn") BatchNorm re-estimated.

    Without BatchNorm layers there is nothing to re-estimate, and both curves are the same.
    """
    model = shared_model(settings, dataset, seed)
    variants = (False, True) if settings.norm == "batch" else (False,)
    write = progress_writer(progress, f"seed {seed} interpolation")
    on_point = counter(write, len(lines) * len(variants) * POINTS)
    measured = {}
    for name, (left, right) in lines.items():
        for recalibrate in variants:
            measured[f"{name}+bn" if recalibrate else name] = curve(
                model,
                dataset,
                left,
                right,
                recalibrate=recalibrate,
                images=settings.curve_images,
                seed=derived_seed(seed, "curve"),
                on_point=on_point,
            )
        measured.setdefault(f"{name}+bn", measured[name])
    return measured


def curve(
    model: nn.Module,
    dataset: Dataset,
    left: ModelState,
    right: ModelState,
    *,
    recalibrate: bool,
    images: int,
    seed: int,
    on_point: Callable[[], None],
) -> dict[str, Any]:
    """Measure loss and accuracy on the line between two models, and their barriers.

    Args:
        model: A model of the architecture; its weights change.
        dataset: The test images to measure on, and training images for BatchNorm statistics.
        left: The model at lambda = 0.
        right: The model at lambda = 1.
        recalibrate: Whether to re-estimate BatchNorm statistics at each point.
        images: Number of test images, chosen at random; 0 for all.
        seed: Seeds the choice of images.
        on_point: Called after each point.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(dataset.test_labels), generator=generator)
    chosen = chosen[:images] if images else chosen
    test_images, labels = dataset.test_images[chosen], dataset.test_labels[chosen]
    lambdas = [place / (POINTS - 1) for place in range(POINTS)]
    losses, accuracies = [], []
    for lam in lambdas:
        state = interpolate(left, right, lam)
        model.cpu()
        if recalibrate:
            batches = statistics_batches(
                dataset, dataset.train_images, dataset.train_labels, CURVE_STATISTICS_IMAGES, seed
            )
            state = recalibrate_batchnorm(model, state, batches)
        model.load_state_dict(state)
        probabilities = predict(model, dataset, test_images).double().softmax(1)
        losses.append(log_loss(probabilities, labels))
        accuracies.append(accuracy(probabilities, labels))
        on_point()
    return {
        "lambdas": lambdas,
        "losses": losses,
        "accuracies": accuracies,
        "loss": barrier_of(losses),
        "accuracy": barrier_of([1 - value for value in accuracies]),
        "images": len(labels),
    }
