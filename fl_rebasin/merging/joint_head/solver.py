"""Which head to try next: a quasi-Newton method in which each gradient costs one message.

The mean loss of a softmax regression has the Hessian E[(diag(p) - p p^T) kron (x x^T)]. It is
replaced by diag(a) kron B, with a = E[p (1 - p)] + FLOOR for each class and B = E[x x^T], which is
cheap to invert; L-BFGS corrects it from the gradients seen so far.

Source: Nocedal, Updating quasi-Newton matrices with limited storage (1980).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

PENALTY = 1e-4
"""Weight decay of the head, as a share of the features' mean square."""
SHRINK = 0.3
"""Factor on the step after a head with a higher loss."""
ENOUGH = 1e-4
"""Share of the expected decrease that a step must reach."""
FLOOR = 0.05
"""Added to the curvature of each class: with many classes it is far from constant."""


@dataclass(frozen=True)
class Point:
    """A head with what the clients say about it.

    Attributes:
        head: the head, shape `(features + 1, classes)`.
        loss: mean loss with the penalty.
        gradient: its gradient.
        curvature: E[p (1 - p)] of each class, shape `(classes,)`.
        held_back: mean loss of the held-back examples.
    """

    head: Tensor
    loss: float
    gradient: Tensor
    curvature: Tensor
    held_back: float


@dataclass(frozen=True)
class Search:
    """The state of the search: functions of it return the next head to try.

    Attributes:
        inverse: inverse of B, shape `(features + 1, features + 1)`.
        free: 1 for entries of the head that may change, else 0; broadcasts to the head's shape.
        point: the best point so far by the loss.
        step: factor on the direction from `point`.
        pairs: changes of head and gradient between earlier points, for L-BFGS.
    """

    inverse: Tensor
    free: Tensor
    point: Point
    step: float = 1.0
    pairs: tuple[tuple[Tensor, Tensor], ...] = field(default=())

    def direction(self) -> Tensor:
        """Return the descent direction at the point: minus the approximate Newton step."""
        q = self.point.gradient * self.free
        factors = []
        for change, slope in reversed(self.pairs):
            factor = (change * q).sum() / (change * slope).sum()
            factors.append(factor)
            q = q - factor * slope
        d = self.inverse @ q / (self.point.curvature + FLOOR)
        for (change, slope), factor in zip(self.pairs, reversed(factors), strict=True):
            d = d + change * (factor - (slope * d).sum() / (change * slope).sum())
        return -d * self.free

    def next_head(self) -> Tensor:
        """Return the head to try next."""
        return self.point.head + self.step * self.direction()

    def after(self, tried: Point) -> Search:
        """Return the search after the clients' answer about the head that was tried."""
        change = tried.head - self.point.head
        expected = float((self.point.gradient * self.free * change).sum())
        if not tried.loss <= self.point.loss + ENOUGH * expected:  # Written so that NaN fails.
            return replace(self, step=self.step * SHRINK)
        slope = (tried.gradient - self.point.gradient) * self.free
        useful = float((change * slope).sum()) > 0
        pairs = (*self.pairs, (change, slope)) if useful else self.pairs
        return replace(self, point=tried, step=1.0, pairs=pairs)
