"""Coordinate descent on the permutation of one model: one linear assignment for each group.

With all groups but one fixed, the objective is linear in the permutation of that group, and the
best permutation solves a linear assignment problem. Sweeps over the groups go on until none moves.
A group is solved again only when one of its neighbours has moved.

Source: Git Re-Basin, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fl_rebasin.matching.assignment import ROUNDING, Prices, assign, assign_again, assign_blocks
from fl_rebasin.matching.incidence import Incidence
from fl_rebasin.matching.objective import inner
from fl_rebasin.matching.similarity import Similarities
from fl_rebasin.symmetry.axes import Group
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

MAX_SWEEPS = 100
SPARSE = 0.5
"""Up to this share of displaced units, a move is applied to these units alone."""


class Matcher:
    """Coordinate descent on the permutation of one model towards a target.

    Args:
        spec: spec of both models.
        target: learnable tensors of the target.
        weights: learnable tensors of the model to permute; not changed.
        start: permutation to begin with; the identity by default.
        precision: dtype of all products; the tensors keep their own dtypes.
        prices: for each group, the prices that `assign_again` returned for a similar target;
            updated in place.

    Attributes:
        weights: the tensors after the permutation found so far.
        permutation: the permutation found so far.
        pending: groups that the last descent has left to solve.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        target: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        start: Permutation | None = None,
        precision: torch.dtype = torch.float64,
        prices: dict[str, Prices | None] | None = None,
    ) -> None:
        self.spec = spec
        self.target = target
        self.precision = precision
        self._identity = spec.identity()
        self.permutation = self._identity
        self.weights = dict(weights)
        if start is not None:
            # A start may give one order for the units of all blocks.
            indices = {
                name: start[name].expand_as(index) for name, index in self._identity.indices.items()
            }
            self.permutation = Permutation(indices, spec.within)
            self.weights = {key: spec.move(key, weights[key], start) for key in weights}
        self.incidence = Incidence.of(spec, target)
        self.similarities = Similarities(spec, self.incidence, target, precision)
        self.pending: set[str] = set()
        self._prices = {} if prices is None else prices

    @property
    def objective(self) -> float:
        """Inner product of the target and the permuted model."""
        return inner(self.target, self.weights, self.precision)

    def similarity(self, group: str) -> Tensor:
        """Return the similarity matrix of one group, over all tensors.

        Returns:
            Shape `(n, n)` for a group of `n` units; for a group within blocks `(blocks, n, n)`.
        """
        return self.similarities.compute(group, self.weights, self.spec.learnable)

    def descend(
        self,
        groups: Iterable[str] | None = None,
        pending: Iterable[str] | None = None,
        sweeps: int = MAX_SWEEPS,
    ) -> int:
        """Sweep over groups until none moves, and return the number of sweeps.

        Args:
            groups: groups that may move; all by default.
            pending: groups to solve in the first sweep, by default all of `groups`; the others
                are solved only when a neighbour has moved.
            sweeps: largest number of sweeps; afterwards `self.pending` holds the groups that are
                left to solve.
        """
        names = list(self.spec.groups if groups is None else groups)
        self.pending = set(names if pending is None else pending)
        for sweep in range(1, sweeps + 1):
            for group in names:
                if group in self.pending:
                    self.pending.remove(group)
                    if self.step(group):
                        self.pending |= self.incidence.neighbours(group).intersection(names)
            if not self.pending:
                return sweep
        return sweeps

    def step(self, group: str) -> bool:
        """Solve the assignment of one group; return whether any of its units moved.

        If the objective is not linear in the group's permutation, the linear assignment is an
        approximation, and its solution is applied only if the objective rises.
        """
        move = self.best_move(group)
        if move.is_identity:
            return False
        if group not in self.incidence.linear and not self._rises(group, move):
            return False
        self.apply_move(group, move)
        return True

    def best_move(self, group: str, keys: Iterable[str] | None = None) -> Permutation:
        """Return the best move of one group, together with the units within it.

        Args:
            group: name of the group.
            keys: tensors that count; all by default. Ignored if the group's matrix is kept.
        """
        keys = self.incidence.keys[group] if keys is None else keys
        if group in self.incidence.linear:
            matrix = self.similarities.of_linear(group, self.weights, keys)
            order, self._prices[group] = assign_again(matrix, self._prices.get(group))
            return Permutation({group: order})
        if self.incidence.inside[group]:
            gain, within = self.similarities.compute_blocks(group, self.weights, keys)
            index, orders = assign_blocks(gain, within)
            return Permutation({group: index} | orders)
        matrix = self.similarities.compute(group, self.weights, keys)
        if group in self.spec.within:
            return Permutation({group: torch.stack([assign(each) for each in matrix])})
        return Permutation({group: assign(matrix)})

    def move_to(self, group: str, index: Tensor) -> None:
        """Permute the units of one group by an index tensor, even if the objective falls."""
        self._prices.pop(group, None)  # They belong to the previous order.
        self.apply_move(group, Permutation({group: index}))

    def apply_move(self, group: str, move: Permutation, update: bool = True) -> None:
        """Apply a move of one group.

        Args:
            group: name of the group.
            move: its permutation, with those of the units within it.
            update: whether to update the similarity matrices kept for its neighbours.
        """
        units = self._displaced(group, move)
        for key, new in self._moved(group, move, units):
            if update:
                self.similarities.update(key, self.weights[key], new, group, units)
            self.weights[key] = new
        self.similarities.permute(group, move[group])
        full = Permutation({**self._identity.indices, **move.indices}, self.spec.within)
        self.permutation = full.compose(self.permutation)

    def _rises(self, group: str, move: Permutation) -> bool:
        """Return whether a move raises the objective by more than rounding."""
        moved = dict(self._moved(group, move, None))
        target = {key: self.target[key] for key in moved}
        before = {key: self.weights[key] for key in moved}
        scale = (
            inner(target, target, self.precision) * inner(before, before, self.precision)
        ) ** 0.5
        gain = inner(target, moved, self.precision) - inner(target, before, self.precision)
        return bool(gain > ROUNDING[self.precision] * scale)

    def _displaced(self, group: str, move: Permutation) -> Tensor | None:
        """Return the units of a linear group that a move displaces; None if they are many."""
        if group not in self.incidence.linear:
            return None
        index = move[group]
        found = (index != torch.arange(len(index))).nonzero().flatten()
        if len(found) > SPARSE * len(index):
            return None
        return found.to(self.similarities.device(group))

    def _moved(
        self, group: str, move: Permutation, units: Tensor | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a group after a move, one at a time.

        Args:
            group: name of the group.
            move: the move.
            units: the units that the move displaces, if they are few; only these are copied.
        """
        for key in self.incidence.keys[group]:
            old, axes = self.weights[key], self.spec.axes[key]
            places = [place for place, axis in enumerate(axes) if axis == Group(group, axis.size)]
            if units is None or len(places) != self.incidence.groups[key][group]:
                yield key, self.spec.move(key, old, move)
            else:
                (place,) = places
                source = move[group].to(old.device)[units]
                yield key, old.clone().index_copy_(place, units, old.index_select(place, source))
