"""Weight matching: permute one model until its weights lie closest to another's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_rebasin.assignment import assign, assign_blocks
from fl_rebasin.axes import Axis, Cat, Group, Parted, Prod, cut_axis, groups_of
from fl_rebasin.spec import Permutation, PermutationSpec, SpecError, StateDict

RELATIVE_TOLERANCE = 1e-12
"""An improvement counts when it exceeds this share of the objective's scale (float64 sums)."""
MAX_SWEEPS = 100


@dataclass(frozen=True)
class Match:
    """The result of matching one model to another.

    Attributes:
        permutation: moves `other` to `reference`.
        similarity: cosine of the learnable parameters afterwards, in [-1, 1].
        similarity_before: the same before the match.
        sweeps: sweeps over all groups.
    """

    permutation: Permutation
    similarity: float
    similarity_before: float
    sweeps: int


def check_finite(spec: PermutationSpec, state_dict: StateDict, name: str) -> None:
    """Raise `SpecError` unless a state dict fits the spec and all its values are finite."""
    spec.check(state_dict)
    for key in spec.axes:
        if not bool(torch.isfinite(state_dict[key]).all()):
            raise SpecError(f"{name}: {key} holds NaN or infinite values")


def checked_state(spec: PermutationSpec, model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the state dict of a module that fits the spec and whose values are finite.

    Raises:
        TypeError: it is no module.
        SpecError: it does not fit the spec, or holds NaN or infinite values.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a module, so that it can run, got {type(model).__name__}")
    state_dict = {key: value.detach() for key, value in model.state_dict().items()}
    check_finite(spec, state_dict, name)
    return state_dict


def weights_of(spec: PermutationSpec, state_dict: StateDict) -> dict[str, Tensor]:
    """Return the tensors that count in the objective, as they are: no copies."""
    return {key: state_dict[key].detach() for key in spec.learnable}


def inner(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the inner product of two models, in float64."""
    return sum(float(torch.sum(left[key].double() * right[key].double())) for key in left)


def cosine(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the cosine of two models; 0 where one of them is zero."""
    scale = (inner(left, left) * inner(right, right)) ** 0.5
    return inner(left, right) / scale if scale else 0.0


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


class Matcher:
    """Coordinate descent on the permutation of one model towards a target.

    All sums run in float64; the models are kept in the precision that they came in, since a
    server holds many of them.

    Args:
        spec: spec of both models.
        target: learnable tensors that stay.
        weights: learnable tensors to be permuted.
        start: permutation to begin with; by default nothing moves.

    Attributes:
        weights: what the permutation found so far makes of the start.
        permutation: the permutation found so far.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        target: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        start: Permutation | None = None,
    ) -> None:
        self.spec = spec
        self.target = target
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
        norms = {
            key: float(target[key].double().norm() * weights[key].double().norm())
            for key in self._groups
        }
        self._scale = {name: sum(map(norms.__getitem__, keys)) for name, keys in self._keys.items()}

    def _pieces(self, key: str) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Yield parts of one tensor, of target and own weights, and the groups on their axes."""
        axes = self.spec.axes[key]
        both = (side[key].double() for side in (self.target, self.weights))
        for (left, atoms), (right, _) in zip(*(pieces(side, axes) for side in both), strict=True):
            yield left, right, [atom.name if isinstance(atom, Group) else "" for atom in atoms]

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
            for left, right, names in self._pieces(key):
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
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def _assigned(self, group: str, keys: Sequence[str]) -> dict[str, Tensor]:
        """Return the best move of one group, with the units within its blocks."""
        if group in self.spec.within:
            return {group: torch.stack([assign(each) for each in self.similarity(group, keys)])}
        inside = self._inside[group]
        if not inside:
            return {group: assign(self.similarity(group, keys))}
        count = self.spec.groups[group]
        gain = self._zeros(group, (count, count))
        within = {
            name: self._zeros(group, (count, count, self.spec.groups[name], self.spec.groups[name]))
            for name in inside
        }
        for key in keys:
            for left, right, names in self._pieces(key):
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

    def _objective(self, group: str, weights: Mapping[str, Tensor]) -> float:
        """Return the part of the objective that a group's tensors make up."""
        return inner({key: self.target[key] for key in self._keys[group]}, weights)

    def step(self, group: str, settled_only: Iterable[str] | None = None) -> bool:
        """Solve one group's assignment; return whether its units moved.

        A move is kept only if the objective rises (a group that stands on two axes of one tensor
        makes it quadratic, and the linear assignment an approximation). With `settled_only`, the
        tensors to go by, it is kept anyway.
        """
        keys = self._keys[group] if settled_only is None else list(settled_only)
        move = Permutation(self._assigned(group, keys))
        if move.is_identity:
            return False
        moved = {key: self.spec.move(key, self.weights[key], move) for key in self._keys[group]}
        if settled_only is None:
            gain = self._objective(group, moved) - self._objective(group, self.weights)
            if gain <= RELATIVE_TOLERANCE * self._scale[group]:
                return False
        self._take(moved, move)
        return True

    def place(self, group: str, index: Tensor) -> None:
        """Move the units of one group as told, whatever that does to the objective."""
        move = Permutation({group: index})
        moved = {key: self.spec.move(key, self.weights[key], move) for key in self._keys[group]}
        self._take(moved, move)

    def _take(self, moved: Mapping[str, Tensor], move: Permutation) -> None:
        self.weights |= moved
        full = Permutation({**self._still, **move.indices}, self.spec.within)
        self.permutation = full.compose(self.permutation)

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

        def offer(key: str) -> None:
            # A group on two axes of a tensor hides its own order from itself.
            (last,) = waiting[key]
            if self._groups[key][last] == 1:
                known[last] += self.target[key].numel()
                usable[last].append(key)

        for key, left in waiting.items():
            for name in left:
                total[name] += self.target[key].numel()
            if len(left) == 1:
                offer(key)
        while names:
            best = max(names, key=lambda name: known[name] / total[name])
            names.remove(best)
            self.step(best, usable[best])
            for key in self._keys[best]:
                waiting[key].remove(best)
                if len(waiting[key]) == 1:
                    offer(key)

    def descend(self, groups: Iterable[str] | None = None) -> int:
        """Sweep over the groups (all by default) until none moves; return the sweeps."""
        names = list(self.spec.groups if groups is None else groups)
        for sweep in range(1, MAX_SWEEPS + 1):
            moved = [self.step(group) for group in names]
            if not any(moved):
                return sweep
        return MAX_SWEEPS

    @property
    def objective(self) -> float:
        """Inner product of target and moved weights."""
        return inner(self.target, self.weights)

    @property
    def slack(self) -> float:
        """What rounding may do to the objective of the tensors that can move."""
        return RELATIVE_TOLERANCE * sum(self._scale.values())


def best_match(
    spec: PermutationSpec,
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    start: Permutation | None = None,
    groups: Sequence[str] | None = None,
) -> tuple[Matcher, int]:
    """Match from two starts, keep the higher objective; return it with the number of sweeps.

    One start is the order that the model came in: right for models that share a history. The
    other is `start_canonical`, right for models that do not. A tie keeps the first. Only `groups`
    move (all by default); the others are where `start` puts them.
    """
    kept = Matcher(spec, target, weights, start)
    sweeps = kept.descend(groups)
    fresh = Matcher(spec, target, weights, start)
    fresh.start_canonical(groups)
    sweeps += fresh.descend(groups)
    if fresh.objective > kept.objective + kept.slack:
        return fresh, sweeps
    return kept, sweeps


def match_weights(
    spec: PermutationSpec,
    reference: StateDict,
    other: StateDict,
    start: Permutation | None = None,
) -> Match:
    """Find the permutation of `other` that brings its weights closest to `reference`.

    Maximises the inner product of the learnable parameters by coordinate descent, one linear
    assignment a group.

    Args:
        spec: spec of both models.
        reference: state dict that stays.
        other: state dict to be permuted; neither is changed.
        start: permutation of `other` to descend from, for example what `match_activations`
            found; by default the order that it came in and a fresh one are both tried.

    Raises:
        SpecError: a state dict or `start` does not fit the spec, or weights are not finite.

    Source: Git Re-Basin, Algorithm 1.

    Example:
        >>> from torch import nn
        >>> from fl_rebasin import derive_spec
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> spec = derive_spec(net, torch.zeros(1, 4))
        >>> shuffle = spec.random(torch.Generator().manual_seed(0))
        >>> moved = spec.apply(shuffle, net.state_dict())
        >>> round(match_weights(spec, net.state_dict(), moved).similarity, 3)
        1.0
    """
    check_finite(spec, reference, "reference")
    check_finite(spec, other, "other")
    target, weights = weights_of(spec, reference), weights_of(spec, other)
    if start is None:
        matcher, sweeps = best_match(spec, target, weights)
    else:
        spec.check_permutation(start)
        matcher = Matcher(spec, target, weights, start)
        sweeps = matcher.descend()
    return Match(
        permutation=matcher.permutation,
        similarity=cosine(target, matcher.weights),
        similarity_before=cosine(target, weights),
        sweeps=sweeps,
    )
