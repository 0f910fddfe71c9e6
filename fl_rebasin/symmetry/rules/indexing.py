"""Reading and writing by index: the indexed axis is pinned, the others pass through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fl_rebasin.symmetry.rules.new_axes import with_new_axes
from fl_rebasin.symmetry.rules.pointwise import broadcast
from fl_rebasin.symmetry.rules.protocol import Rule, Trace, with_in_place
from fl_rebasin.symmetry.rules.shapes import piece
from fl_rebasin.symmetry.terms import UNIT, Term, Unknown, leaves, pin
from fl_rebasin.symmetry.unify import mix, unify, unify_elementwise

BY_INDEX = "looked up by index"
PART = "only part of the axis is indexed"


def _carry(term: Term) -> Term:
    """Return the axis of the result that belongs to an axis of an index: a new one if pinned."""
    if term.size == 1 or any(leaf.reason is None for leaf in leaves(term)):
        return term
    return Unknown(term.size, BY_INDEX)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _looked_up(
    trace: Trace, source: Tensor, indices: Sequence[Tensor | None]
) -> tuple[list[Term], range] | None:
    """Return the axes of `source[indices]`, and which of them come from the indices.

    A mask replaces all the axes that it covers by one. The axes of the indices replace the indexed
    axes in place if these are adjacent, and otherwise come first.
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
                pin(term, BY_INDEX)
        shapes = [
            (int(index.count_nonzero()),) if _is_mask(index) else index.shape for index in tensors
        ]
        new: list[Term] = [Unknown(size, BY_INDEX) for size in torch.broadcast_shapes(*shapes)]
    else:
        new = [_carry(term) for term in broadcast(trace, tensors)]
    axes = trace.axes(source)
    mix(axes, gone)
    for dim in gone:
        pin(axes[dim], BY_INDEX)
    kept = [term for dim, term in enumerate(axes) if dim not in gone]
    start = gone[0] if gone[-1] - gone[0] == len(gone) - 1 else 0
    return [*kept[:start], *new, *kept[start:]], range(start, start + len(new))


def _consecutive(
    trace: Trace, indices: Sequence[Tensor | None], shape: Sequence[int]
) -> tuple[int, int] | None:
    """Return dim and start if the index is a constant that amounts to a slice: `x[:, [3, 4]]`."""
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
    """`x[i, :, mask]`: integer indices or masks; the other axes pass through."""
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
    """`x[i, :, mask] = values`, or `+=`: the values broadcast to what is indexed."""
    found = _looked_up(trace, args[0], args[1])
    values = trace.axes(args[2])
    if found is None or len(values) > len(found[0]):
        return False
    axes, new = found
    first = len(axes) - len(values)
    if not (len(args) > 3 and args[3]):
        # Where an index repeats, the last value may win.
        for dim in new:
            pin(axes[dim], BY_INDEX)
    mix(values, [dim - first for dim in new if dim >= first])
    unify_elementwise(axes[first:], values)
    trace.assign(out, trace.axes(args[0]))
    return True


def index_select(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Selects positions of one axis by index."""
    axes, numbers = trace.axes(args[0]), trace.axes(args[2])
    if not axes:
        return False
    terms = with_new_axes(axes, [args[1]], out.shape, BY_INDEX)
    terms[args[1]] = _carry(numbers[0]) if numbers else UNIT
    trace.assign(out, terms)
    return True


def index_add(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Rows are combined into the indexed rows; in `index_copy` the last of them wins."""
    axes, numbers, rows = trace.axes(args[0]), trace.axes(args[2]), trace.axes(args[3])
    if not axes or len(rows) != len(axes):
        return False
    dim = args[1] % len(axes)
    pin(axes[dim], BY_INDEX)
    for term in numbers:
        unify(term, rows[dim])
        if func.overloadpacket.__name__.startswith("index_copy"):
            pin(term, BY_INDEX)
    for terms in (axes, rows):
        mix(terms, [dim])
    others = [each for each in range(len(axes)) if each != dim]
    unify_elementwise([axes[each] for each in others], [rows[each] for each in others])
    trace.assign(out, axes)
    return True


def index_fill(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The indexed rows get one value."""
    axes = trace.axes(args[0])
    if not axes:
        return False
    pin(axes[args[1]], BY_INDEX)
    trace.assign(out, axes)
    return True


def _unify_except(dim: int, one: Sequence[Term], other: Sequence[Term]) -> set[int]:
    """Unify all axes but one of two tensors; return those of equal size, and pin the others."""
    for terms in (one, other):
        mix(terms, [dim])
    fit = [d for d in range(len(one)) if d != dim and one[d].size == other[d].size]
    unify_elementwise([one[d] for d in fit], [other[d] for d in fit])
    for d in {*range(len(one))} - {dim, *fit}:
        pin(one[d], PART)
        pin(other[d], PART)
    return set(fit)


def gather(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`out[i, j] = x[index[i, j], j]`: the axes that are not indexed are the same in all three."""
    axes, numbers = trace.axes(args[0]), trace.axes(args[2])
    if not axes or len(numbers) != len(axes):
        return False
    dim = args[1] % len(axes)
    fit = _unify_except(dim, axes, numbers)
    pin(axes[dim], BY_INDEX)
    terms: list[Term] = [
        axes[d] if d in fit else Unknown(size, PART) for d, size in enumerate(out.shape)
    ]
    terms[dim] = _carry(numbers[dim])
    trace.assign(out, terms)
    return True


def scatter(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`x[index[i, j], j] = values[i, j]`, or combined: the other axes are the same."""
    axes, numbers = trace.axes(args[0]), trace.axes(args[2])
    if not axes or len(numbers) != len(axes):
        return False
    dim = args[1] % len(axes)
    _unify_except(dim, axes, numbers)
    pin(axes[dim], BY_INDEX)
    if isinstance(args[3], Tensor):
        rows = trace.axes(args[3])
        if len(rows) != len(axes):
            return False
        _unify_except(dim, rows, numbers)
        if rows[dim].size == numbers[dim].size:
            unify(rows[dim], numbers[dim])
        else:
            pin(rows[dim], PART)
            pin(numbers[dim], PART)
        if len(args) == 4 and "reduce" not in kwargs and "add" not in func.overloadpacket.__name__:
            # Where an index repeats, the last value may win.
            pin(numbers[dim], BY_INDEX)
    trace.assign(out, axes)
    return True


def take(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Selects positions of the flattened tensor by index."""
    for term in trace.axes(args[0]):
        pin(term, BY_INDEX)
    trace.assign(out, [_carry(term) for term in trace.axes(args[1])])
    return True


def embedding(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Rows are looked up by index; columns are units."""
    rows, columns = trace.axes(args[0])
    pin(rows, BY_INDEX)
    trace.assign(out, [*trace.axes(args[1]), columns])
    return True


def embedding_bag(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Rows are looked up by index and combined bag by bag; columns are units."""
    columns = with_new_axes(trace.axes(args[0]), [0], args[0].shape, BY_INDEX)[1]
    for tensor in (*args[1:3], *args[6:7]):
        if isinstance(tensor, Tensor):
            for term in trace.axes(tensor):
                pin(term, BY_INDEX)
    for result in out:
        terms: list[Term] = [Unknown(size, BY_INDEX) for size in result.shape]
        if result.ndim == 2 and result.shape[1] == columns.size:
            # The bags, and in mode "max" the indices of the largest rows.
            terms[1] = columns
        trace.assign(result, terms)
    return True


def embedding_renorm(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The indexed rows are scaled by their norm, in place."""
    axes = trace.axes(args[0])
    pin(axes[0], BY_INDEX)
    mix(axes, [1])
    trace.assign(out, axes)
    return True


def pack(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Time and batch become one axis, sorted by length; features pass through."""
    axes = trace.axes(args[0])
    with_new_axes(axes, [0, 1], args[0].shape, "packed sequence")
    trace.assign(out[0], [Unknown(out[0].shape[0], "packed sequence"), *axes[2:]])
    trace.assign(out[1], [Unknown(out[1].shape[0], "packed sequence")])
    return True


INDEXING: dict[str, Rule] = {
    "index": index,
    **dict.fromkeys(with_in_place("index_put"), index_put),
    "index_select": index_select,
    **dict.fromkeys(with_in_place("index_add", "index_copy", "index_reduce"), index_add),
    **dict.fromkeys(with_in_place("index_fill"), index_fill),
    "gather": gather,
    **dict.fromkeys(with_in_place("scatter", "scatter_add", "scatter_reduce"), scatter),
    "take": take,
    "embedding": embedding,
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), embedding_bag),
    "embedding_renorm_": embedding_renorm,
    "_pack_padded_sequence": pack,
}
