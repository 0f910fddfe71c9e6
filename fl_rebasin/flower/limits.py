"""Limits on what one client may send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

MAX_EXAMPLES = 1e15
"""More examples than any client can have."""


@dataclass(frozen=True)
class Limits:
    """Limits that replies must respect.

    Attributes:
        min_replies: with fewer valid replies the global model stays unchanged.
        max_examples: a reply that claims more training examples is dropped.
        max_update_norm: a reply whose aligned model lies farther from the global model is dropped
            (Euclidean norm over all floating-point tensors); None for no limit.

    Raises:
        ValueError: a limit is not a number, or is out of range.
    """

    min_replies: int = 1
    max_examples: float = MAX_EXAMPLES
    max_update_norm: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.min_replies, bool) or not isinstance(self.min_replies, int):
            raise ValueError(f"min_replies must be an integer, got {self.min_replies!r}")
        if self.min_replies < 1:
            raise ValueError(f"min_replies must be at least 1, got {self.min_replies}")
        examples, norm = self.max_examples, self.max_update_norm
        if not isinstance(examples, Real) or not 0 < examples < float("inf"):
            raise ValueError(f"max_examples must be positive and finite, got {examples!r}")
        if norm is not None and (not isinstance(norm, Real) or not norm > 0):
            raise ValueError(f"max_update_norm must be positive, or None, got {norm!r}")


def update_norm(
    spec: PermutationSpec,
    global_model: Mapping[str, Tensor],
    model: StateDict,
    permutation: Permutation | None,
) -> float:
    """Return the distance of a model from the global one, over all floating-point tensors.

    With a permutation p that is `|p(theta) - theta_global|`. Without one it is a lower bound for
    every permutation: none changes the length of a tensor, and |a - b| >= ||a| - |b||.

    Args:
        spec: spec of both models.
        global_model: the global model.
        model: the client's model.
        permutation: the permutation that aligns it; None if it is not known yet.
    """
    squares = 0.0
    for key, reference in global_model.items():
        value = model[key]
        if not value.is_floating_point():
            continue
        if permutation is None:
            squares += (_length(value) - _length(reference)) ** 2
        else:
            squares += _length(spec.move(key, value, permutation).double() - reference) ** 2
    return float(squares**0.5)


def _length(values: Tensor) -> float:
    """Return the Euclidean norm of a tensor, in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
