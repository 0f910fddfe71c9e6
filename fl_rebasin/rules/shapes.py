"""Operators that only rearrange: views, permutes, concatenations, cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fl_rebasin.rules.protocol import Rule, Trace
from fl_rebasin.unify import UNIT, Term, Unknown, cut, join, pin, reshape, unify

TORN = "cut out of an axis that cannot be cut there"


def view(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Row-major reshape: axes merge into products and split into factors."""
    reason = "reshaped across the structure of an axis"
    trace.assign(out, reshape(trace.axes(args[0]), out.shape, reason))
    return True


def transpose(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Swap two axes (the first two without arguments)."""
    axes = list(trace.axes(args[0]))
    if len(axes) >= 2:
        one, other = args[1:] or (0, 1)
        axes[one], axes[other] = axes[other], axes[one]
    trace.assign(out, axes)
    return True


def permute(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Reorder the axes."""
    axes = trace.axes(args[0])
    trace.assign(out, [axes[dim] for dim in args[1]])
    return True


def resize(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`unsqueeze`, `squeeze`: only axes of size 1 come and go."""
    wide = [term for term in trace.axes(args[0]) if term.size != 1]
    rest = iter(wide)
    if [term.size for term in wide] != [size for size in out.shape if size != 1]:
        return False
    trace.assign(out, [UNIT if size == 1 else next(rest) for size in out.shape])
    return True


def expand(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Broadcast axes hold the same value everywhere: they are free."""
    axes = trace.axes(args[0])
    full: list[Term] = [UNIT] * (out.ndim - len(axes)) + list(axes)
    pairs = zip(full, out.shape, strict=True)
    trace.assign(out, [term if term.size == size else Unknown(size) for term, size in pairs])
    return True


def cat(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The joined axis is a concatenation; the others are the same."""
    # An empty one-dimensional tensor may be concatenated with anything, and adds nothing.
    tensors = [tensor for tensor in args[0] if tensor.ndim == out.ndim]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    axes = list(trace.axes(tensors[0]))
    for tensor in tensors[1:]:
        for place, term in enumerate(trace.axes(tensor)):
            if place != dim:
                unify(axes[place], term)
    axes[dim] = join([trace.axes(tensor)[dim] for tensor in tensors])
    trace.assign(out, axes)
    return True


def stack(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The new axis keeps its order; the others are the same."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    axes = list(trace.axes(args[0][0]))
    for tensor in args[0][1:]:
        for one, other in zip(axes, trace.axes(tensor), strict=True):
            unify(one, other)
    axes.insert(dim, Unknown(out.shape[dim], "stacked"))
    trace.assign(out, axes)
    return True


def _pieces(term: Term, sizes: Sequence[int]) -> list[Term]:
    """Cut an axis into consecutive pieces; pin it where a cut would tear a unit."""
    pieces: list[Term] = []
    for size in sizes:
        if size in (0, term.size):
            halves: tuple[Term, Term] | None = (
                (Unknown(0, TORN), term) if size == 0 else (term, Unknown(0, TORN))
            )
        else:
            halves = cut(term, size)
        if halves is None:
            pin(term, TORN)
            halves = Unknown(size, TORN), Unknown(term.size - size, TORN)
        pieces.append(halves[0])
        term = halves[1]
    return pieces


def split(trace: Trace, func: Any, args: Any, kwargs: Any, out: Sequence[Tensor]) -> bool:
    """`split`, `chunk`: the axis becomes a concatenation of the pieces."""
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    axes = trace.axes(args[0])
    for tensor, piece in zip(
        out, _pieces(axes[dim], [tensor.shape[dim] for tensor in out]), strict=True
    ):
        terms = list(axes)
        terms[dim] = piece
        trace.assign(tensor, terms)
    return True


def slice_(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`x[a:b]`: a piece of the concatenation; a stride other than 1 pins the axis."""
    dim = args[1] if len(args) > 1 else 0
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    step = args[4] if len(args) > 4 else 1
    axes = list(trace.axes(args[0]))
    whole, size = axes[dim], out.shape[dim]
    if step != 1:
        pin(whole, "taken with a stride")
        axes[dim] = Unknown(size, "taken with a stride")
    elif size != whole.size:
        start = max(start + whole.size, 0) if start < 0 else min(start, whole.size)
        axes[dim] = _pieces(whole, [start, size, whole.size - start - size])[1]
    trace.assign(out, axes)
    return True


def select(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`x[i]`: one place by its number, so the axis keeps its order."""
    axes = list(trace.axes(args[0]))
    pin(axes.pop(args[1]), "one place taken by its number")
    trace.assign(out, axes)
    return True


def unbind(trace: Trace, func: Any, args: Any, kwargs: Any, out: Sequence[Tensor]) -> bool:
    """All places of an axis by their numbers."""
    dim = args[1] if len(args) > 1 else 0
    axes = list(trace.axes(args[0]))
    pin(axes.pop(dim), "one place taken by its number")
    for tensor in out:
        trace.assign(tensor, axes)
    return True


def pad(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Padding with a constant joins places that are all alike to both ends."""
    axes = list(trace.axes(args[0]))
    for place, (before, after) in enumerate(zip(args[1][::2], args[1][1::2], strict=True)):
        dim = len(axes) - 1 - place
        if before < 0 or after < 0:
            return False
        axes[dim] = join([Unknown(before), axes[dim], Unknown(after)])
    trace.assign(out, axes)
    return True


def embedding(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Rows are looked up by their numbers; columns are units."""
    rows, columns = trace.axes(args[0])
    pin(rows, "looked up by number")
    trace.assign(out, [*trace.axes(args[1]), columns])
    return True


SHAPES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), view),
    **dict.fromkeys(("t", "transpose", "numpy_T"), transpose),
    **dict.fromkeys(("unsqueeze", "squeeze"), resize),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), split),
    "permute": permute,
    "expand": expand,
    "cat": cat,
    "stack": stack,
    "slice": slice_,
    "select": select,
    "unbind": unbind,
    "constant_pad_nd": pad,
    "embedding": embedding,
}
