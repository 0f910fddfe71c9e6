"""State dicts as values: averages, lines between them, and whether they are finite."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

StateDict: TypeAlias = Mapping[str, Tensor]


def like(state_dict: StateDict, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return values as a state dict like another one, with the versions that modules ask for."""
    result = OrderedDict(values)
    if hasattr(state_dict, "_metadata"):
        result._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return result


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not values.is_floating_point():
        return bool(torch.isfinite(values).all())
    # One pass, no copy: NaN and infinity go through; so may what overflows on the way.
    flat = values.detach().to(torch.promote_types(values.dtype, torch.float32)).reshape(-1)
    return math.isfinite(float(flat @ flat)) or bool(torch.isfinite(values).all())


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return weights that sum to 1; equal ones for None.

    Raises:
        ValueError: no models, a wrong number of weights, or one that is negative, not finite, or
            all zero.
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
    """Return the weighted mean of tensors, taken one by one, in the dtype of the first."""
    total = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    for share, value in zip(shares, values, strict=True):
        total.add_(value.detach().double(), alpha=share)
    return (total if first.is_floating_point() else total.round()).to(first.dtype)


def average(state_dicts: Sequence[StateDict], weights: Sequence[float] | None) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts with equal keys and shapes.

    Sums run in float64; dtypes are kept, integers are rounded.
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
        lam: place on the line, in [0, 1].

    Raises:
        ValueError: `lam` is outside [0, 1], or the keys or shapes differ.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    if odd := sorted(left.keys() ^ right.keys()):
        raise ValueError(f"the state dicts differ in their keys: only one of them has {odd[:3]}")
    if odd := [key for key in left if left[key].shape != right[key].shape]:
        raise ValueError(f"the state dicts differ in the shapes of {odd[:3]}")
    return average([left, right], [1 - lam, lam])
