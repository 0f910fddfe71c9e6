"""Ways to bring N models into one basin: who is matched to whom, and in which order."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor

from fl_rebasin.matching.assignment import Prices
from fl_rebasin.matching.certificate import Reference, margins, uncertified_groups
from fl_rebasin.matching.coordinate_descent import MAX_SWEEPS, Matcher
from fl_rebasin.matching.objective import inner, precision_of, weights_of
from fl_rebasin.matching.weights import best_match, match_to
from fl_rebasin.state_dicts import StateDict, normalised
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

Method = Literal["joint", "reference", "hierarchical", "textbook"]
METHODS: tuple[Method, ...] = get_args(Method)


FEW_SWEEPS = 3
GAIN = 1e-4
"""A turn over all models that raises the objective by a smaller share is the last."""


@dataclass(frozen=True)
class Alignment:
    """Permutations that bring N models together.

    Attributes:
        permutations: one for each model.
        sweeps: sweeps over all groups that it took to find them, summed over the models.
        margins: for each group how far the models are from needing any alignment (see
            `nearness.margins`); empty where nobody asked.
    """

    permutations: tuple[Permutation, ...]
    sweeps: int
    margins: Mapping[str, float] = field(default_factory=dict)


def heaviest(weights: Sequence[float]) -> int:
    """Return the place of the heaviest model; of equal ones the first."""
    return max(range(len(weights)), key=lambda place: (weights[place], -place))


def all_identity(permutations: Iterable[Permutation]) -> bool:
    """Whether no permutation moves anything."""
    return all(permutation.is_identity for permutation in permutations)


class Models:
    """N models on their way into one basin; of the permuted ones only one exists at a time.

    Args:
        spec: spec of all models.
        models: their learnable tensors.
        shares: their weights, which sum to 1.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        models: Sequence[Mapping[str, Tensor]],
        shares: Sequence[float],
    ) -> None:
        self.spec = spec
        self.models = models
        self.shares = shares

    @cached_property
    def _measured(self) -> tuple[torch.dtype, list[float]]:
        return precision_of(self.models)

    @property
    def precision(self) -> torch.dtype:
        """Dtype of all products."""
        return self._measured[0]

    @cached_property
    def order(self) -> list[int]:
        """The models' places from light to heavy, of equal ones from short to long.

        Whatever order they came in, the result is the same.
        """
        _, lengths = self._measured
        return sorted(
            range(len(self.models)), key=lambda place: (self.shares[place], lengths[place])
        )

    def identities(self) -> list[Permutation]:
        """Return permutations that move nothing."""
        return [self.spec.identity() for _ in self.models]

    def moved(self, place: int, permutation: Permutation) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one model, permuted, one at a time."""
        still = permutation.is_identity
        for key in self.spec.learnable:
            value = self.models[place][key]
            value = value if still else self.spec.move(key, value, permutation)
            yield key, value.to(self.precision)

    def mean(
        self, permutations: Sequence[Permutation], places: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted sum of permuted models, of all of them or of some."""
        total: dict[str, Tensor] = {}
        for place in self.order if places is None else places:
            share = self.shares[place]
            for key, part in self.moved(place, permutations[place]):
                total[key] = total[key].add_(part, alpha=share) if key in total else share * part
        return total

    def objective(self, permutations: Sequence[Permutation]) -> float:
        """Return the squared norm of the mean: what alignment maximises, up to a constant."""
        mean = self.mean(permutations)
        return inner(mean, mean, self.precision)

    def similarity(self, permutations: Sequence[Permutation]) -> float:
        """Return the weighted mean cosine of the permuted models to their mean."""
        precision, lengths = self._measured
        centre = self.mean(permutations)
        norm = inner(centre, centre, precision)
        total = 0.0
        for place, permutation in enumerate(permutations):
            product = sum(
                inner({key: part}, centre, precision)
                for key, part in self.moved(place, permutation)
            )
            total += self.shares[place] * product / (math.sqrt(norm * lengths[place]) or 1.0)
        return total

    def margins(
        self, reference: Reference, permutations: Sequence[Permutation]
    ) -> dict[str, float]:
        """Return for each group how far the permuted models are from needing more."""
        moved = (dict(self.moved(place, each)) for place, each in enumerate(permutations))
        return margins(reference, moved, self.shares)

    def _match(
        self,
        target: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        groups: Collection[str] | None = None,
        most: int = MAX_SWEEPS,
    ) -> tuple[Permutation, int]:
        """Match weights to a target; the matcher's copy of them does not outlive the match."""
        matcher, sweeps = best_match(
            *(self.spec, target, weights), groups=groups, precision=self.precision, sweeps=most
        )
        return matcher.permutation, sweeps

    def match_to_reference(
        self, groups: Collection[str] | None = None, most: int = MAX_SWEEPS
    ) -> tuple[list[Permutation], int]:
        """Match every model to the last one in order.

        Args:
            groups: those that may move, by default all.
            most: no more sweeps than so many for each model.
        """
        found, sweeps = self.identities(), 0
        *others, reference = self.order
        for place in others:
            found[place], used = self._match(
                self.models[reference], self.models[place], groups, most
            )
            sweeps += used
        return found, sweeps

    def match_in_pairs(self) -> tuple[list[Permutation], int]:
        """Match and merge models in pairs, then what came of it in pairs, until one is left."""
        found, sweeps = self.identities(), 0
        clusters = [[place] for place in self.order]
        while len(clusters) > 1:
            pairs = [clusters[place : place + 2] for place in range(0, len(clusters), 2)]
            for light, heavy in (pair for pair in pairs if len(pair) == 2):
                permutation, used = self._match(self.mean(found, heavy), self.mean(found, light))
                sweeps += used
                for place in light:
                    found[place] = permutation.compose(found[place])
            clusters = [list(chain.from_iterable(pair)) for pair in pairs]
        return found, sweeps

    def descend(
        self,
        start: Sequence[Permutation],
        unsettled: Collection[str] | None = None,
        mean: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[Permutation], int]:
        """Match each model to the weighted mean of the others, until nothing is gained.

        A model stays with a mean for a few sweeps only: the others move in the meantime.

        Args:
            start: permutations to begin with.
            unsettled: groups whose units may not be where they belong; by default all.
            mean: the mean of the models so permuted, if it is known; it is written to.
        """
        permutations, sweeps = list(start), 0
        total = self.mean(permutations) if mean is None else mean
        prices: list[dict[str, Prices | None]] = [{} for _ in self.models]
        height = inner(total, total, self.precision)
        waiting = [set(self.spec.groups if unsettled is None else unsettled) for _ in self.models]
        for _ in range(MAX_SWEEPS):
            for place in self.order:
                share = self.shares[place]
                if not waiting[place] or share in (0, 1):
                    continue
                matcher = Matcher(
                    *(self.spec, total, self.models[place], permutations[place]),
                    *(self.precision, prices[place]),
                )
                for key, value in matcher.weights.items():
                    total[key].sub_(value.to(self.precision), alpha=share)
                sweeps += matcher.descend(unsettled=waiting[place], sweeps=FEW_SWEEPS)
                for key, value in matcher.weights.items():
                    total[key].add_(value.to(self.precision), alpha=share)
                changed = [
                    name
                    for name, index in matcher.permutation.indices.items()
                    if not torch.equal(index, permutations[place][name].expand_as(index))
                ]
                permutations[place] = matcher.permutation
                waiting[place] = set(matcher.unsettled)
                around = set(changed).union(*map(matcher.neighbours, changed))
                for other, each in enumerate(waiting):
                    if other != place:
                        each |= around
                del matcher  # And with it its copy of the model, before the next one is made.
            before, height = height, inner(total, total, self.precision)
            if height <= before * (1 + GAIN):
                break
        return permutations, sweeps


def align(models: Models, method: Method, unit_order_of: Reference | None) -> Alignment:
    """Bring models together.

    Args:
        models: what came.
        method: `joint`: nothing, if a proof shows that nothing is to be done; else all matched to
            the heaviest, then each in turn matched to the mean of the others, until nobody moves;
            where the first step is one down, from pairs and from the models as they came instead.
            `reference`: all matched to the heaviest. `hierarchical`: matched and merged in pairs.
            `textbook`: each in turn matched to the mean of the others, from the models as they
            came (Git Re-Basin, Algorithm 3).
        unit_order_of: the model whose unit order the mean takes; by default the heaviest model.
    """
    came = models.identities()
    if method == "joint":
        around = (
            Reference(models.spec, models.mean(came)) if unit_order_of is None else unit_order_of
        )
        room = margins(around, models.models, models.shares)
        unsettled = uncertified_groups(room)
        if not unsettled:
            return Alignment(tuple(came), 0, room)
        found, sweeps = _jointly(models, unsettled)
        return in_unit_order(models, Alignment(tuple(found), sweeps, room), unit_order_of)
    if method == "reference":
        found, sweeps = models.match_to_reference()
    elif method == "hierarchical":
        found, sweeps = models.match_in_pairs()
    else:
        found, sweeps = models.descend(came)
    return in_unit_order(models, Alignment(tuple(found), sweeps), unit_order_of)


def _jointly(models: Models, unsettled: Collection[str]) -> tuple[list[Permutation], int]:
    came = models.identities()
    if len(came) == 1:
        return came, 0
    few = MAX_SWEEPS if len(came) == 2 else FEW_SWEEPS
    matched, sweeps = models.match_to_reference(unsettled, few)
    if all_identity(matched):
        found, used = models.descend(came, unsettled)
        return found, sweeps + used
    mean = models.mean(matched)
    if inner(mean, mean, models.precision) > models.objective(came):
        if len(came) == 2 and len(unsettled) == len(models.spec.groups):
            # One of them is where it belongs, and the match is all there is to do.
            return matched, sweeps
        unsettled = uncertified_groups(models.margins(Reference(models.spec, mean), matched))
        found, used = models.descend(matched, unsettled, mean)
        return found, sweeps + used
    del mean
    # Clusters that are aligned inside were torn apart: move them whole, or not at all.
    paired, used = models.match_in_pairs()
    sweeps += used
    found, used = models.descend(paired)
    sweeps += used
    stayed, used = models.descend(came, unsettled)
    best = max(stayed, found, key=models.objective)
    return best, sweeps + used


def in_unit_order(models: Models, found: Alignment, unit_order_of: Reference | None) -> Alignment:
    """Permute all models alike: the heaviest stays, or their mean moves to a given model."""
    home = found.permutations[heaviest(models.shares)].invert()
    permutations = [home.compose(each) for each in found.permutations]
    sweeps = found.sweeps
    if unit_order_of is not None:
        last, used = match_to(unit_order_of, models.mean(permutations))
        permutations = [last.compose(each) for each in permutations]
        sweeps += used
    return Alignment(tuple(permutations), sweeps, found.margins)


def align_many(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    *,
    unit_order_of: StateDict | None = None,
    start: Sequence[Permutation] | None = None,
    method: Method = "joint",
) -> Alignment:
    """Find permutations that bring N models together.

    The same as `merge_many` without the average, for callers that average otherwise, and without
    its checks: the models fit the spec, and all their values are finite. With `start`
    each model in turn is matched to the mean of the others from there, whatever the method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    models = _models(spec, state_dicts, weights)
    around = None if unit_order_of is None else Reference(spec, weights_of(spec, unit_order_of))
    if start is None:
        return align(models, method, around)
    still = spec.identity().indices
    given = [
        Permutation({name: each[name].expand_as(still[name]) for name in still}, spec.within)
        for each in start
    ]
    permutations, sweeps = models.descend(given)
    return in_unit_order(models, Alignment(tuple(permutations), sweeps), around)


def restore_unit_order(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None,
    permutations: Sequence[Permutation],
    unit_order_of: StateDict,
) -> Alignment:
    """Return the permutations, followed by one for all that moves their mean to a model."""
    models = _models(spec, state_dicts, weights)
    around = Reference(spec, weights_of(spec, unit_order_of))
    return in_unit_order(models, Alignment(tuple(permutations), 0), around)


def _models(
    spec: PermutationSpec, state_dicts: Sequence[StateDict], weights: Sequence[float] | None
) -> Models:
    models = [weights_of(spec, state_dict) for state_dict in state_dicts]
    return Models(spec, models, normalised(weights, len(models)))


def mean_similarities(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    permutations: Sequence[Permutation],
    weights: Sequence[float] | None,
) -> tuple[float, float]:
    """Return the weighted mean cosine of models to their mean, as they came and permuted.

    Only parameters that can be learnt count.
    """
    federation = _models(spec, state_dicts, weights)
    before = federation.similarity(federation.identities())
    if all_identity(permutations):
        return before, before
    return before, federation.similarity(permutations)
