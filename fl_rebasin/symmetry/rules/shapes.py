"""Views, permutes, concatenations and slices: every axis is followed to where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.cutting import cut, reshape
from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.terms import UNIT, Term, Unknown, join, pin, restrict, varying

SPLIT_UNIT = "sliced inside a block of units"
SELECTED = "one position selected by index"
STEP = "sliced with a step"


def view(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Row-major reshape: axes merge into products and split into factors."""
    reason = "reshaped across the structure of an axis"
    trace.assign(out, reshape(trace.axes(args[0]), out.shape, reason))
    return True


def transpose(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Swaps two axes, by default the first two."""
    axes = list(trace.axes(args[0]))
    if len(axes) >= 2:
        one, other = args[1:] or (0, 1)
        axes[one], axes[other] = axes[other], axes[one]
    trace.assign(out, axes)
    return True


def permute(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Reorders the axes."""
    axes = trace.axes(args[0])
    trace.assign(out, [axes[dim] for dim in args[1]])
    return True


def squeeze(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`squeeze`, `unsqueeze`: axes of size 1 vanish or appear."""
    wide = [term for term in trace.axes(args[0]) if term.size != 1]
    rest = iter(wide)
    if [term.size for term in wide] != [size for size in out.shape if size != 1]:
        return False
    trace.assign(out, [UNIT if size == 1 else next(rest) for size in out.shape])
    return True


def expand(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A broadcast axis repeats one value, so it is free."""
    axes = trace.axes(args[0])
    full: list[Term] = [UNIT] * (out.ndim - len(axes)) + list(axes)
    for dim, size in enumerate(out.shape):
        if full[dim].size != size:
            full[dim] = Unknown(size, along=tuple(full[:dim]))
    trace.assign(out, full)
    return True


def _by_part(parts: Sequence[Term], each: Sequence[Sequence[Term]]) -> list[Term]:
    """Return the axes of joined tensors: in each part those of its own tensor.

    They become the same in all parts once an operator mixes the parts.

    Args:
        parts: for each tensor its part of the joined axis.
        each: for each tensor its other axes.
    """
    return [varying(zip(parts, terms, strict=True)) for terms in zip(*each, strict=True)]


def cat(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The joined axis is a concatenation; in each part, the other axes are those of its tensor."""
    # PyTorch lets an empty one-dimensional tensor be concatenated with anything.
    tensors = [tensor for tensor in args[0] if tensor.ndim == out.ndim]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    each = [list(trace.axes(tensor)) for tensor in tensors if tensor.shape[dim]]
    if not each:
        trace.assign(out, trace.axes(tensors[0]))
        return True
    joined = [axes.pop(dim) for axes in each]
    axes = _by_part(joined, each)
    axes.insert(dim, join(joined))
    trace.assign(out, axes)
    return True


def stack(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The new axis keeps its order; at each position, the other axes are those of its tensor."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    positions = [Unknown(1, "stacked", outer=True) for _ in args[0]]
    axes = _by_part(positions, [trace.axes(tensor) for tensor in args[0]])
    axes.insert(dim, join(positions))
    trace.assign(out, axes)
    return True


def _pieces(term: Term, sizes: Sequence[int]) -> list[Term]:
    """Cut an axis into consecutive pieces; pin it where a cut would split a unit."""
    pieces: list[Term] = []
    for size in sizes:
        if size in (0, term.size):
            halves: tuple[Term, Term] | None = (
                (Unknown(0, SPLIT_UNIT), term) if size == 0 else (term, Unknown(0, SPLIT_UNIT))
            )
        else:
            halves = cut(term, size)
        if halves is None:
            pin(term, SPLIT_UNIT)
            halves = Unknown(size, SPLIT_UNIT), Unknown(term.size - size, SPLIT_UNIT)
        pieces.append(halves[0])
        term = halves[1]
    return pieces


def _within(axes: Sequence[Term], dim: int, pieces: Sequence[Term], number: int) -> list[Term]:
    """Return the axes of one piece of a tensor; axes that vary along the cut one are restricted."""
    return [
        pieces[number] if each == dim else restrict(term, pieces, number)
        for each, term in enumerate(axes)
    ]


def piece(axes: Sequence[Term], dim: int, start: int, size: int) -> list[Term]:
    """Return the axes of a tensor after the slice `[start, start + size)` of one of them."""
    whole = axes[dim]
    if size == whole.size:
        return list(axes)
    return _within(axes, dim, _pieces(whole, [start, size, whole.size - start - size]), 1)


def split(trace: Trace, func: Any, args: Any, kwargs: Any, out: Sequence[Tensor]) -> bool:
    """`split`, `chunk`: the axis becomes a concatenation of the pieces."""
    axes = trace.axes(args[0])
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(axes)
    pieces = _pieces(axes[dim], [tensor.shape[dim] for tensor in out])
    for number, tensor in enumerate(out):
        trace.assign(tensor, _within(axes, dim, pieces, number))
    return True


def slice_(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`x[a:b]`: a piece of a concatenation; a step other than 1 pins the axis."""
    axes = list(trace.axes(args[0]))
    dim = (args[1] if len(args) > 1 else 0) % len(axes)
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    step = args[4] if len(args) > 4 else 1
    whole, size = axes[dim], out.shape[dim]
    if step != 1:
        pin(whole, STEP)
        axes[dim] = Unknown(size, STEP)
    else:
        start = max(start + whole.size, 0) if start < 0 else min(start, whole.size)
        axes = piece(axes, dim, start, size)
    trace.assign(out, axes)
    return True


def select(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`x[i]`: one position selected by index, so the axis keeps its order."""
    axes = trace.axes(args[0])
    dim, number = args[1] % len(axes), args[2] % args[0].shape[args[1]]
    kept = piece(axes, dim, number, 1)
    pin(axes[dim], SELECTED)
    trace.assign(out, kept[:dim] + kept[dim + 1 :])
    return True


def unbind(trace: Trace, func: Any, args: Any, kwargs: Any, out: Sequence[Tensor]) -> bool:
    """Selects each position of an axis by index."""
    axes = trace.axes(args[0])
    dim = (args[1] if len(args) > 1 else 0) % len(axes)
    pieces = _pieces(axes[dim], [1] * len(out))
    pin(axes[dim], SELECTED)
    for number, tensor in enumerate(out):
        kept = _within(axes, dim, pieces, number)
        trace.assign(tensor, kept[:dim] + kept[dim + 1 :])
    return True


def pad(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Padding appends positions of equal value to both ends; negative padding cuts them off."""
    axes = list(trace.axes(args[0]))
    for number, (before, after) in enumerate(zip(args[1][::2], args[1][1::2], strict=True)):
        dim = len(axes) - 1 - number
        kept = axes[dim].size + min(before, 0) + min(after, 0)
        axes = piece(axes, dim, max(-before, 0), kept)
        ends = Unknown(max(before, 0)), Unknown(max(after, 0))
        axes[dim] = join([ends[0], axes[dim], ends[1]])
    trace.assign(out, axes)
    return True


SHAPES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), view),
    **dict.fromkeys(("t", "t_", "transpose", "transpose_", "numpy_T"), transpose),
    **dict.fromkeys(("unsqueeze", "unsqueeze_", "squeeze", "squeeze_"), squeeze),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), split),
    **dict.fromkeys(("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"), split),
    "permute": permute,
    "expand": expand,
    "cat": cat,
    "stack": stack,
    "slice": slice_,
    "select": select,
    "unbind": unbind,
    "constant_pad_nd": pad,
}
