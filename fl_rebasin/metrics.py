"""Loss barrier, accuracy, log loss and calibration error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_rebasin.state_dicts import StateDict, interpolate

POINTS = 25
"""Default number of points on the line between two models, endpoints included."""


@dataclass(frozen=True)
class Barrier:
    """How far the loss between two models rises above the straight line between their losses.

    Attributes:
        value: the barrier, at least 0.
        lambdas: the points, from 0 to 1.
        losses: the loss at each point.
    """

    value: float
    lambdas: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def midpoint(self) -> float:
        """The loss halfway between the models."""
        return self.losses[len(self.losses) // 2]


def barrier_of(losses: Sequence[float]) -> float:
    """Return the barrier of a loss curve L, sampled at equally spaced lambdas from 0 to 1.

        max over lambda of  L(lambda) - [(1 - lambda) L(0) + lambda L(1)]

    Args:
        losses: at least two values; lower is better.

    Returns:
        The barrier, at least 0; infinity if a loss is not finite.

    Source: Entezari et al. (2022), equation 1; for equal losses at both ends that is Git Re-Basin,
    definition 2.1 (after Frankle et al., 2020).

    Example:
        >>> barrier_of([0.0, 2.0, 1.0])
        1.5
    """
    if not all(map(math.isfinite, losses)):
        return math.inf
    last = len(losses) - 1
    line = [losses[0] + (losses[-1] - losses[0]) * place / last for place in range(last + 1)]
    return max(0.0, *(loss - below for loss, below in zip(losses, line, strict=True)))


def barrier(
    loss: Callable[[Mapping[str, Tensor]], float],
    left: StateDict,
    right: StateDict,
    points: int = POINTS,
) -> Barrier:
    """Measure the loss barrier between two models.

    Args:
        loss: maps a state dict to a number; lower is better (for accuracy, pass the error).
        left: state dict at lambda 0.
        right: state dict at lambda 1.
        points: number of points, endpoints included; odd and at least 3.

    Raises:
        ValueError: `points` is even or less than 3, or the state dicts differ in keys or shapes.

    Source: Entezari et al. (2022), equation 1; for equal losses at both ends that is Git Re-Basin,
    definition 2.1 (after Frankle et al., 2020).

    Example:
        >>> zero, two = {"x": torch.zeros(1)}, {"x": 2 * torch.ones(1)}
        >>> barrier(lambda model: 1 - float(abs(model["x"] - 1)), zero, two).value
        1.0
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"a barrier needs an odd number of points, at least 3, got {points}")
    lambdas = tuple(place / (points - 1) for place in range(points))
    losses = tuple(float(loss(interpolate(left, right, lam))) for lam in lambdas)
    return Barrier(barrier_of(losses), lambdas, losses)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest entry is the label, in [0, 1].

    Args:
        probabilities: shape `(n, classes)`; logits work as well.
        labels: int64, shape `(n,)`.
    """
    return float((probabilities.argmax(1) == labels).double().mean())


def log_loss(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean negative log-likelihood in nats.

    Args:
        probabilities: shape `(n, classes)`; each row sums to 1.
        labels: int64, shape `(n,)`.
    """
    tiny = torch.finfo(probabilities.dtype).tiny
    return float(F.nll_loss(probabilities.clamp_min(tiny).log(), labels))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error of the top label, over equal-width bins.

        sum over bins b of  (n_b / n) * |accuracy(b) - mean confidence(b)|

    Args:
        probabilities: shape `(n, classes)`; each row sums to 1.
        labels: int64, shape `(n,)`.
        bins: number of bins over [0, 1].

    Source: Guo et al. (2017), equation 3.

    Example:
        >>> expected_calibration_error(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        0.5
    """
    confidence, predicted = probabilities.double().max(1)
    hit = (predicted == labels).double()
    # Bins are open on the left, so a confidence of 1 falls into the last one.
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, confidence - hit)
    return float(gap.abs().sum() / len(labels))
