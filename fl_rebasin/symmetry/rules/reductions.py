"""Sums, means, maxima and softmax: the result does not depend on the order of a reduced axis."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.terms import UNIT
from fl_rebasin.symmetry.unify import mix


def reduce(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Reduces the axes in the second argument, or all axes without one."""
    axes = trace.axes(args[0])
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    if not axes:
        trace.assign(out, axes)
        return True
    gone = {dim % len(axes) for dim in dims} if dims else set(range(len(axes)))
    mix(axes, gone)
    kept = [term for dim, term in enumerate(axes) if dim not in gone]
    held = [UNIT if dim in gone else term for dim, term in enumerate(axes)]
    for result in tree_leaves(out):
        if isinstance(result, Tensor):
            trace.assign(result, held if result.ndim == len(axes) else kept)
    return True


def softmax(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The normaliser is a sum, so every axis passes through."""
    axes = trace.axes(args[0])
    if axes:
        mix(axes, [args[1] % len(axes)])
    trace.assign(out, axes)
    return True


REDUCTIONS: dict[str, Rule] = {
    **dict.fromkeys(("mean", "sum", "amax", "amin", "logsumexp", "any", "all", "prod"), reduce),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), softmax),
}
