"""Measurements on the test set: of a model, of an ensemble, of a client without its label prior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiment.data import Dataset
from experiment.recorder import ModelState
from experiment.training import predict
from fl_rebasin.metrics import accuracy, expected_calibration_error, log_loss

Row = dict[str, Any]
"""One row of the table: joint accuracy, loss, calibration error, accuracy on each class part."""


@dataclass(frozen=True)
class Evaluator:
    """Measures models on the test images.

    Attributes:
        model: A model of the architecture; its weights change with each measurement.
        dataset: The data set.
        parts: The classes of each part whose accuracy is reported separately, by name.
    """

    model: nn.Module
    dataset: Dataset
    parts: dict[str, NDArray[np.int64]]

    def logits(self, state: ModelState) -> Tensor:
        """Return the logits of a model, shape (N, num_classes)."""
        self.model.cpu().load_state_dict(state)
        return predict(self.model, self.dataset, self.dataset.test_images)

    def measure(self, state: ModelState) -> Row:
        """Measure a model."""
        return self.measure_logits(self.logits(state))

    def measure_logits(self, logits: Tensor) -> Row:
        """Measure logits or log-probabilities, shape (N, num_classes)."""
        labels = self.dataset.test_labels
        probabilities = logits.double().softmax(1)
        part_accuracy = {}
        for name, classes in self.parts.items():
            chosen = torch.isin(labels, torch.from_numpy(classes))
            part_accuracy[name] = accuracy(probabilities[chosen], labels[chosen])
        return {
            "joint_accuracy": accuracy(probabilities, labels),
            "joint_loss": log_loss(probabilities, labels),
            "ece": expected_calibration_error(probabilities, labels),
            "part_accuracy": part_accuracy,
        }


def debiased(logits: Tensor, counts: Tensor) -> Tensor:
    """Return logits without the client's label prior: `logits - log p(class)`.

    The prior is smoothed, `p(class) = (count + 1) / sum of (count + 1)`, because a class that the
    client never saw would have no finite log prior.

    Args:
        logits: Shape (N, num_classes).
        counts: Number of training images of each class.

    Source: Menon et al. (2021), "Long-tail learning via logit adjustment".
    """
    prior = (counts.double() + 1) / (counts.double() + 1).sum()
    return logits.double() - prior.log()


def ensemble(all_logits: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return two weighted ensembles: the log of the mean probabilities, and the mean logits.

    Args:
        all_logits: For each client, shape (N, num_classes).
        weights: One per client, on any scale.
    """
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = (shares / shares.sum()).view(-1, 1, 1)
    stacked = torch.stack([logits.double() for logits in all_logits])
    return (shares * stacked.softmax(2)).sum(0).log(), (shares * stacked).sum(0)
