"""What a rule is, and the part of the tracer that it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from fl_rebasin.symmetry.terms import Term


class Trace(Protocol):
    """The part of the tracer that rules use.

    Attributes:
        layout: sizes, strides and offset of the first argument before the call.
    """

    layout: Any

    def axes(self, tensor: Tensor) -> tuple[Term, ...]:
        """Return the term of each axis of a tensor."""

    def assign(self, tensor: Tensor, terms: Sequence[Term]) -> None:
        """Set the axes of a new tensor."""

    def pin_if_used(self, tensor: Tensor, term: Term, reason: str) -> None:
        """Pin an axis as soon as an operator uses a tensor whose values depend on its order."""

    def mark_statistic(self, tensor: Tensor) -> None:
        """Record that a buffer describes units, and moves with them even if no run updates it."""

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to the model but neither to its state nor to its inputs."""


Rule: TypeAlias = Callable[[Trace, Any, Any, Any, Any], bool]
"""A function of the tracer, the operator, its arguments, its keyword arguments and its result."""


def with_in_place(*names: str) -> list[str]:
    """Return the names of operators and of their in-place variants."""
    return [name + end for name in names for end in ("", "_")]
