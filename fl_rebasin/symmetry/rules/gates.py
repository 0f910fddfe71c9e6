"""Gated units, and pointwise operators that PyTorch does not tag as such: units correspond."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.rules.pointwise import pointwise
from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.rules.shapes import piece
from fl_rebasin.symmetry.unify import unify_elementwise


def glu(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """One half of an axis gates the other elementwise."""
    axes = list(trace.axes(args[0]))
    dim = (args[1] if len(args) > 1 else -1) % len(axes)
    size = out.shape[dim]
    left, right = (piece(axes, dim, start, size) for start in (0, size))
    unify_elementwise(left, right)
    trace.assign(out, left)
    return True


UNTAGGED = (
    "_prelu_kernel",
    "abs_",
    "gelu_",
    "hardswish",
    "hardswish_",
    "log_sigmoid_forward",
    "masked_fill_",
    "mish_",
    "threshold_",
)
GATES: dict[str, Rule] = {
    "glu": glu,
    **dict.fromkeys(UNTAGGED, pointwise),
}
