"""What may be permuted in a model, and the permutations themselves.

An axis of a tensor is described by an expression over *groups* (sets of units that may be
permuted): a plain group, a fixed axis, a concatenation, or a row-major product. One small algebra
carries flattening (a product), skip concatenations (a concatenation) and grouped convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

StateDict: TypeAlias = Mapping[str, Tensor]


REMEDY = "derive the spec from a model of the state dict's own architecture"


class SpecError(ValueError):
    """A model, a state dict or a permutation that does not fit."""


@dataclass(frozen=True)
class Group:
    """A set of `size` units that may be permuted."""

    name: str
    size: int


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


Axis: TypeAlias = Group | Fixed | Cat | Prod


def groups_of(axis: Axis) -> Iterator[Group]:
    """Yield the groups of an axis, left to right; a group used twice comes twice."""
    match axis:
        case Group():
            yield axis
        case Cat(parts) | Prod(parts):
            for part in parts:
                yield from groups_of(part)


def axis_index(axis: Axis, permutation: Mapping[str, Tensor]) -> Tensor:
    """Return the index tensor of shape `(axis.size,)` that moves an axis by a permutation.

    Groups that the permutation does not name stay as they are.
    """
    match axis:
        case Group(name, size):
            return permutation.get(name, torch.arange(size))
        case Fixed(size):
            return torch.arange(size)
        case Cat(parts):
            offset, pieces = 0, []
            for part in parts:
                pieces.append(axis_index(part, permutation) + offset)
                offset += part.size
            return torch.cat(pieces)
        case Prod(factors):
            index = torch.zeros(1, dtype=torch.int64)
            for factor in factors:
                inner = axis_index(factor, permutation)
                index = (index[:, None] * factor.size + inner[None, :]).reshape(-1)
            return index


@dataclass(frozen=True, eq=False)
class Permutation:
    """One index tensor a group: after the move, unit `k` is the old unit `indices[group][k]`."""

    indices: Mapping[str, Tensor]

    def __getitem__(self, group: str) -> Tensor:
        return self.indices[group]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Permutation):
            return NotImplemented
        return self.indices.keys() == other.indices.keys() and all(
            torch.equal(index, other.indices[name]) for name, index in self.indices.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def invert(self) -> Permutation:
        """Return the permutation that undoes this one."""
        return Permutation({name: torch.argsort(index) for name, index in self.indices.items()})

    def compose(self, first: Permutation) -> Permutation:
        """Return the permutation that applies `first` and then this one."""
        if self.indices.keys() != first.indices.keys():
            odd = sorted(self.indices.keys() ^ first.indices.keys())
            raise SpecError(f"permutations of different specs: only one of them has {odd[:3]}")
        return Permutation({k: first.indices[k][index] for k, index in self.indices.items()})

    @property
    def moved(self) -> int:
        """Number of units that do not stay in their place."""
        return sum(
            int((index != torch.arange(len(index))).sum()) for index in self.indices.values()
        )

    @property
    def is_identity(self) -> bool:
        """Whether no unit moves."""
        return self.moved == 0


@dataclass(frozen=True)
class PermutationSpec:
    """How every axis of every tensor of a state dict moves.

    Attributes:
        axes: for each key of the state dict one expression an axis (none for a scalar).
        groups: name and size of everything that may be permuted.
        pinned: axes that may not move, as `"key[axis]"`, each with its reason.
        learnable: keys of the parameters that count in the matching objective; buffers are
            permuted along but do not count, and a tied tensor counts once.
    """

    axes: Mapping[str, tuple[Axis, ...]]
    groups: Mapping[str, int]
    pinned: Mapping[str, str]
    learnable: tuple[str, ...]

    def identity(self) -> Permutation:
        """Return the permutation that moves nothing."""
        return Permutation({name: torch.arange(size) for name, size in self.groups.items()})

    def random(self, generator: torch.Generator) -> Permutation:
        """Return a uniformly random permutation of every group."""
        return Permutation(
            {name: torch.randperm(size, generator=generator) for name, size in self.groups.items()}
        )

    @property
    def freedom(self) -> float:
        """Share of the learnable parameters with at least one axis that may move, in [0, 1]."""
        total = free = 0
        for key in self.learnable:
            count = math.prod(axis.size for axis in self.axes[key])
            total += count
            free += count * any(next(groups_of(axis), None) for axis in self.axes[key])
        return free / total if total else 0.0

    def check(self, state_dict: StateDict) -> None:
        """Raise `SpecError` unless keys and shapes of a state dict are those of this spec."""
        if isinstance(state_dict, nn.Module):
            raise SpecError("expected a state dict, got a module: pass module.state_dict()")
        if missing := [key for key in self.axes if key not in state_dict]:
            raise SpecError(
                f"the state dict lacks {len(missing)} keys of the spec: {missing[:3]}; {REMEDY}"
            )
        if extra := [key for key in state_dict if key not in self.axes]:
            raise SpecError(
                f"the state dict has {len(extra)} keys beyond the spec: {extra[:3]}; {REMEDY}"
            )
        for key, axes in self.axes.items():
            expected = tuple(axis.size for axis in axes)
            if tuple(state_dict[key].shape) != expected:
                raise SpecError(
                    f"{key} has shape {tuple(state_dict[key].shape)}, the spec expects {expected}; "
                    + REMEDY
                )

    def apply(self, permutation: Permutation, state_dict: StateDict) -> dict[str, Tensor]:
        """Return a new state dict, the same function with its units permuted.

        Args:
            permutation: one index tensor for every group of this spec.
            state_dict: tensors with the keys and shapes of this spec; not changed.

        Raises:
            SpecError: the permutation or the state dict does not fit this spec.

        Example:
            >>> from torch import nn
            >>> from fl_rebasin import derive_spec
            >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
            >>> spec = derive_spec(net, torch.zeros(1, 2))
            >>> sorted(spec.apply(spec.identity(), net.state_dict()))
            ['0.bias', '0.weight', '2.bias', '2.weight']
        """
        self.check(state_dict)
        self._check_permutation(permutation)
        return {key: self.move(key, tensor, permutation) for key, tensor in state_dict.items()}

    def move(self, key: str, tensor: Tensor, permutation: Permutation) -> Tensor:
        """Return a copy of the tensor of one key, moved by a permutation.

        Groups that the permutation does not name stay. The dtype is kept.
        """
        moved = tensor.detach().clone()
        for dim, axis in enumerate(self.axes[key]):
            if any(group.name in permutation.indices for group in groups_of(axis)):
                index = axis_index(axis, permutation.indices).to(tensor.device)
                moved = moved.index_select(dim, index)
        return moved

    def _check_permutation(self, permutation: Permutation) -> None:
        if odd := sorted(permutation.indices.keys() ^ self.groups.keys()):
            raise SpecError(f"permutation and spec differ in the groups {odd[:3]}")
        for name, size in self.groups.items():
            index = permutation.indices[name]
            if index.shape != (size,) or not torch.equal(index.sort().values, torch.arange(size)):
                raise SpecError(f"{name}: not a permutation of {size} units")

    def describe(self) -> str:
        """Return a readable table: the groups with what they permute, then what is pinned."""
        uses: dict[str, list[str]] = {name: [] for name in self.groups}
        for key, axes in self.axes.items():
            for dim, axis in enumerate(axes):
                for group in dict.fromkeys(groups_of(axis)):
                    uses[group.name].append(f"{key}[{dim}]")
        width = max([len(name) for name in uses] + [5])
        lines = [f"{'group':<{width}}  {'size':>6}  permutes"]
        lines += [
            f"{name:<{width}}  {self.groups[name]:>6}  {', '.join(keys)}"
            for name, keys in uses.items()
        ]
        lines.append(f"{len(uses)} groups, {self.freedom:.1%} of the parameters have a free axis")
        if self.pinned:
            width = max(len(place) for place in self.pinned)
            lines.append(f"{'pinned':<{width}}  reason")
            lines += [f"{place:<{width}}  {reason}" for place, reason in self.pinned.items()]
        return "\n".join(lines)

    __str__ = describe
