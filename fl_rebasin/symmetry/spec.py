"""Permutation specs: what may be permuted in a model, and the permutations themselves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fl_rebasin.state_dicts import StateDict, like
from fl_rebasin.symmetry.axes import Axis, groups_of, move_tensor

REMEDY = "derive the spec from a model with the architecture of the state dict"


class SpecError(ValueError):
    """A model, a state dict, a permutation or a spec is invalid, or does not match another."""


@dataclass(frozen=True, eq=False)
class Permutation:
    """A permutation of the units of each group.

    After it is applied, unit `k` of a group is the former unit `indices[group][k]`.

    Attributes:
        indices: for each group an int64 tensor of shape `(size,)`. For a group within blocks its
            shape is `(blocks, size)`: row `k` is the order of the units in the block that ends up
            at position `k`.
        within: for each group within blocks, the name of the group of the blocks.
    """

    indices: Mapping[str, Tensor]
    within: Mapping[str, str] = field(default_factory=dict)

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
        indices = {}
        for name, index in self.indices.items():
            back = torch.argsort(index)
            if name in self.within:
                back = back[torch.argsort(self.indices[self.within[name]])]
            indices[name] = back
        return replace(self, indices=indices)

    def compose(self, first: Permutation) -> Permutation:
        """Return the permutation that applies `first` and then this one."""
        if self.indices.keys() != first.indices.keys() or self.within != first.within:
            odd = sorted(self.indices.keys() ^ first.indices.keys()) or sorted(self.within)
            raise SpecError(f"the permutations belong to different specs: they differ in {odd[:3]}")
        indices = {}
        for name, index in self.indices.items():
            if name in self.within:
                blocks = self.indices[self.within[name]]
                indices[name] = first.indices[name][blocks].gather(1, index.expand(len(blocks), -1))
            else:
                indices[name] = first.indices[name][index]
        return replace(self, indices=indices)

    @property
    def moved(self) -> int:
        """Number of units that change their position."""
        return sum(
            int((index != torch.arange(index.shape[-1])).sum()) for index in self.indices.values()
        )

    @property
    def is_identity(self) -> bool:
        """Whether no unit moves."""
        return self.moved == 0


@dataclass(frozen=True)
class PermutationSpec:
    """How every axis of every tensor of a state dict moves.

    Attributes:
        axes: for each key of the state dict the expression of each axis (empty for a scalar).
        groups: the size of each group of units that may be permuted, by name.
        pinned: axes that may not move, as `"key[axis]"`, each with its reason.
        learnable: keys of the parameters that count in the matching objective. Buffers are permuted
            but do not count, and a tied tensor counts once.
        within: for each group of units within blocks (within attention heads, for example), the
            name of the group of the blocks. Each block has its own order of these units.
        fingerprint: identifies the architecture from which the spec was derived.
    """

    axes: Mapping[str, tuple[Axis, ...]]
    groups: Mapping[str, int]
    pinned: Mapping[str, str]
    learnable: tuple[str, ...]
    within: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def identity(self) -> Permutation:
        """Return the permutation that moves nothing."""
        indices = {
            name: torch.arange(shape[-1]).repeat(*shape[:-1], 1).reshape(shape)
            for name, shape in self._shapes()
        }
        return Permutation(indices, self.within)

    def random(self, generator: torch.Generator) -> Permutation:
        """Return a uniformly random permutation of every group."""
        indices = {
            name: torch.rand(shape, generator=generator, dtype=torch.float64).argsort(-1)
            for name, shape in self._shapes()
        }
        return Permutation(indices, self.within)

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield each group's name and the shape of its index tensor."""
        for name, size in self.groups.items():
            blocks = self.within.get(name)
            yield name, (size,) if blocks is None else (self.groups[blocks], size)

    @property
    def freedom(self) -> float:
        """Fraction of the learnable parameters with at least one axis that may move, in [0, 1]."""
        total = free = 0
        for key in self.learnable:
            count = math.prod(axis.size for axis in self.axes[key])
            total += count
            free += count * any(next(groups_of(axis), None) for axis in self.axes[key])
        return free / total if total else 0.0

    def check(self, state_dict: StateDict) -> None:
        """Raise `SpecError` unless a state dict has the keys and shapes of this spec."""
        if isinstance(state_dict, nn.Module):
            raise SpecError("expected a state dict, got a module: pass module.state_dict()")
        self.check_keys(state_dict)
        for key, axes in self.axes.items():
            expected = tuple(axis.size for axis in axes)
            if tuple(state_dict[key].shape) != expected:
                raise SpecError(
                    f"{key} has shape {tuple(state_dict[key].shape)}, the spec expects {expected}; "
                    + REMEDY
                )

    def check_keys(self, keys: Collection[str]) -> None:
        """Raise `SpecError` unless these are the keys of a state dict of this spec."""
        if missing := [key for key in self.axes if key not in keys]:
            raise SpecError(
                f"the state dict lacks {len(missing)} keys of the spec: {missing[:3]}; {REMEDY}"
            )
        if extra := [key for key in keys if key not in self.axes]:
            raise SpecError(
                f"the state dict has {len(extra)} keys beyond the spec: {extra[:3]}; {REMEDY}"
            )

    def apply(self, permutation: Permutation, state_dict: StateDict) -> dict[str, Tensor]:
        """Return a state dict with permuted units, with which the model computes the same function.

        Args:
            permutation: an index tensor for each group of this spec.
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
        self.check_permutation(permutation)
        return like(
            state_dict, {key: self.move(key, state_dict[key], permutation) for key in state_dict}
        )

    def move(self, key: str, tensor: Tensor, permutation: Permutation) -> Tensor:
        """Return a permuted copy of the tensor with some key, of the same dtype.

        Groups that the permutation does not name are not moved.
        """
        return move_tensor(tensor, self.axes[key], permutation.indices)

    def check_permutation(self, permutation: Permutation) -> None:
        """Raise `SpecError` unless a permutation fits the groups of this spec."""
        if odd := sorted(permutation.indices.keys() ^ self.groups.keys()):
            raise SpecError(f"permutation and spec differ in the groups {odd[:3]}")
        for name, shape in self._shapes():
            index = permutation.indices[name]
            # Blocks may share one order of the units within them.
            fits = index.shape in (shape, shape[-1:])
            if not fits or not torch.equal(
                index.sort(-1).values, torch.arange(shape[-1]).expand_as(index)
            ):
                raise SpecError(f"{name}: not a permutation of {shape[-1]} units")

    def describe(self) -> str:
        """Return a readable table: the groups and what they permute, then what is pinned and why.

        The size of a group within blocks reads `blocks x size`.
        """
        uses: dict[str, list[str]] = {name: [] for name in self.groups}
        for key, axes in self.axes.items():
            for dim, axis in enumerate(axes):
                for group in dict.fromkeys(groups_of(axis)):
                    uses[group.name].append(f"{key}[{dim}]")
        uses = {group: _grouped(names) for group, names in uses.items()}
        sizes = {name: " x ".join(map(str, shape)) for name, shape in self._shapes()}
        reasons: dict[str, list[str]] = {}
        for axis_name, reason in self.pinned.items():
            reasons.setdefault(reason, []).append(axis_name)
        lines = [
            *_table(
                ("group", "size", "permutes"),
                [(name, sizes[name], keys) for name, keys in uses.items()],
            ),
            f"{len(uses)} groups, {self.freedom:.1%} of the parameters have a free axis",
        ]
        if reasons:
            lines += _table(
                ("pinned", "axes", "which"),
                [(reason, str(len(names)), _grouped(names)) for reason, names in reasons.items()],
            )
        return "\n".join(lines)

    __str__ = describe


def _grouped(names: list[str]) -> list[str]:
    """Join the axes of one tensor: `key[0]` and `key[2]` become `key[0,2]`."""
    dims: dict[str, list[str]] = {}
    for name in names:
        key, _, dim = name.rpartition("[")
        dims.setdefault(key, []).append(dim.removesuffix("]"))
    return [f"{key}[{','.join(numbers)}]" for key, numbers in dims.items()]


def _table(head: tuple[str, str, str], rows: list[tuple[str, str, list[str]]]) -> list[str]:
    """Format rows of a name, a number and a list, which is wrapped."""
    first = max(len(name) for name in (head[0], *(row[0] for row in rows)))
    second = max(len(number) for number in (head[1], *(row[1] for row in rows)))
    lines = [f"{head[0]:<{first}}  {head[1]:>{second}}  {head[2]}"]
    for name, number, items in rows:
        indent = " " * (first + second + 4)
        text = textwrap.fill(
            ", ".join(items),
            max(100, len(indent) + 40),
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines.append(f"{name:<{first}}  {number:>{second}}  {text.lstrip()}")
    return lines
