"""What a rule sees of the tracer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from fl_rebasin.symmetry.unify import Term


class Trace(Protocol):
    """The part of the tracer that rules use.

    `layout`: sizes, strides and offset that the first argument had before the call.
    """

    layout: Any

    def axes(self, tensor: Tensor) -> tuple[Term, ...]:
        """Return one term an axis of a tensor."""

    def assign(self, tensor: Tensor, terms: Sequence[Term]) -> None:
        """Say what the axes of a new tensor are."""

    def pin_if_used(self, tensor: Tensor, term: Term, reason: str) -> None:
        """Pin an axis as soon as the values of a tensor, which tell its order, are used."""

    def mark_statistic(self, tensor: Tensor) -> None:
        """Say that a buffer describes a unit, and moves with it even if no run updates it."""

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to the model and not to its state or its inputs."""


Rule: TypeAlias = Callable[[Trace, Any, Any, Any, Any], bool]
