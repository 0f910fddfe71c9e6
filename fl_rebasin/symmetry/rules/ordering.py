"""Sorting, searching and cumulative sums: an axis is pinned if its order matters."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fl_rebasin.symmetry.rules.new_axes import with_new_axes
from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.rules.reductions import reduce
from fl_rebasin.symmetry.terms import UNIT, Unknown
from fl_rebasin.symmetry.unify import mix

SEARCHED = "searched for an index"


def _sorted(argument: int) -> Rule:
    """Return the rule for sorting: the indices depend on the order of the axis, the values do not.

    Args:
        argument: index of the argument that gives the axis.
    """

    def rule(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        axes = trace.axes(args[0])
        if not axes:
            return False
        dim = (args[argument] if len(args) > argument else kwargs.get("dim", -1)) % len(axes)
        mix(axes, [dim])
        for result in out:
            terms = list(axes)
            terms[dim] = Unknown(result.shape[dim], "sorted")
            trace.assign(result, terms)
        trace.pin_if_used(out[1], axes[dim], SEARCHED)
        return True

    return rule


def _in_order(argument: int, reason: str) -> Rule:
    """Return the rule for operators that run along one axis in order.

    Args:
        argument: index of the argument that gives the axis.
        reason: why that axis is pinned.
    """

    def rule(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        axes = trace.axes(args[0])
        if not axes:
            return False
        dim = args[argument] if len(args) > argument else kwargs.get("dim", -1)
        for result in tree_leaves(out):
            trace.assign(result, with_new_axes(axes, [dim], result.shape, reason))
        return True

    return rule


def _pick(argument: int, default: int | None) -> Rule:
    """Return the rule for operators that return an index: if it is used, its axis is pinned.

    Args:
        argument: index of the argument that gives the axis.
        default: the axis if that argument is missing; None for all axes.
    """

    def rule(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        axes = trace.axes(args[0])
        if not axes:
            return False
        dim = args[argument] if len(args) > argument else kwargs.get("dim", default)
        gone = set(range(len(axes))) if dim is None else {dim % len(axes)}
        mix(axes, gone)
        kept = [term for each, term in enumerate(axes) if each not in gone]
        held = [UNIT if each in gone else term for each, term in enumerate(axes)]
        for result in tree_leaves(out):
            trace.assign(result, held if result.ndim == len(axes) else kept)
            if not result.is_floating_point():
                for each in gone:
                    trace.pin_if_used(result, axes[each], SEARCHED)
        return True

    return rule


def extremum(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Without an axis one value, whatever the order; with an axis an index as well."""
    if not isinstance(out, Tensor):
        return _pick(1, None)(trace, func, args, kwargs, out)
    return len(args) == 1 and reduce(trace, func, args, {}, out)


def value_range(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Smallest and largest value, without their indices: the order does not matter."""
    return args[0].ndim > 0 and reduce(trace, func, args, kwargs, out)


ORDERING: dict[str, Rule] = {
    "sort": _sorted(1),
    "topk": _sorted(2),
    **dict.fromkeys(
        ("cumsum", "cumsum_", "cumprod", "cumprod_", "cummax", "cummin", "logcumsumexp"),
        _in_order(1, "accumulated in order"),
    ),
    **dict.fromkeys(("argmax", "argmin"), _pick(1, None)),
    "kthvalue": _pick(2, -1),
    "mode": _pick(1, -1),
    **dict.fromkeys(("max", "min", "median", "nanmedian"), extremum),
    "aminmax": value_range,
}
