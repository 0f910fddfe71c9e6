"""Sorting, searching and running totals: an axis whose order counts is pinned, the others pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.rules.reductions import reduce
from fl_rebasin.symmetry.unify import UNIT, Term, Unknown, mix, pin


def renew(
    axes: Sequence[Term], dims: Collection[int], shape: Sequence[int], reason: str
) -> list[Term]:
    """Pin some axes, and return the axes of a result of some shape in which these are new ones."""
    places = {dim % len(axes) for dim in dims}
    mix(axes, places)
    for dim in places:
        pin(axes[dim], reason)
    return [
        Unknown(size, reason) if dim in places else term
        for dim, (term, size) in enumerate(zip(axes, shape, strict=True))
    ]


def _sorted(place: int) -> Rule:
    """Return the rule of sorting: values do not depend on the order they came in, places do."""

    def rule(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        axes = trace.axes(args[0])
        if not axes:
            return False
        dim = (args[place] if len(args) > place else kwargs.get("dim", -1)) % len(axes)
        mix(axes, [dim])
        for result in out:
            terms = list(axes)
            terms[dim] = Unknown(result.shape[dim], "sorted")
            trace.assign(result, terms)
        trace.pin_if_used(out[1], axes[dim], "searched for a place's number")
        return True

    return rule


def _in_order(place: int, reason: str) -> Rule:
    """Return the rule of operators that go through one axis, their argument number `place`."""

    def rule(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        axes = trace.axes(args[0])
        if not axes:
            return False
        dim = args[place] if len(args) > place else kwargs.get("dim", -1)
        for result in tree_leaves(out):
            trace.assign(result, renew(axes, [dim], result.shape, reason))
        return True

    return rule


def _pick(place: int, default: int | None) -> Rule:
    """Return the rule of operators that answer with a place's number: its axis keeps its order."""

    def rule(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        axes = trace.axes(args[0])
        if not axes:
            return False
        dim = args[place] if len(args) > place else kwargs.get("dim", default)
        gone = set(range(len(axes))) if dim is None else {dim % len(axes)}
        mix(axes, gone)
        kept = [term for each, term in enumerate(axes) if each not in gone]
        held = [UNIT if each in gone else term for each, term in enumerate(axes)]
        for result in tree_leaves(out):
            trace.assign(result, held if result.ndim == len(axes) else kept)
            if not result.is_floating_point():
                for each in gone:
                    trace.pin_if_used(result, axes[each], "searched for a place's number")
        return True

    return rule


def extremum(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Without an axis one value of all, in any order; with one, a place's number as well."""
    if not isinstance(out, Tensor):
        return _pick(1, None)(trace, func, args, kwargs, out)
    return len(args) == 1 and reduce(trace, func, args, {}, out)


def value_range(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Smallest and largest value, without their places: the axis does not care for order."""
    return args[0].ndim > 0 and reduce(trace, func, args, kwargs, out)


ORDERING: dict[str, Rule] = {
    "sort": _sorted(1),
    "topk": _sorted(2),
    **dict.fromkeys(
        ("cumsum", "cumsum_", "cumprod", "cumprod_", "cummax", "cummin", "logcumsumexp"),
        _in_order(1, "cumulated"),
    ),
    **dict.fromkeys(("argmax", "argmin"), _pick(1, None)),
    "kthvalue": _pick(2, -1),
    "mode": _pick(1, -1),
    **dict.fromkeys(("max", "min", "median", "nanmedian"), extremum),
    "aminmax": value_range,
}
