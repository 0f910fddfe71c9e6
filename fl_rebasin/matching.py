"""Weight matching: permute one model until its weights lie closest to another's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_rebasin.assignment import assign
from fl_rebasin.spec import (
    Axis,
    Cat,
    Group,
    Permutation,
    PermutationSpec,
    Prod,
    SpecError,
    StateDict,
    groups_of,
)

RELATIVE_TOLERANCE = 1e-7
"""An improvement counts when it exceeds this share of the objective's scale (float32 sums)."""
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
    """Raise `SpecError` unless a state dict fits the spec and all its weights are finite."""
    spec.check(state_dict)
    for key in spec.learnable:
        if not bool(torch.isfinite(state_dict[key]).all()):
            raise SpecError(f"{name}: {key} holds NaN or infinite values")


def weights_of(spec: PermutationSpec, state_dict: StateDict) -> dict[str, Tensor]:
    """Return the tensors that count in the objective, as float32 (or float64 where they are)."""
    return {
        key: state_dict[key].detach().to(torch.promote_types(state_dict[key].dtype, torch.float32))
        for key in spec.learnable
    }


def inner(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the inner product of two models, summed in float64 over tensors."""
    return sum(float(torch.sum(left[key] * right[key], dtype=torch.float64)) for key in left)


def cosine(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the cosine of two models; 0 where one of them is zero."""
    scale = (inner(left, left) * inner(right, right)) ** 0.5
    return inner(left, right) / scale if scale else 0.0


def occurrences(axis: Axis, group: str) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
    """Yield where a group stands in an axis.

    Each item is `(offset, length, (outer, n, inner))`: the places `[offset, offset + length)` of
    the axis, reshaped to `(outer, n, inner)`, hold the group's units along the middle axis. Parts
    between which a concatenation stands inside a product are yielded one slice at a time.
    """
    match axis:
        case Group(name, size) if name == group:
            yield 0, size, (1, size, 1)
        case Cat(parts):
            offset = 0
            for part in parts:
                for start, length, shape in occurrences(part, group):
                    yield offset + start, length, shape
                offset += part.size
        case Prod(factors):
            for place, part in enumerate(factors):
                if not any(g.name == group for g in groups_of(part)):
                    continue
                before = Prod(factors[:place]).size
                after = Prod(factors[place + 1 :]).size
                for start, length, (outer, size, inside) in occurrences(part, group):
                    if length == part.size:
                        yield 0, axis.size, (before * outer, size, inside * after)
                        continue
                    for block in range(before):
                        yield (
                            (block * part.size + start) * after,
                            length * after,
                            (outer, size, inside * after),
                        )
        case _:
            return


class Matcher:
    """Coordinate descent on the permutation of one model towards a target.

    Holds the target and the moving model's current weights; `weights` is what the permutation
    found so far makes of the start.
    """

    def __init__(
        self, spec: PermutationSpec, target: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> None:
        self.spec = spec
        self.target = target
        self.weights = dict(weights)
        self.permutation = spec.identity()
        self._uses: dict[str, list[tuple[str, int]]] = {name: [] for name in spec.groups}
        for key in spec.learnable:
            for dim, axis in enumerate(spec.axes[key]):
                for name in {group.name for group in groups_of(axis)}:
                    self._uses[name].append((key, dim))
        self._scale = (inner(target, target) * inner(weights, weights)) ** 0.5

    def similarity(self, group: str, settled: set[str] | None = None) -> Tensor:
        """Return the `(n, n)` inner products of target units and own units of one group.

        With `settled`, tensors that another, not yet settled group moves are left out: what
        they say depends on an order that means nothing yet.
        """
        size = self.spec.groups[group]
        total = torch.zeros(size, size)
        for key, dim in self._uses[group]:
            if settled is not None and any(
                other.name != group and other.name not in settled
                for axis in self.spec.axes[key]
                for other in groups_of(axis)
            ):
                continue
            for start, length, shape in occurrences(self.spec.axes[key][dim], group):
                sides = []
                for tensor in (self.target[key], self.weights[key]):
                    part = tensor.movedim(dim, 0)[start : start + length]
                    unfolded = part.reshape(*shape, -1).movedim(1, 0)
                    sides.append(unfolded.reshape(size, -1))
                total = total.to(sides[0]) + sides[0] @ sides[1].T
        return total

    def _objective(self, group: str, weights: Mapping[str, Tensor]) -> float:
        """Return the part of the objective that a group's tensors make up."""
        keys = {key for key, _ in self._uses[group]}
        return sum(float(torch.sum(self.target[k] * weights[k], dtype=torch.float64)) for k in keys)

    def step(self, group: str, settled: set[str] | None = None) -> bool:
        """Solve one group's assignment; return whether its units moved.

        A move is kept only if the objective rises (a group that stands on two axes of one tensor
        makes it quadratic, and the linear assignment an approximation).
        """
        index = assign(self.similarity(group, settled))
        if torch.equal(index, torch.arange(len(index))):
            return False
        move = Permutation({group: index})
        moved = {
            key: self.spec.move(key, self.weights[key], move)
            for key in {key for key, _ in self._uses[group]}
        }
        if settled is None:
            gain = self._objective(group, moved) - self._objective(group, self.weights)
            if gain <= RELATIVE_TOLERANCE * self._scale:
                return False
        self.weights |= moved
        indices = dict(self.permutation.indices)
        indices[group] = indices[group][index]
        self.permutation = Permutation(indices)
        return True

    def start_canonical(self) -> None:
        """Match every group once, each only by tensors whose other groups are settled.

        The result does not depend on the order that the moving model's units came in.
        """
        settled: set[str] = set()
        waiting = list(self.spec.groups)
        while waiting:
            # The group with most evidence goes next: it has the most settled tensor entries.
            best = max(waiting, key=lambda name: self._evidence(name, settled))
            self.step(best, settled)
            settled.add(best)
            waiting.remove(best)

    def _evidence(self, group: str, settled: set[str]) -> float:
        known = total = 0
        for key, _ in self._uses[group]:
            size = self.target[key].numel()
            total += size
            others = {g.name for axis in self.spec.axes[key] for g in groups_of(axis)} - {group}
            if others <= settled:
                known += size
        return known / total if total else 0.0

    def descend(self) -> int:
        """Sweep over the groups until none moves; return the number of sweeps."""
        for sweep in range(1, MAX_SWEEPS + 1):
            moved = [self.step(group) for group in self.spec.groups]
            if not any(moved):
                return sweep
        return MAX_SWEEPS

    @property
    def objective(self) -> float:
        """Inner product of target and moved weights."""
        return inner(self.target, self.weights)


def best_match(
    spec: PermutationSpec, target: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[Matcher, int]:
    """Match from two starts, keep the higher objective; return it with the number of sweeps.

    One start is the order that the model came in: right for models that share a history. The
    other is `start_canonical`, right for models that do not. A tie keeps the first.
    """
    kept = Matcher(spec, target, weights)
    sweeps = kept.descend()
    fresh = Matcher(spec, target, weights)
    fresh.start_canonical()
    sweeps += fresh.descend()
    if fresh.objective > kept.objective + RELATIVE_TOLERANCE * abs(kept.objective):
        return fresh, sweeps
    return kept, sweeps


def match_weights(spec: PermutationSpec, reference: StateDict, other: StateDict) -> Match:
    """Find the permutation of `other` that brings its weights closest to `reference`.

    Maximises the inner product of the learnable parameters by coordinate descent, one linear
    assignment a group.

    Args:
        spec: spec of both models.
        reference: state dict that stays.
        other: state dict to be permuted; neither is changed.

    Raises:
        SpecError: a state dict does not fit the spec, or holds NaN or infinite weights.

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
    matcher, sweeps = best_match(spec, target, weights)
    return Match(
        permutation=matcher.permutation,
        similarity=cosine(target, matcher.weights),
        similarity_before=cosine(target, weights),
        sweeps=sweeps,
    )
