"""Similarity matrices between the units of two models, updated as units move."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fl_rebasin.matching.incidence import Incidence
from fl_rebasin.symmetry.axes import named_pieces, pieces
from fl_rebasin.symmetry.spec import PermutationSpec


class Similarities:
    """The similarity matrices of all groups, between a fixed target and a model that is permuted.

    The matrix of a group of n units has shape `(n, n)`. With `A_i` the slice of tensor A at unit i,

        S[i, j] = sum over tensors A of the group of  <target A_i, model A_j>

    so that `sum_i S[i, p[i]]` is the objective after the move p, up to a constant. Matrices of
    linear groups are kept. When the units of one group move, those of its neighbours are updated
    by the units that moved, which takes less time than to compute them again.

    Args:
        spec: spec of both models.
        incidence: its incidence.
        target: learnable tensors of the target.
        precision: dtype of all products.

    Attributes:
        kept: matrices of linear groups, for the current order of the units.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        incidence: Incidence,
        target: Mapping[str, Tensor],
        precision: torch.dtype,
    ) -> None:
        self.spec = spec
        self.incidence = incidence
        self.target = target
        self.precision = precision
        self.kept: dict[str, Tensor] = {}

    def device(self, group: str) -> torch.device | None:
        """Return the device of a group's tensors; None for a group without any."""
        keys = self.incidence.keys[group]
        return self.target[keys[0]].device if keys else None

    def compute(self, group: str, weights: Mapping[str, Tensor], keys: Iterable[str]) -> Tensor:
        """Return the similarity matrix of one group.

        Args:
            group: name of the group, of `n` units.
            weights: learnable tensors of the moving model.
            keys: tensors to include; those that the group does not lie on contribute nothing.

        Returns:
            Shape `(n, n)`; for a group within blocks `(blocks, n, n)`.
        """
        size, blocks = self.spec.groups[group], self.spec.within.get(group)
        shape = (size, size) if blocks is None else (self.spec.groups[blocks], size, size)
        total = self._zeros(group, shape)
        for key in keys:
            for left, right, names in self._pairs(key, weights[key]):
                for dim in (place for place, name in enumerate(names) if name == group):
                    rows = [side.movedim(dim, 0) for side in (left, right)]
                    if blocks is not None:
                        block = names.index(blocks)
                        block += block < dim
                        rows = [side.movedim(block, 0) for side in rows]
                    one, other = (side.reshape(*shape[:-1], -1) for side in rows)
                    total += one @ other.mT
        return total

    def compute_blocks(
        self, group: str, weights: Mapping[str, Tensor], keys: Iterable[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gains of moving blocks and the units within them, as `assign_blocks` expects.

        Args:
            group: name of the group of blocks.
            weights: learnable tensors of the moving model.
            keys: tensors to include.
        """
        inside = self.incidence.inside[group]
        count = self.spec.groups[group]
        gain = self._zeros(group, (count, count))
        within = {
            name: self._zeros(group, (count, count, self.spec.groups[name], self.spec.groups[name]))
            for name in inside
        }
        for key in keys:
            for left, right, names in self._pairs(key, weights[key]):
                for dim in (place for place, name in enumerate(names) if name == group):
                    one, other = left.movedim(dim, 0), right.movedim(dim, 0)
                    rest = names[:dim] + names[dim + 1 :]
                    # If one tensor has two groups within these blocks, solve for the first only.
                    name = next((name for name in inside if name in rest), None)
                    if name is None:
                        gain += one.reshape(count, -1) @ other.reshape(count, -1).T
                        continue
                    place = 1 + rest.index(name)
                    size = self.spec.groups[name]
                    one, other = (
                        side.movedim(place, 1).reshape(count * size, -1) for side in (one, other)
                    )
                    gram = (one @ other.T).reshape(count, size, count, size)
                    within[name] += gram.transpose(1, 2)
        return gain, within

    def of_linear(self, group: str, weights: Mapping[str, Tensor], keys: Iterable[str]) -> Tensor:
        """Return the matrix of a linear group: the one that is kept, else a new one."""
        if group not in self.kept:
            self.kept[group] = self.compute(group, weights, keys)
        return self.kept[group]

    def reset(self, groups: Collection[str]) -> None:
        """Keep a matrix of zeros for each linear one of these groups; `add_tensor` fills them."""
        self.kept = {
            name: self._zeros(name, (self.spec.groups[name],) * 2)
            for name in groups
            if name in self.incidence.linear
        }

    def add_tensor(self, key: str, value: Tensor, groups: Collection[str]) -> None:
        """Add the contribution of one tensor to the kept matrices of some groups.

        Args:
            key: key of the tensor.
            value: the moving model's tensor.
            groups: the groups; those without a kept matrix are skipped.
        """
        for left, right, names in self._pairs(key, value):
            for name in groups:
                if name in self.kept and name in names:
                    self._add(name, left, right, names)

    def update(self, key: str, old: Tensor, new: Tensor, group: str, units: Tensor | None) -> None:
        """Update the kept matrices of the other groups of a tensor after a move of one group.

        Args:
            key: key of the tensor.
            old: its values before the move.
            new: its values after the move.
            group: the group that moved.
            units: the units of that group that moved, if they are few; None for all.
        """
        if not (self.incidence.groups[key].keys() - {group}) & self.kept.keys():
            return
        both = zip(self._pairs(key, new), pieces(old, self.spec.axes[key]), strict=True)
        for (left, right, names), (before, _) in both:
            others = [name for name in names if name != group and name in self.kept]
            if not others:
                continue
            if units is not None and group in names:
                dim = names.index(group)
                left, right, before = (
                    side.index_select(dim, units) for side in (left, right, before)
                )
            change = right - before.to(self.precision)
            for name in others:
                self._add(name, left, change, names)

    def permute(self, group: str, index: Tensor) -> None:
        """Permute the kept matrix of one group by a move of its own units."""
        if group in self.kept:
            matrix = self.kept[group]
            self.kept[group] = matrix.index_select(1, index.to(matrix.device))

    def _zeros(self, group: str, shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=self.precision, device=self.device(group))

    def _pairs(self, key: str, value: Tensor) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Yield the pieces of one tensor, of target and model, with the groups on their axes."""
        axes = self.spec.axes[key]
        own = pieces(value.to(self.precision), axes)
        for (left, names), (right, _) in zip(
            named_pieces(self.target[key], axes), own, strict=True
        ):
            yield left.to(self.precision), right, names

    def _add(self, group: str, left: Tensor, right: Tensor, names: Sequence[str]) -> None:
        """Add the products of one piece to the kept matrix of one group."""
        dim = names.index(group)
        size = self.spec.groups[group]
        one, other = (side.movedim(dim, 0).reshape(size, -1) for side in (left, right))
        self.kept[group].addmm_(one, other.T)
