"""Operations on state dicts: averages, interpolation, and checks for finite values."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

StateDict: TypeAlias = Mapping[str, Tensor]


def like(state_dict: StateDict, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of `values` that carries the metadata of another state dict.

    Modules store the version of their format there, and read it when they load a state dict.
    """
    result = OrderedDict(values)
    if hasattr(state_dict, "_metadata"):
        result._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return result


def with_weights(model: nn.Module, state_dict: StateDict) -> nn.Module:
    """Return a copy of a module that holds other weights, in the module's dtypes and device."""
    filled = copy.deepcopy(model)
    filled.load_state_dict(state_dict)
    return filled


def is_finite(values: Tensor) -> bool:
    """Return whether a tensor contains neither NaN nor infinity."""
    if not values.is_floating_point():
        return bool(torch.isfinite(values).all())
    # The squared norm of a tensor with NaN or infinity is not finite either, and takes one pass
    # without a copy. It can also overflow, so only a finite one is conclusive.
    flat = values.detach().to(torch.promote_types(values.dtype, torch.float32)).reshape(-1)
    return math.isfinite(float(flat @ flat)) or bool(torch.isfinite(values).all())


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return weights scaled to sum to 1.

    Args:
        weights: one weight for each model, on any scale; None for equal weights.
        count: number of models.

    Raises:
        ValueError: there are no models, the number of weights is wrong, a weight is negative or
            not finite, or all weights are zero.
    """
    if count == 0:
        raise ValueError("no models to merge")
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} models")
    bad = [weight for weight in weights if not 0 <= weight < float("inf")]
    if bad:
        raise ValueError(f"weights must be finite and not negative, got {bad[0]}")
    total = float(sum(weights))
    if total == 0:
        raise ValueError("all weights are 0: give at least one model a positive weight")
    return [float(weight) / total for weight in weights]


def weighted_mean(values: Iterable[Tensor], shares: Sequence[float], first: Tensor) -> Tensor:
    """Return the weighted mean of tensors, summed in float64, or complex128 if they are complex.

    Args:
        values: tensors of equal shape; each is released before the next one is requested.
        shares: their weights, which sum to 1.
        first: a tensor with the shape, dtype and device of the result; integers are rounded.
    """
    wide = torch.complex128 if first.is_complex() else torch.float64
    total = torch.zeros(first.shape, dtype=wide, device=first.device)
    for share, value in zip(shares, values, strict=True):
        total.add_(value.detach().to(wide), alpha=share)
    exact = not (first.is_floating_point() or first.is_complex())
    return (total.round() if exact else total).to(first.dtype)


def average(state_dicts: Sequence[StateDict], weights: Sequence[float] | None) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts, `sum_i w_i theta_i / sum_i w_i`, key by key.

    Sums run in float64. Dtypes are kept; integers are rounded.

    Args:
        state_dicts: state dicts with equal keys and shapes, at least one.
        weights: one weight for each, on any scale; None for equal weights.

    Raises:
        ValueError: there are no models, or the weights are invalid.
    """
    shares = normalised(weights, len(state_dicts))
    merged = {}
    for key, first in state_dicts[0].items():
        values = (state_dict[key] for state_dict in state_dicts)
        merged[key] = weighted_mean(values, shares, first)
    return like(state_dicts[0], merged)


def interpolate(left: StateDict, right: StateDict, lam: float) -> dict[str, Tensor]:
    """Return `(1 - lam) * left + lam * right`, key by key; dtypes are kept, integers rounded.

    Args:
        left: state dict at `lam = 0`.
        right: state dict at `lam = 1`, with the same keys and shapes.
        lam: position on the line, in [0, 1].

    Raises:
        ValueError: `lam` is outside [0, 1], or the keys or shapes differ.

    Example:
        >>> zero, two = {"x": torch.zeros(1)}, {"x": 2 * torch.ones(1)}
        >>> interpolate(zero, two, 0.25)["x"]
        tensor([0.5000])
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    if unshared := sorted(left.keys() ^ right.keys()):
        raise ValueError(
            f"the state dicts differ in their keys: only one of them has {unshared[:3]}"
        )
    if unequal := [key for key in left if left[key].shape != right[key].shape]:
        raise ValueError(f"the state dicts differ in the shapes of {unequal[:3]}")
    return average([left, right], [1 - lam, lam])
