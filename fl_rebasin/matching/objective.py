"""What matching maximises: the inner product of the learnable parameters of two models.

Two models theta_1 and theta_2 are closest when their inner product is largest, since a permutation
p keeps the norm:

    argmin over p of |theta_1 - p(theta_2)|^2 = argmax over p of <theta_1, p(theta_2)>

Source: Git Re-Basin, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fl_rebasin.state_dicts import StateDict, is_finite
from fl_rebasin.symmetry.spec import PermutationSpec, SpecError

FLOAT32_RANGE = 1e-30, 1e30
"""Models whose squared norms lie in this range can be multiplied in float32."""
CHUNK = 2**19
"""Number of products summed at once, in the models' own precision: they fit the CPU's cache."""


def check_finite(spec: PermutationSpec, state_dict: StateDict, name: str) -> None:
    """Check that a state dict fits the spec and that all its values are finite.

    Raises:
        SpecError: it does not fit the spec, or holds NaN or infinite values.
    """
    spec.check(state_dict)
    for key in spec.axes:
        if not is_finite(state_dict[key]):
            raise SpecError(f"{name}: {key} holds NaN or infinite values")


def check_module(spec: PermutationSpec, model: nn.Module) -> None:
    """Check that a model is a module of the spec's architecture.

    Raises:
        TypeError: it is not a module.
        SpecError: its state dict does not fit the spec.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a module of the architecture, got {type(model).__name__}: pass the "
            "module first, then the state dicts"
        )
    spec.check(model.state_dict())


def weights_of(spec: PermutationSpec, state_dict: StateDict) -> dict[str, Tensor]:
    """Return the tensors that count in the objective: the learnable parameters, not copied."""
    return {key: state_dict[key].detach() for key in spec.learnable}


def precision_of(models: Sequence[Mapping[str, Tensor]]) -> tuple[torch.dtype, list[float]]:
    """Return the dtype to multiply models in, and the models' squared norms.

    The dtype is float32, or float64 if a model has float64 tensors or if products of its values
    would leave the range of float32.
    """
    squares = [inner(model, model, torch.float32) for model in models]
    double = any(value.dtype == torch.float64 for model in models for value in model.values())
    low, high = FLOAT32_RANGE
    if double or not all(low <= square <= high for square in squares):
        return torch.float64, [inner(model, model) for model in models]
    return torch.float32, squares


def inner(
    left: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    precision: torch.dtype = torch.float64,
) -> float:
    """Return the inner product of two models, with each tensor's product in `precision`."""
    return sum(_dot(left[key].to(precision), right[key].to(precision)) for key in left)


def _dot(left: Tensor, right: Tensor) -> float:
    """Return the inner product of two tensors in their own precision, at least float32."""
    wide = torch.promote_types(left.dtype, torch.float32)
    one, other = (side.detach().to(wide).reshape(-1) for side in (left, right))
    if len(one) <= CHUNK:
        return float((one * other).sum())
    chunks = zip(one.split(CHUNK), other.split(CHUNK), strict=True)
    return sum(float((part * twin).sum()) for part, twin in chunks)


def cosine(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the cosine of the angle between two models; 0 if one of them is zero."""
    precision, squares = precision_of([left, right])
    return inner(left, right, precision) / (math.sqrt(squares[0] * squares[1]) or 1.0)
