"""The axis algebra: what an axis of a tensor is made of, and how a permutation moves it.

An axis of a tensor is described by an expression over *groups* (sets of units that may be
permuted): a plain group, a fixed axis, a concatenation, a row-major product, or an axis that is
another one in each part of another axis. One small algebra carries flattening (a product), skip
concatenations (a concatenation), grouped convolutions and attention heads (products with units
within blocks).
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

    With `within`, the name of another group, there is one such set in each of that group's units
    (its blocks): the units within each attention head, for example. Blocks move with their units.
    """

    name: str
    size: int
    within: str | None = None


@dataclass(frozen=True)
class Fixed:
    """`size` places whose order must stay."""

    size: int


@dataclass(frozen=True)
class Cat:
    """The parts, one after another."""

    parts: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """Number of places."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Prod:
    """The row-major product of the factors: the last factor runs fastest."""

    factors: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """Number of places."""
        return math.prod(factor.size for factor in self.factors)


@dataclass(frozen=True)
class Parted:
    """Another axis in each part of another axis of the same tensor.

    Attributes:
        across: number of that other axis, which is a `Cat`.
        cases: for each of its parts the number of places and the axis there.
    """

    across: int
    cases: tuple[tuple[int, Axis], ...]

    @property
    def size(self) -> int:
        """Number of places."""
        return self.cases[0][1].size


Axis: TypeAlias = Group | Fixed | Cat | Prod | Parted


def groups_of(axis: Axis) -> Iterator[Group]:
    """Yield the groups of an axis, left to right; a group used twice comes twice."""
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
    """Return the index tensor of shape `(axis.size,)` that moves an axis by a permutation.

    Groups that the permutation does not name stay as they are, and so do those that depend on
    another axis: they are moved by `move_tensor`.
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
        case Prod() if not axis.size:
            return torch.arange(0)
        case Prod(factors):
            total = torch.zeros([1] * len(factors), dtype=torch.int64)
            stride = axis.size
            for place, part in enumerate(factors):
                stride //= part.size
                shape = [1] * len(factors)
                shape[place] = part.size
                index = axis_index(part, permutation)
                for other, blocks in enumerate(factors):
                    if isinstance(blocks, Group) and _has_units_within(part, blocks.name):
                        shape[other] = blocks.size
                        index = block_index(part, blocks, permutation)
                        index = index if other < place else index.T
                total = total + index.reshape(shape) * stride
            return total.reshape(-1)


def block_index(axis: Axis, blocks: Group, permutation: Mapping[str, Tensor]) -> Tensor:
    """Return the index tensor of shape `(blocks.size, axis.size)` of an axis within each block."""
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
    """Concatenate the indices of the parts of an axis."""
    offsets = itertools.accumulate((part.size for part in parts), initial=0)
    return torch.cat([i + offset for i, offset in zip(pieces, offsets, strict=False)], dim=-1)


def _has_units_within(axis: Axis, blocks: str) -> bool:
    return any(group.within == blocks for group in groups_of(axis))


def _block_number(axis: Axis, blocks: str) -> Tensor | None:
    """Return for each place of an axis the number of the block that it lies in, if it has any."""
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
    """Return a tensor whose axes are moved by a permutation: a copy, of the same dtype."""
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
    """Move the units of one axis that lie within blocks of another axis."""
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
    """Move an axis that is another one in each part of another axis."""
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
    """Return the part `[start, start + size)` of an axis, which begins and ends between units."""
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
    raise ValueError(f"places {start} to {start + size} tear {axis}")


def named_pieces(tensor: Tensor, axes: Sequence[Axis]) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield the parts of a tensor as `pieces` does, with the name of the group on each axis.

    The name of a fixed axis is empty.
    """
    for part, atoms in pieces(tensor, axes):
        yield part, [atom.name if isinstance(atom, Group) else "" for atom in atoms]


def pieces(tensor: Tensor, axes: Sequence[Axis]) -> Iterator[tuple[Tensor, tuple[Axis, ...]]]:
    """Yield the parts of a tensor whose axes are plain groups or fixed, with these axes.

    Concatenations are taken apart, products become axes of their own; every part is a view if the
    tensor is contiguous.
    """
    for dim, axis in enumerate(axes):
        if isinstance(axis, Parted):  # First, as long as the axes have their numbers.
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
