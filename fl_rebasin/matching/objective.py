"""What matching maximises: the inner product of the parameters that can be learnt."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fl_rebasin.state_dicts import StateDict, is_finite
from fl_rebasin.symmetry.spec import PermutationSpec, SpecError

ORDINARY = 1e-30, 1e30
"""Models whose squared length lies between may be multiplied in float32 without loss."""
CHUNK = 2**19
"""As many products are summed in a model's own precision; they fit the cache."""


def check_finite(spec: PermutationSpec, state_dict: StateDict, name: str) -> None:
    """Raise `SpecError` unless a state dict fits the spec and all its values are finite."""
    spec.check(state_dict)
    for key in spec.axes:
        if not is_finite(state_dict[key]):
            raise SpecError(f"{name}: {key} holds NaN or infinite values")


def check_module(spec: PermutationSpec, model: nn.Module) -> None:
    """Raise unless a model is a module of the architecture.

    Raises:
        TypeError: it is not a module.
        SpecError: its state dict does not fit the spec.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, so that it can run, got {type(model).__name__}")
    spec.check(model.state_dict())


def with_weights(model: nn.Module, state_dict: StateDict) -> nn.Module:
    """Return a copy of a module that holds other weights, on the module's device."""
    filled = copy.deepcopy(model)
    filled.load_state_dict(state_dict)
    return filled


def weights_of(spec: PermutationSpec, state_dict: StateDict) -> dict[str, Tensor]:
    """Return the tensors that count in the objective, as they are: no copies."""
    return {key: state_dict[key].detach() for key in spec.learnable}


def precision_of(models: Sequence[Mapping[str, Tensor]]) -> tuple[torch.dtype, list[float]]:
    """Return the dtype in which models are multiplied, and the models' squared lengths.

    float32, but float64 for models that have such tensors, and for values so large or so small
    that their products would leave the range of float32.
    """
    squares = [inner(model, model, torch.float32) for model in models]
    double = any(value.dtype == torch.float64 for model in models for value in model.values())
    if double or not all(ORDINARY[0] <= square <= ORDINARY[1] for square in squares):
        return torch.float64, [inner(model, model) for model in models]
    return torch.float32, squares


def inner(
    left: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    precision: torch.dtype = torch.float64,
) -> float:
    """Return the inner product of two models, each tensor's in `precision`."""
    return sum(_dot(left[key].to(precision), right[key].to(precision)) for key in left)


def _dot(left: Tensor, right: Tensor) -> float:
    """Return the inner product of two tensors in their own precision, at least float32."""
    wide = torch.promote_types(left.dtype, torch.float32)
    one, other = (side.detach().to(wide).reshape(-1) for side in (left, right))
    if len(one) <= CHUNK:
        return float((one * other).sum())
    both = zip(one.split(CHUNK), other.split(CHUNK), strict=True)
    return sum(float((part * like).sum()) for part, like in both)


def cosine(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the cosine of two models; 0 where one of them is zero."""
    precision, squares = precision_of([left, right])
    return inner(left, right, precision) / (math.sqrt(squares[0] * squares[1]) or 1.0)
