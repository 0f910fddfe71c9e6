"""What a rule sees of the tracer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from fl_rebasin.unify import Term


class Trace(Protocol):
    """The part of the tracer that rules use."""

    def axes(self, tensor: Tensor) -> tuple[Term, ...]:
        """Return one term an axis of a tensor."""

    def assign(self, tensor: Tensor, terms: Sequence[Term]) -> None:
        """Say what the axes of a new tensor are."""


Rule: TypeAlias = Callable[[Trace, Any, Any, Any, Any], bool]
