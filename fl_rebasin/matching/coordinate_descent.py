"""Coordinate descent on the permutation of one model: one linear assignment a group.

Similarity matrices are kept. When the units of one group move, those of its neighbours change by
the units that moved alone; a group whose neighbours stayed is not looked at again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fl_rebasin.matching.assignment import ROUNDING, Prices, assign, assign_again, assign_blocks
from fl_rebasin.matching.objective import inner
from fl_rebasin.symmetry.axes import Group, groups_of, named_pieces, pieces
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

MAX_SWEEPS = 100
FEW = 0.5
"""Up to this share of moved units a neighbour's change is computed from these units alone."""


class Matcher:
    """Coordinate descent on the permutation of one model towards a target.

    Args:
        spec: spec of both models.
        target: learnable tensors that stay.
        weights: learnable tensors to be permuted.
        start: permutation to begin with; by default nothing moves.
        precision: dtype of all products; the models are kept in the one that they came in.
        prices: for each group what `assign_again` returned for its last problem, with a target
            much like this one; kept up to date.

    Attributes:
        weights: what the permutation found so far makes of the start.
        permutation: the permutation found so far.
        unsettled: groups whose units the last descent may not have put where they belong.
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
        self._still = dict(spec.identity().indices)
        self.permutation = spec.identity()
        self.weights = dict(weights)
        if start is not None:
            self.permutation = Permutation(
                {name: start[name].expand_as(still) for name, still in self._still.items()},
                spec.within,
            )
            self.weights = {key: spec.move(key, weights[key], start) for key in weights}
        # Units within blocks are matched together with their blocks.
        self._inside: dict[str, list[str]] = {name: [] for name in spec.groups}
        for name, blocks in spec.within.items():
            self._inside[blocks].append(name)
        # For each tensor how often each group stands on its axes, and the other way round.
        self._groups = {
            key: Counter(group.name for axis in spec.axes[key] for group in groups_of(axis))
            for key in spec.learnable
        }
        self._keys: dict[str, list[str]] = {name: [] for name in spec.groups}
        for key, groups in self._groups.items():
            for name in groups:
                self._keys[name].append(key)
        # What a move of these gains is linear in the move: one matrix says it all.
        self._linear = {
            name
            for name in spec.groups
            if name not in spec.within
            and not self._inside[name]
            and not any(
                names.count(name) > 1
                for key in self._keys[name]
                for _, names in named_pieces(target[key], spec.axes[key])
            )
        }
        self.unsettled: set[str] = set()
        self._similar: dict[str, Tensor] = {}
        self._prices = {} if prices is None else prices

    def _pairs(self, key: str, weights: Tensor) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Yield parts of one tensor, of target and weights, and the groups on their axes."""
        axes = self.spec.axes[key]
        own = pieces(weights.to(self.precision), axes)
        for (left, names), (right, _) in zip(
            named_pieces(self.target[key], axes), own, strict=True
        ):
            yield left.to(self.precision), right, names

    def similarity(self, group: str, keys: Iterable[str]) -> Tensor:
        """Return the `(n, n)` inner products of target units and own units of one group.

        For a group within blocks the result has shape `(blocks, n, n)`.

        Args:
            group: name of the group, of `n` units.
            keys: tensors that count; those that the group does not move add nothing.
        """
        size, blocks = self.spec.groups[group], self.spec.within.get(group)
        shape = (size, size) if blocks is None else (self.spec.groups[blocks], size, size)
        total = self._zeros(group, shape)
        for key in keys:
            for left, right, names in self._pairs(key, self.weights[key]):
                for dim in (place for place, name in enumerate(names) if name == group):
                    rows = [side.movedim(dim, 0) for side in (left, right)]
                    if blocks is not None:
                        block = names.index(blocks)
                        block += block < dim
                        rows = [side.movedim(block, 0) for side in rows]
                    one, other = (side.reshape(*shape[:-1], -1) for side in rows)
                    total += one @ other.mT
        return total

    def _zeros(self, group: str, shape: Sequence[int]) -> Tensor:
        device = self.target[self._keys[group][0]].device if self._keys[group] else None
        return torch.zeros(shape, dtype=self.precision, device=device)

    def _assigned(self, group: str, keys: Sequence[str] | None) -> dict[str, Tensor]:
        """Return the best move of one group, with the units within its blocks.

        Only `keys` count; None stands for all.
        """
        if group in self._linear:
            if group not in self._similar:
                every = self._keys[group] if keys is None else keys
                self._similar[group] = self.similarity(group, every)
            prices = self._prices.get(group)
            order, self._prices[group] = assign_again(self._similar[group], prices)
            return {group: order}
        keys = self._keys[group] if keys is None else keys
        if group in self.spec.within:
            return {group: torch.stack([assign(each) for each in self.similarity(group, keys)])}
        if not self._inside[group]:
            return {group: assign(self.similarity(group, keys))}
        return self._assigned_blocks(group, keys)

    def _assigned_blocks(self, group: str, keys: Sequence[str]) -> dict[str, Tensor]:
        """Return the best move of blocks and of the units within them."""
        inside = self._inside[group]
        count = self.spec.groups[group]
        gain = self._zeros(group, (count, count))
        within = {
            name: self._zeros(group, (count, count, self.spec.groups[name], self.spec.groups[name]))
            for name in inside
        }
        for key in keys:
            for left, right, names in self._pairs(key, self.weights[key]):
                for dim in (place for place, name in enumerate(names) if name == group):
                    one, other = left.movedim(dim, 0), right.movedim(dim, 0)
                    rest = names[:dim] + names[dim + 1 :]
                    # Of two such groups in one tensor only one can be solved for at a time.
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
        index, orders = assign_blocks(gain, within)
        return {group: index} | orders

    def step(self, group: str) -> bool:
        """Solve one group's assignment; return whether its units moved.

        A move is kept only if the objective rises: a group that stands on two axes of one tensor
        makes it quadratic, and the linear assignment an approximation.
        """
        move = Permutation(self._assigned(group, None))
        if move.is_identity or (group not in self._linear and not self._gains(group, move)):
            return False
        self._take(group, move)
        return True

    def _gains(self, group: str, move: Permutation) -> bool:
        """Whether a move raises the objective by more than rounding."""
        moved = dict(self._moved(group, move))
        target = {key: self.target[key] for key in moved}
        before = {key: self.weights[key] for key in moved}
        scale = (
            inner(target, target, self.precision) * inner(before, before, self.precision)
        ) ** 0.5
        gain = inner(target, moved, self.precision) - inner(target, before, self.precision)
        return bool(gain > ROUNDING[self.precision] * scale)

    def place(self, group: str, index: Tensor) -> None:
        """Move the units of one group as told, whatever that does to the objective."""
        move = Permutation({group: index})
        self._prices.pop(group, None)
        self._take(group, move)

    def _moved(self, group: str, move: Permutation) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a group, moved, one at a time."""
        units = self._few(group, move)
        for key in self._keys[group]:
            yield key, self._moved_tensor(key, group, move, units)

    def _moved_tensor(
        self, key: str, group: str, move: Permutation, units: Tensor | None
    ) -> Tensor:
        """Return one tensor with the units of a group moved; of few units, only these."""
        old, axes = self.weights[key], self.spec.axes[key]
        places = [place for place, axis in enumerate(axes) if axis == Group(group, axis.size)]
        if units is None or len(places) != self._groups[key][group]:
            return self.spec.move(key, old, move)
        new = old.clone()
        (place,) = places
        source = move[group].to(old.device)[units]
        return new.index_copy_(place, units, old.index_select(place, source))

    def _few(self, group: str, move: Permutation) -> Tensor | None:
        """Return the units that a move takes elsewhere, if they are few."""
        if group not in self._linear:
            return None
        index = move[group]
        found = (index != torch.arange(len(index))).nonzero().flatten()
        device = self.target[self._keys[group][0]].device if self._keys[group] else None
        return found.to(device) if len(found) <= FEW * len(index) else None

    def _take(self, group: str, move: Permutation) -> None:
        """Take a move of one group, and change the similarities of its neighbours by it."""
        units = self._few(group, move)
        for key, new in self._moved(group, move):
            self._spread(key, new, group, units)
            self.weights[key] = new
        self._turn(group, move)

    def _put(self, group: str, move: Permutation) -> None:
        """Take a move of one group, of which its neighbours' similarities know nothing yet."""
        self.weights |= self._moved(group, move)
        self._turn(group, move)

    def _turn(self, group: str, move: Permutation) -> None:
        """Take a move of one group, whose tensors are moved, into all else that is kept of it."""
        if group in self._similar:
            self._similar[group] = self._similar[group].index_select(
                1, move[group].to(self._similar[group].device)
            )
        full = Permutation({**self._still, **move.indices}, self.spec.within)
        self.permutation = full.compose(self.permutation)

    def _spread(self, key: str, new: Tensor, group: str, units: Tensor | None) -> None:
        """Change the similarities of the other groups of a tensor from its old weights to new.

        Of one group only `units` have moved, if they are given.
        """
        if not (self._groups[key].keys() - {group}) & self._similar.keys():
            return
        old = self.weights[key]
        both = zip(self._pairs(key, new), pieces(old, self.spec.axes[key]), strict=True)
        for (left, right, names), (before, _) in both:
            others = [name for name in names if name != group and name in self._similar]
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

    def _add(self, group: str, left: Tensor, right: Tensor, names: Sequence[str]) -> None:
        """Add what one part of a tensor says to the similarity of one group."""
        dim = names.index(group)
        size = self.spec.groups[group]
        one, other = (side.movedim(dim, 0).reshape(size, -1) for side in (left, right))
        self._similar[group].addmm_(one, other.T)

    def start_canonical(self, groups: Iterable[str] | None = None) -> None:
        """Match groups (all by default) once, each only by tensors whose other groups are settled.

        The result does not depend on the order that the moving model's units came in: what the
        other tensors say depends on an order that means nothing yet. The group about which the
        settled tensors say most goes first.
        """
        unsettled = list(self._keys if groups is None else groups)
        names = [name for name in unsettled if name not in self.spec.within]
        waiting = {key: {*names} & found.keys() for key, found in self._groups.items()}
        total = dict.fromkeys(names, 1)
        known = dict.fromkeys(names, 0)
        usable: dict[str, list[str]] = {name: [] for name in names}
        self._similar = {
            name: self._zeros(name, (self.spec.groups[name],) * 2)
            for name in names
            if name in self._linear
        }

        def count(key: str, *settled: str) -> None:
            """Let a tensor count for groups whose other groups are settled."""
            for left, right, found in self._pairs(key, self.weights[key]):
                for name in settled:
                    if name in self._similar and name in found:
                        self._add(name, left, right, found)

        def offer(key: str) -> None:
            # A group on two axes of a tensor hides its own order from itself.
            (last,) = waiting[key]
            if self._groups[key][last] == 1 or last in self._linear:
                known[last] += self.target[key].numel()
                usable[last].append(key)
                count(key, last)

        for key, left in waiting.items():
            for name in left:
                total[name] += self.target[key].numel()
            if len(left) == 1:
                offer(key)
        while names:
            best = max(names, key=lambda name: known[name] / total[name])
            names.remove(best)
            move = Permutation(self._assigned(best, usable[best]))
            if not move.is_identity:
                # No tensor counts for another group yet that this one is on.
                self._put(best, move)
            for key in self._keys[best]:
                waiting[key].remove(best)
                if len(waiting[key]) == 1:
                    offer(key)
                elif not waiting[key]:
                    count(key, *(self._groups[key].keys() - {best}))

    def descend(
        self,
        groups: Iterable[str] | None = None,
        unsettled: Iterable[str] | None = None,
        sweeps: int = MAX_SWEEPS,
    ) -> int:
        """Sweep over the groups (all by default) until none moves; return the sweeps.

        Args:
            groups: those that may move.
            unsettled: those that may not be where they belong, all of `groups` by default; the
                others are looked at only when a neighbour has moved.
            sweeps: no more than so many; `unsettled` then tells what is left to look at.
        """
        names = list(self.spec.groups if groups is None else groups)
        self.unsettled = set(names if unsettled is None else unsettled)
        for sweep in range(1, sweeps + 1):
            for group in names:
                if group in self.unsettled:
                    self.unsettled.remove(group)
                    if self.step(group):
                        self.unsettled |= self.neighbours(group).intersection(names)
            if not self.unsettled:
                return sweep
        return sweeps

    def neighbours(self, group: str) -> set[str]:
        """Return the groups whose best move depends on where the units of one group are."""
        others = {name for key in self._keys[group] for name in self._groups[key]}
        others |= {*self._inside[group]}
        return others - {group} if group in self._linear else others

    @property
    def objective(self) -> float:
        """Inner product of target and moved weights."""
        return inner(self.target, self.weights, self.precision)
