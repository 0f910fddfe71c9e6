"""The rows of the comparison, and the curves between clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiment.data import Dataset
from experiment.recorder import ModelState
from experiment.training import predict, statistics_batches
from fl_rebasin import interpolate, recalibrate_batchnorm
from fl_rebasin.metrics import (
    LAMBDAS,
    accuracy,
    barrier_of,
    expected_calibration_error,
    log_loss,
)

CURVE_STATISTICS_IMAGES = 1000
"""Training images that BatchNorm statistics are re-estimated on at each point of a curve."""


def measure(
    logits: Tensor, dataset: Dataset, parts: dict[str, NDArray[np.int64]]
) -> dict[str, Any]:
    """Return joint accuracy, loss, calibration error and the accuracy on each class part.

    Args:
        logits: shape (N, num_classes), for the whole test set; log-probabilities do as well.
        dataset: Holds the test labels.
        parts: Classes of each part.
    """
    labels = dataset.test_labels
    probabilities = logits.double().softmax(1)
    return {
        "joint_accuracy": accuracy(probabilities, labels),
        "joint_loss": log_loss(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels),
        "part_accuracy": {
            name: accuracy(probabilities[chosen], labels[chosen])
            for name, classes in parts.items()
            for chosen in [torch.isin(labels, torch.from_numpy(classes))]
        },
    }


def debiased(logits: Tensor, counts: Tensor) -> Tensor:
    """Return logits with the client's label prior taken out (Menon et al., 2021).

    Args:
        logits: shape (N, num_classes).
        counts: training images of each class; one is added to each, since a class that a client
            never saw has no finite log prior.
    """
    prior = (counts.double() + 1) / (counts.double() + 1).sum()
    return logits.double() - prior.log()


def ensemble(all_logits: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the ensemble of probabilities and logits of that of logits.

    Args:
        all_logits: for each client shape (N, num_classes).
        weights: one a client, any scale.
    """
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = (shares / shares.sum()).view(-1, 1, 1)
    stacked = torch.stack([logits.double() for logits in all_logits])
    return (shares * stacked.softmax(2)).sum(0).log(), (shares * stacked).sum(0)


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
        model: Carries the weights of each point; changed.
        dataset: Test images to measure on, training images for BatchNorm statistics.
        left: State at lambda 0.
        right: State at lambda 1.
        recalibrate: Whether BatchNorm statistics are re-estimated at each point.
        images: Number of test images, taken at random; 0 for all.
        seed: Seeds the choice of images.
        on_point: Called after each point.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(dataset.test_labels), generator=generator)
    chosen = chosen[:images] if images else chosen
    test_images, labels = dataset.test_images[chosen], dataset.test_labels[chosen]
    lambdas = [place / (LAMBDAS - 1) for place in range(LAMBDAS)]
    losses, accuracies = [], []
    for lam in lambdas:
        model.cpu().load_state_dict(interpolate(left, right, lam))
        if recalibrate:
            batches = statistics_batches(
                dataset, dataset.train_images, dataset.train_labels, CURVE_STATISTICS_IMAGES, seed
            )
            model.load_state_dict(recalibrate_batchnorm(model, batches))
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
