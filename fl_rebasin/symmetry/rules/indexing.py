"""Looking up, writing and rearranging by number: that axis is pinned, the others pass through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fl_rebasin.symmetry.rules.ordering import renew
from fl_rebasin.symmetry.rules.pointwise import broadcast
from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.rules.shapes import piece
from fl_rebasin.symmetry.unify import (
    UNIT,
    Term,
    Unknown,
    factor,
    leaves,
    mix,
    pin,
    product,
    unify,
    unify_places,
)

BY_NUMBER = "looked up by number"
POSITION = "position in an image"
KERNEL = "kernel position"


def _carry(term: Term) -> Term:
    """Return what an axis of an index is in the result: a new axis if its order is fixed."""
    if term.size == 1 or any(leaf.reason is None for leaf in leaves(term)):
        return term
    return Unknown(term.size, BY_NUMBER)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _looked_up(
    trace: Trace, source: Tensor, indices: Sequence[Tensor | None]
) -> tuple[list[Term], range] | None:
    """Return the axes of `source[indices]`, and which of them come from the indices.

    A mask covers as many axes as it has, and makes one. The axes of the indices stand where the
    indexed ones stood, in front if these are not neighbours.
    """
    tensors = [index for index in indices if index is not None]
    if not tensors or any(_is_mask(index) and not index.ndim for index in tensors):
        return None
    gone: list[int] = []
    dim = 0
    for index in indices:
        width = 1 if index is None or not _is_mask(index) else index.ndim
        gone += () if index is None else range(dim, dim + width)
        dim += width
    if any(map(_is_mask, tensors)):
        for index in tensors:
            for term in trace.axes(index):
                pin(term, BY_NUMBER)
        shapes = [
            (int(index.count_nonzero()),) if _is_mask(index) else index.shape for index in tensors
        ]
        new: list[Term] = [Unknown(size, BY_NUMBER) for size in torch.broadcast_shapes(*shapes)]
    else:
        new = [_carry(term) for term in broadcast(trace, tensors)]
    axes = trace.axes(source)
    mix(axes, gone)
    for dim in gone:
        pin(axes[dim], BY_NUMBER)
    kept = [term for dim, term in enumerate(axes) if dim not in gone]
    start = gone[0] if gone[-1] - gone[0] == len(gone) - 1 else 0
    return [*kept[:start], *new, *kept[start:]], range(start, start + len(new))


def _consecutive(
    trace: Trace, indices: Sequence[Tensor | None], shape: Sequence[int]
) -> tuple[int, int] | None:
    """Return axis and start if the one index is a constant and means a slice, as `x[:, [3, 4]]`."""
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].ndim != 1 or _is_mask(given[0][1]):
        return None
    dim, index = given[0]
    size = shape[dim]
    if not index.numel() or not trace.is_constant(index):
        return None
    numbers = [number % size for number in index.tolist()]
    consecutive = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return (dim, numbers[0]) if consecutive else None


def index(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`x[i, :, mask]`: looked up by numbers or masks; the other axes pass through."""
    run = _consecutive(trace, args[1], args[0].shape)
    if run is not None:
        axes = trace.axes(args[0])
        trace.assign(out, piece(axes, run[0], run[1], out.shape[run[0]]))
        return True
    found = _looked_up(trace, args[0], args[1])
    if found is None or tuple(term.size for term in found[0]) != tuple(out.shape):
        return False
    trace.assign(out, found[0])
    return True


def index_put(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`x[i, :, mask] = values`, or `+=`; the values broadcast."""
    found = _looked_up(trace, args[0], args[1])
    values = trace.axes(args[2])
    if found is None or len(values) > len(found[0]):
        return False
    axes, new = found
    first = len(axes) - len(values)
    if not (len(args) > 3 and args[3]):
        # Of several values for one place the last may win.
        for dim in new:
            pin(axes[dim], BY_NUMBER)
    mix(values, [dim - first for dim in new if dim >= first])
    unify_places(axes[first:], values)
    trace.assign(out, trace.axes(args[0]))
    return True


def index_select(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Places of one axis by their numbers."""
    axes, numbers = trace.axes(args[0]), trace.axes(args[2])
    if not axes:
        return False
    terms = renew(axes, [args[1]], out.shape, BY_NUMBER)
    terms[args[1]] = _carry(numbers[0]) if numbers else UNIT
    trace.assign(out, terms)
    return True


def index_add(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Rows are combined into the rows with some numbers; in `index_copy` the last one wins."""
    axes, numbers, rows = trace.axes(args[0]), trace.axes(args[2]), trace.axes(args[3])
    if not axes or len(rows) != len(axes):
        return False
    dim = args[1] % len(axes)
    pin(axes[dim], BY_NUMBER)
    for term in numbers:
        unify(term, rows[dim])
        if func.overloadpacket.__name__.startswith("index_copy"):
            pin(term, BY_NUMBER)
    for terms in (axes, rows):
        mix(terms, [dim])
    unify_places(*([term for d, term in enumerate(terms) if d != dim] for terms in (axes, rows)))
    trace.assign(out, axes)
    return True


def index_fill(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Rows with some numbers get one value."""
    axes = trace.axes(args[0])
    if not axes:
        return False
    pin(axes[args[1]], BY_NUMBER)
    trace.assign(out, axes)
    return True


def _beside(dim: int, one: Sequence[Term], other: Sequence[Term]) -> set[int]:
    """Unify all axes but one of two tensors, and return those that fit; pin those that do not."""
    for terms in (one, other):
        mix(terms, [dim])
    fit = [d for d in range(len(one)) if d != dim and one[d].size == other[d].size]
    unify_places([one[d] for d in fit], [other[d] for d in fit])
    for d in {*range(len(one))} - {dim, *fit}:
        pin(one[d], "a part of an axis")
        pin(other[d], "a part of an axis")
    return set(fit)


def gather(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`out[i, j] = x[index[i, j], j]`: an axis beside is the same in all three."""
    axes, numbers = trace.axes(args[0]), trace.axes(args[2])
    if not axes or len(numbers) != len(axes):
        return False
    dim = args[1] % len(axes)
    fit = _beside(dim, axes, numbers)
    pin(axes[dim], BY_NUMBER)
    terms: list[Term] = [
        axes[d] if d in fit else Unknown(size, "a part of an axis")
        for d, size in enumerate(out.shape)
    ]
    terms[dim] = _carry(numbers[dim])
    trace.assign(out, terms)
    return True


def scatter(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`x[index[i, j], j] = values[i, j]`, or combined with it: an axis beside is the same."""
    axes, numbers = trace.axes(args[0]), trace.axes(args[2])
    if not axes or len(numbers) != len(axes):
        return False
    dim = args[1] % len(axes)
    _beside(dim, axes, numbers)
    pin(axes[dim], BY_NUMBER)
    if isinstance(args[3], Tensor):
        rows = trace.axes(args[3])
        if len(rows) != len(axes):
            return False
        _beside(dim, rows, numbers)
        if rows[dim].size == numbers[dim].size:
            unify(rows[dim], numbers[dim])
        else:
            pin(rows[dim], "a part of an axis")
            pin(numbers[dim], "a part of an axis")
        if len(args) == 4 and "reduce" not in kwargs and "add" not in func.overloadpacket.__name__:
            # Of several values for one place the last may win.
            pin(numbers[dim], BY_NUMBER)
    trace.assign(out, axes)
    return True


def take(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Places of the flattened tensor by their numbers."""
    for term in trace.axes(args[0]):
        pin(term, BY_NUMBER)
    trace.assign(out, [_carry(term) for term in trace.axes(args[1])])
    return True


def embedding_bag(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Rows are looked up by their numbers and combined bag by bag; columns are units."""
    columns = renew(trace.axes(args[0]), [0], args[0].shape, BY_NUMBER)[1]
    for tensor in (*args[1:3], *args[6:7]):
        if isinstance(tensor, Tensor):
            for term in trace.axes(tensor):
                pin(term, BY_NUMBER)
    for result in out:
        terms: list[Term] = [Unknown(size, BY_NUMBER) for size in result.shape]
        if result.ndim == 2 and result.shape[1] == columns.size:
            # The bags, and with the mode "max" the numbers of the rows that were the largest.
            terms[1] = columns
        trace.assign(result, terms)
    return True


def embedding_renorm(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Rows with some numbers are scaled by their norm, in place."""
    axes = trace.axes(args[0])
    pin(axes[0], BY_NUMBER)
    mix(axes, [1])
    trace.assign(out, axes)
    return True


def pack(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Time and batch become one axis in order of length; features pass through."""
    axes = trace.axes(args[0])
    renew(axes, [0, 1], args[0].shape, "packed sequence")
    trace.assign(out[0], [Unknown(out[0].shape[0], "packed sequence"), *axes[2:]])
    trace.assign(out[1], [Unknown(out[1].shape[0], "packed sequence")])
    return True


def flip(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The flipped axes keep their order; the others pass through."""
    trace.assign(out, renew(trace.axes(args[0]), args[1], out.shape, "flipped"))
    return True


def roll(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The rolled axes keep their order; without an axis the tensor is rolled as one."""
    if len(args) < 3 or not args[2]:
        return False
    trace.assign(out, renew(trace.axes(args[0]), args[2], out.shape, "rolled"))
    return True


def rot90(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The plane that is turned keeps its order; the other axes pass through."""
    plane = args[2] if len(args) > 2 else (0, 1)
    trace.assign(out, renew(trace.axes(args[0]), plane, out.shape, "rotated"))
    return True


def triangle(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Rows and columns of a triangle keep their order."""
    axes = trace.axes(args[0])
    for term in axes[-2:]:
        pin(term, "triangle of a matrix")
    trace.assign(out, axes)
    return True


def diagonal(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The axes of a main diagonal are one; beside it both keep their order."""
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
    """The last axis becomes both axes of a main diagonal; beside it it keeps its order."""
    *kept, last = axes = trace.axes(args[0])
    offset, one, other = args[1:] + (0, -2, -1)[len(args) - 1 :]
    if offset:
        renew(axes, [-1], args[0].shape, "diagonal")
    for dim in sorted((one % out.ndim, other % out.ndim)):
        kept.insert(dim, Unknown(out.shape[dim], "diagonal") if offset else last)
    trace.assign(out, kept)
    return True


def repeat(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Copies one after another: blocks that are all alike."""
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
    """Followed only where it changes nothing."""
    shape, strides, offset = trace.layout
    wide = [dim for dim, size in enumerate(out.shape) if size != 1]
    if shape != out.shape or offset != out.storage_offset():
        return False
    if any(strides[dim] != out.stride(dim) for dim in wide):
        return False
    trace.assign(out, trace.axes(args[0]))
    return True


def unfold(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Windows of one axis: that axis keeps its order, the others pass through."""
    axes = trace.axes(args[0])
    if not axes:
        return False
    terms = renew(axes, [args[1]], out.shape[:-1], "cut into windows")
    trace.assign(out, [*terms, Unknown(out.shape[-1], "cut into windows")])
    return True


def im2col(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Patches of an image: each channel becomes a block of kernel positions."""
    axes = trace.axes(args[0])
    *batch, channels, _, _ = renew(axes, [-2, -1], args[0].shape, POSITION)
    kernel = Unknown(out.shape[-2] // channels.size, KERNEL)
    trace.assign(out, [*batch, product([channels, kernel]), Unknown(out.shape[-1], POSITION)])
    return True


def col2im(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """An image is summed up from patches: the inverse of `im2col`."""
    *batch, blocks, _ = renew(trace.axes(args[0]), [-1], args[0].shape, POSITION)
    pair = factor(blocks, out.shape[-3])
    if pair is None:
        return False
    pin(pair[1], KERNEL)
    mix(pair, [1])
    positions = [Unknown(size, POSITION) for size in out.shape[-2:]]
    trace.assign(out, [*batch, pair[0], *positions])
    return True


def pixel_shuffle(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Blocks of channels become squares of pixels."""
    axes = trace.axes(args[0])
    *batch, blocks, _, _ = renew(axes, [-2, -1], args[0].shape, POSITION)
    pair = factor(blocks, out.shape[-3])
    if pair is None:
        return False
    pin(pair[1], "pixels of a square")
    mix(pair, [1])
    positions = [Unknown(size, POSITION) for size in out.shape[-2:]]
    trace.assign(out, [*batch, pair[0], *positions])
    return True


def pixel_unshuffle(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Squares of pixels become blocks of channels."""
    axes = trace.axes(args[0])
    *batch, channels, _, _ = renew(axes, [-2, -1], args[0].shape, POSITION)
    square = Unknown(out.shape[-3] // channels.size, "pixels of a square")
    positions = [Unknown(size, POSITION) for size in out.shape[-2:]]
    trace.assign(out, [*batch, product([channels, square]), *positions])
    return True


def channel_shuffle(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The channels as a matrix, transposed."""
    axes = list(trace.axes(args[0]))
    pair = factor(axes[1], args[1])
    if pair is None:
        return False
    axes[1] = product(pair[::-1])
    trace.assign(out, axes)
    return True


def grid_sampler(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """An image is read at places that are given for each pixel of the result."""
    batch, channels, *_ = renew(
        trace.axes(args[0]), range(2, args[0].ndim), args[0].shape, POSITION
    )
    first, *places, coordinates = grid = trace.axes(args[1])
    pin(coordinates, "coordinates")
    mix(grid, [len(grid) - 1])
    unify(batch, first)
    trace.assign(out, [batch, channels, *places])
    return True


def _with_in_place(*names: str) -> list[str]:
    return [name + end for name in names for end in ("", "_")]


INDEXING: dict[str, Rule] = {
    "index": index,
    **dict.fromkeys(_with_in_place("index_put"), index_put),
    "index_select": index_select,
    **dict.fromkeys(_with_in_place("index_add", "index_copy", "index_reduce"), index_add),
    **dict.fromkeys(_with_in_place("index_fill"), index_fill),
    "gather": gather,
    **dict.fromkeys(_with_in_place("scatter", "scatter_add", "scatter_reduce"), scatter),
    "take": take,
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), embedding_bag),
    "embedding_renorm_": embedding_renorm,
    "_pack_padded_sequence": pack,
    "flip": flip,
    "roll": roll,
    "rot90": rot90,
    **dict.fromkeys(_with_in_place("tril", "triu"), triangle),
    **dict.fromkeys(("diagonal", "diagonal_copy"), diagonal),
    "diag_embed": diag_embed,
    "repeat": repeat,
    **dict.fromkeys(_with_in_place("as_strided"), as_strided),
    "unfold": unfold,
    "im2col": im2col,
    "col2im": col2im,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), grid_sampler),
}
