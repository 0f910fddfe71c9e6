"""The axis algebra: what an axis of a tensor consists of, and how a permutation moves it.

An expression over *groups* (sets of units that may be permuted) describes each axis:

- `Group`: the units of one group;
- `Fixed`: positions that never move;
- `Cat`: a concatenation of axes, such as a skip concatenation;
- `Prod`: a row-major product of axes, such as flattened channels, groups of channels or heads;
- `Parted`: an axis that has different units in each part of another axis of the same tensor, such
  as the columns of a fused projection of queries and keys that read different inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A set of `size` units that may be permuted.

    A group with `within` exists once in each unit (each *block*) of the group named there: the
    units within each attention head, for example. Each block has its own order of them, and a
    block that moves takes its units along.
    """

    name: str
    size: int
    within: str | None = None


@dataclass(frozen=True)
class Fixed:
    """`size` positions that never move."""

    size: int


@dataclass(frozen=True)
class Cat:
    """A concatenation of the parts."""

    parts: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Prod:
    """The row-major product of the factors: the last factor varies fastest."""

    factors: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return math.prod(factor.size for factor in self.factors)


@dataclass(frozen=True)
class Parted:
    """An axis that is a different one in each part of another axis of the same tensor.

    Attributes:
        across: index of that other axis, which is a `Cat`.
        cases: for each part of the other axis, its size and what this axis is there.
    """

    across: int
    cases: tuple[tuple[int, Axis], ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.cases[0][1].size


Axis: TypeAlias = Group | Fixed | Cat | Prod | Parted


def groups_of(axis: Axis) -> Iterator[Group]:
    """Yield the groups of an axis from left to right; a group used twice is yielded twice."""
    match axis:
        case Group():
            yield axis
        case Cat(parts) | Prod(parts):
            for part in parts:
                yield from groups_of(part)
        case Parted(_, cases):
            for _, part in cases:
                yield from groups_of(part)


def axis_index(axis: Axis, permutation: Mapping[str, Tensor]) -> Tensor:
    """Return the index tensor of shape `(axis.size,)` that applies a permutation to an axis.

    It leaves alone groups that the permutation does not name, and units whose order depends on
    another axis of the tensor: `move_tensor` moves those.
    """
    match axis:
        case Group(name, size, within):
            if within is not None or name not in permutation:
                return torch.arange(size)
            return permutation[name]
        case Fixed(size):
            return torch.arange(size)
        case Parted():
            return torch.arange(axis.size)
        case Cat(parts):
            return _joined([axis_index(part, permutation) for part in parts], parts)
        case Prod(factors):
            return _product_index(factors, permutation) if axis.size else torch.arange(0)


def _product_index(factors: Sequence[Axis], permutation: Mapping[str, Tensor]) -> Tensor:
    """Return the index tensor of a product: the factors' indices, weighted by their strides."""
    total = torch.zeros([1] * len(factors), dtype=torch.int64)
    stride = math.prod(factor.size for factor in factors)
    for number, part in enumerate(factors):
        stride //= part.size
        shape = [1] * len(factors)
        shape[number] = part.size
        index = axis_index(part, permutation)
        for other, blocks in enumerate(factors):
            if isinstance(blocks, Group) and _has_units_within(part, blocks.name):
                shape[other] = blocks.size
                index = block_index(part, blocks, permutation)
                index = index if other < number else index.T
        total = total + index.reshape(shape) * stride
    return total.reshape(-1)


def block_index(axis: Axis, blocks: Group, permutation: Mapping[str, Tensor]) -> Tensor:
    """Return the index tensor of an axis within each block, shape `(blocks.size, axis.size)`."""
    match axis:
        case Group(name, size, within) if within == blocks.name and name in permutation:
            return permutation[name].expand(blocks.size, size)
        case Cat(parts):
            return _joined([block_index(part, blocks, permutation) for part in parts], parts)
        case Prod(factors):
            index = torch.zeros(blocks.size, 1, dtype=torch.int64)
            for part in factors:
                inner = block_index(part, blocks, permutation)
                index = (index[:, :, None] * part.size + inner[:, None, :]).flatten(1)
            return index
        case _:
            return axis_index(axis, permutation).expand(blocks.size, axis.size)


def _joined(pieces: Sequence[Tensor], parts: Sequence[Axis]) -> Tensor:
    """Concatenate the index tensors of the parts, each shifted to where its part starts."""
    offsets = itertools.accumulate((part.size for part in parts), initial=0)
    return torch.cat([i + offset for i, offset in zip(pieces, offsets, strict=False)], dim=-1)


def _has_units_within(axis: Axis, blocks: str) -> bool:
    return any(group.within == blocks for group in groups_of(axis))


def _block_number(axis: Axis, blocks: str) -> Tensor | None:
    """Return the block that each position of an axis lies in; None if the axis has no blocks."""
    if isinstance(axis, Group) and axis.name == blocks:
        return torch.arange(axis.size)
    if isinstance(axis, Prod) and axis.size:
        stride = axis.size
        for part in axis.factors:
            stride //= part.size
            if isinstance(part, Group) and part.name == blocks:
                return torch.arange(axis.size) // stride % part.size
    return None


def move_tensor(tensor: Tensor, axes: Sequence[Axis], permutation: Mapping[str, Tensor]) -> Tensor:
    """Return a permuted copy of a tensor, of the same dtype."""
    moved = tensor.detach()
    for dim, axis in enumerate(axes):
        if any(group.name in permutation for group in groups_of(axis)):
            index = axis_index(axis, permutation).to(tensor.device)
            moved = moved.index_select(dim, index)
    for dim in range(len(axes)):
        moved = _move_within(moved, axes, dim, permutation)
        moved = _move_parted(moved, axes, dim, permutation)
    return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


def _move_within(
    tensor: Tensor, axes: Sequence[Axis], dim: int, permutation: Mapping[str, Tensor]
) -> Tensor:
    """Permute the units of one axis that lie within the blocks of another axis."""
    groups = [g for g in groups_of(axes[dim]) if g.within is not None and g.name in permutation]
    for blocks in dict.fromkeys(group.within for group in groups):
        own = {group.name: permutation[group.name] for group in groups if group.within == blocks}
        for other, across in enumerate(axes):
            number = _block_number(across, str(blocks)) if other != dim else None
            if number is not None:
                count = int(number.max()) + 1
                index = block_index(axes[dim], Group(str(blocks), count), own)[number]
                shape = [1] * tensor.ndim
                shape[other], shape[dim] = across.size, axes[dim].size
                index = (index if other < dim else index.T).reshape(shape)
                tensor = tensor.take_along_dim(index.to(tensor.device), dim)
    return tensor


def _move_parted(
    tensor: Tensor, axes: Sequence[Axis], dim: int, permutation: Mapping[str, Tensor]
) -> Tensor:
    """Permute an axis that is a different one in each part of another axis."""
    axis = axes[dim]
    if not isinstance(axis, Parted):
        return tensor
    pieces = tensor.split([size for size, _ in axis.cases], axis.across)
    indices = [axis_index(part, permutation).to(tensor.device) for _, part in axis.cases]
    return torch.cat(
        [piece.index_select(dim, index) for piece, index in zip(pieces, indices, strict=True)],
        axis.across,
    )


def cut_axis(axis: Axis, start: int, size: int) -> Axis:
    """Return the slice `[start, start + size)` of an axis.

    Raises:
        ValueError: the slice starts or ends inside a group or a product.
    """
    if start == 0 and size == axis.size:
        return axis
    match axis:
        case Fixed():
            return Fixed(size)
        case Cat(parts):
            inside: list[Axis] = []
            offset = 0
            for part in parts:
                first, last = max(start, offset), min(start + size, offset + part.size)
                if first < last:
                    inside.append(cut_axis(part, first - offset, last - first))
                offset += part.size
            return inside[0] if len(inside) == 1 else Cat(tuple(inside))
    raise ValueError(f"the slice [{start}, {start + size}) cuts through the units of {axis}")


def named_pieces(tensor: Tensor, axes: Sequence[Axis]) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield what `pieces` yields, with the name of the group on each axis (empty if fixed)."""
    for part, atoms in pieces(tensor, axes):
        yield part, [atom.name if isinstance(atom, Group) else "" for atom in atoms]


def pieces(tensor: Tensor, axes: Sequence[Axis]) -> Iterator[tuple[Tensor, tuple[Axis, ...]]]:
    """Split a tensor into pieces each of whose axes is a single group or fixed.

    Concatenations are split, and the factors of a product become separate axes. A piece of a
    contiguous tensor is a view.

    Yields:
        A piece, and its axes.
    """
    for dim, axis in enumerate(axes):
        if isinstance(axis, Parted):  # First: unfolding a product shifts the indices of axes.
            offset = 0
            for size, part in axis.cases:
                inside = list(axes)
                inside[axis.across] = cut_axis(axes[axis.across], offset, size)
                inside[dim] = part
                yield from pieces(tensor.narrow(axis.across, offset, size), inside)
                offset += size
            return
    for dim, axis in enumerate(axes):
        match axis:
            case Cat(parts):
                offset = 0
                for part in parts:
                    piece = tensor.narrow(dim, offset, part.size)
                    yield from pieces(piece, (*axes[:dim], part, *axes[dim + 1 :]))
                    offset += part.size
                return
            case Prod(factors):
                unfolded = tensor.unflatten(dim, [part.size for part in factors])
                yield from pieces(unfolded, (*axes[:dim], *factors, *axes[dim + 1 :]))
                return
    yield tensor, tuple(axes)
