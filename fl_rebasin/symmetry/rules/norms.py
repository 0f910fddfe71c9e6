"""Normalisation layers: the parameters of a channel follow the channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.cutting import factor
from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.terms import Unknown
from fl_rebasin.symmetry.unify import mix, unify, unify_elementwise


def _statistics(trace: Trace, tensors: Any) -> None:
    """Give new axes to saved statistics, which the backward pass alone reads."""
    for tensor in tensors:
        trace.assign(tensor, [Unknown(size, "saved statistics") for size in tensor.shape])


def batch_norm(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Weight, bias and running statistics follow the channels of the input."""
    axes = trace.axes(args[0])
    mix(axes, [dim for dim in range(len(axes)) if dim != 1])
    for tensor in args[1:5]:
        if isinstance(tensor, Tensor):
            unify(axes[1], trace.axes(tensor)[0])
            trace.mark_statistic(tensor)
    trace.assign(out[0], axes)
    _statistics(trace, out[1:])
    return True


def layer_norm(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Mean and variance do not depend on the order: the normalised axes stay free."""
    axes = trace.axes(args[0])
    mix(axes, range(len(axes) - len(args[1]), len(axes)))
    for tensor in args[2:4]:
        if isinstance(tensor, Tensor):
            unify_elementwise(axes[-tensor.ndim :], trace.axes(tensor))
    trace.assign(out[0], axes)
    _statistics(trace, out[1:])
    return True


def group_norm(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Groups move as blocks, and each group has its own order of channels."""
    axes, groups = trace.axes(args[0]), args[6]
    channels = axes[1]
    mix(axes, [1])
    mix(axes, range(2, len(axes)))
    if factor(channels, groups) is None:
        return False
    for tensor in args[1:3]:
        if isinstance(tensor, Tensor):
            unify(channels, trace.axes(tensor)[0])
    trace.assign(out[0], axes)
    _statistics(trace, out[1:])
    return True


BATCH_NORMS = (
    "_batch_norm_with_update",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "native_batch_norm",
)
NORMS: dict[str, Rule] = {
    **dict.fromkeys(BATCH_NORMS, batch_norm),
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
}
