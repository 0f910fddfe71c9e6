"""Flips, rolls, diagonals, repeats and the like: a rearranged axis keeps its order.

The other axes pass through. Copies and shuffled blocks are products, whose units stay free.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.cutting import factor
from fl_rebasin.symmetry.rules.new_axes import with_new_axes
from fl_rebasin.symmetry.rules.protocol import Rule, Trace, with_in_place
from fl_rebasin.symmetry.terms import UNIT, Term, Unknown, pin, product
from fl_rebasin.symmetry.unify import mix, unify


def flip(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The flipped axes keep their order; the others pass through."""
    trace.assign(out, with_new_axes(trace.axes(args[0]), args[1], out.shape, "flipped"))
    return True


def roll(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The rolled axes keep their order; without an axis there is no rule."""
    if len(args) < 3 or not args[2]:
        return False
    trace.assign(out, with_new_axes(trace.axes(args[0]), args[2], out.shape, "rolled"))
    return True


def rot90(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The axes of the rotated plane keep their order; the others pass through."""
    plane = args[2] if len(args) > 2 else (0, 1)
    trace.assign(out, with_new_axes(trace.axes(args[0]), plane, out.shape, "rotated"))
    return True


def triangle(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The rows and columns of a triangle keep their order."""
    axes = trace.axes(args[0])
    for term in axes[-2:]:
        pin(term, "triangle of a matrix")
    trace.assign(out, axes)
    return True


def diagonal(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The two axes of a main diagonal are the same; those of another diagonal are pinned."""
    axes = trace.axes(args[0])
    offset, one, other = args[1:] + (0, 0, 1)[len(args) - 1 :]
    plane = [one % len(axes), other % len(axes)]
    rows, columns = (axes[dim] for dim in plane)
    last: Term = rows
    mix(axes, plane)
    if offset == 0 and rows.size == columns.size:
        unify(rows, columns)
    else:
        pin(rows, "diagonal")
        pin(columns, "diagonal")
        last = Unknown(out.shape[-1], "diagonal")
    trace.assign(out, [*(term for dim, term in enumerate(axes) if dim not in plane), last])
    return True


def diag_embed(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The last axis becomes both axes of a main diagonal; for another diagonal it is pinned."""
    *kept, last = axes = trace.axes(args[0])
    offset, one, other = args[1:] + (0, -2, -1)[len(args) - 1 :]
    if offset:
        with_new_axes(axes, [-1], args[0].shape, "diagonal")
    for dim in sorted((one % out.ndim, other % out.ndim)):
        kept.insert(dim, Unknown(out.shape[dim], "diagonal") if offset else last)
    trace.assign(out, kept)
    return True


def repeat(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Copies in sequence: a product of the copies and the axis."""
    axes = trace.axes(args[0])
    full = [*[UNIT] * (out.ndim - len(axes)), *axes]
    trace.assign(
        out,
        [
            product([Unknown(times), term]) if times and term.size else Unknown(0, "empty axis")
            for term, times in zip(full, args[1], strict=True)
        ],
    )
    return True


def as_strided(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Followed only if it changes neither shape nor layout."""
    shape, strides, offset = trace.layout
    wide = [dim for dim, size in enumerate(out.shape) if size != 1]
    if shape != out.shape or offset != out.storage_offset():
        return False
    if any(strides[dim] != out.stride(dim) for dim in wide):
        return False
    trace.assign(out, trace.axes(args[0]))
    return True


def channel_shuffle(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The channels are viewed as a matrix and transposed."""
    axes = list(trace.axes(args[0]))
    pair = factor(axes[1], args[1])
    if pair is None:
        return False
    axes[1] = product(pair[::-1])
    trace.assign(out, axes)
    return True


REARRANGING: dict[str, Rule] = {
    "flip": flip,
    "roll": roll,
    "rot90": rot90,
    **dict.fromkeys(with_in_place("tril", "triu"), triangle),
    **dict.fromkeys(("diagonal", "diagonal_copy"), diagonal),
    "diag_embed": diag_embed,
    "repeat": repeat,
    **dict.fromkeys(with_in_place("as_strided"), as_strided),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
}
