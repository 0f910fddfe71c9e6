"""The methods that align N models: which models are matched to which, and in what order.

Each method returns one permutation for each model, and the number of sweeps over all groups,
summed over the models. The unit order of the result is arbitrary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from fl_rebasin.matching.assignment import Prices
from fl_rebasin.matching.certificate import Reference, uncertified_groups
from fl_rebasin.matching.coordinate_descent import MAX_SWEEPS, Matcher
from fl_rebasin.matching.models import Models
from fl_rebasin.matching.objective import inner
from fl_rebasin.matching.weights import best_match
from fl_rebasin.symmetry.spec import Permutation

FEW_SWEEPS = 3
"""Sweeps of one model before the next one: their mean is going to change anyway."""
MIN_GAIN = 1e-4
"""A pass over all models that raises the objective by a smaller share is the last."""

Found: TypeAlias = tuple[list[Permutation], int]
"""One permutation for each model, and the number of sweeps."""


def joint(models: Models, uncertified: Collection[str]) -> Found:
    """Match all models to the heaviest, then each model to the mean of the others.

    If the models lie in clusters that are aligned already, matching to a single reference can tear
    a cluster apart and lower the objective. In that case two other starts are tried, the models in
    pairs and the models unaligned, and the better result is kept.

    Args:
        models: the models.
        uncertified: groups that are not proved to be in place; the others move only when a
            neighbour has moved.
    """
    identities = models.identities()
    if len(models) == 1:
        return identities, 0
    # Two models need no second stage, so their match is completed.
    limit = MAX_SWEEPS if len(models) == 2 else FEW_SWEEPS
    matched, sweeps = to_heaviest(models, uncertified, limit)
    if all(permutation.is_identity for permutation in matched):
        found, used = descend(models, identities, uncertified)
        return found, sweeps + used
    mean = models.mean(matched)
    if inner(mean, mean, models.precision) > models.objective(identities):
        if len(models) == 2 and len(uncertified) == len(models.spec.groups):
            return matched, sweeps
        pending = uncertified_groups(models.margins(Reference(models.spec, mean), matched))
        found, used = descend(models, matched, pending, mean)
        return found, sweeps + used
    del mean
    paired, used_in_pairs = hierarchical(models)
    from_pairs, used_from_pairs = descend(models, paired)
    from_identities, used = descend(models, identities, uncertified)
    best = max(from_identities, from_pairs, key=models.objective)
    return best, sweeps + used_in_pairs + used_from_pairs + used


def to_heaviest(
    models: Models, groups: Collection[str] | None = None, limit: int = MAX_SWEEPS
) -> Found:
    """Match every model to the heaviest; of equally heavy ones, to the one of largest norm.

    Args:
        models: the models.
        groups: groups that may move; all by default.
        limit: largest number of sweeps for each model.
    """
    found, sweeps = models.identities(), 0
    *others, reference = models.order
    target = models.models[reference]
    for place in others:
        found[place], used = _match(models, target, models.models[place], groups, limit)
        sweeps += used
    return found, sweeps


def hierarchical(models: Models) -> Found:
    """Match and merge the models in pairs, then the merged models in pairs, until one is left."""
    found, sweeps = models.identities(), 0
    clusters = [[place] for place in models.order]
    while len(clusters) > 1:
        pairs = [clusters[place : place + 2] for place in range(0, len(clusters), 2)]
        for light, heavy in (pair for pair in pairs if len(pair) == 2):
            permutation, used = _match(models, models.mean(found, heavy), models.mean(found, light))
            sweeps += used
            for place in light:
                found[place] = permutation.compose(found[place])
        clusters = [list(chain.from_iterable(pair)) for pair in pairs]
    return found, sweeps


def textbook(models: Models) -> Found:
    """Match each model to the mean of the others, starting from the unaligned models.

    Source: Git Re-Basin, Algorithm 3 (MergeMany), with weights.
    """
    return descend(models, models.identities())


def descend(
    models: Models,
    start: Sequence[Permutation],
    pending: Collection[str] | None = None,
    mean: dict[str, Tensor] | None = None,
) -> Found:
    """Match each model to the weighted mean of the others, until the objective stops rising.

    Args:
        models: the models.
        start: permutations to begin with.
        pending: groups that may be out of place; all by default.
        mean: the mean of the models permuted by `start`, if known; it is overwritten.
    """
    descent = _Descent(models, start, pending, models.mean(start) if mean is None else mean)
    objective = descent.objective
    for _ in range(MAX_SWEEPS):
        for place in models.order:
            descent.step(place)
        before, objective = objective, descent.objective
        if objective <= before * (1 + MIN_GAIN):
            break
    return descent.permutations, descent.sweeps


class _Descent:
    """The state of `descend`: the permutations so far, and the mean of the permuted models.

    Attributes:
        permutations: one for each model.
        sweeps: number of sweeps, summed over the models.
    """

    def __init__(
        self,
        models: Models,
        start: Sequence[Permutation],
        pending: Collection[str] | None,
        mean: dict[str, Tensor],
    ) -> None:
        self.permutations = list(start)
        self.sweeps = 0
        self._models = models
        self._mean = mean
        groups = models.spec.groups if pending is None else pending
        self._pending = [set(groups) for _ in models.models]
        self._prices: list[dict[str, Prices | None]] = [{} for _ in models.models]

    @property
    def objective(self) -> float:
        """Squared norm of the mean."""
        return inner(self._mean, self._mean, self._models.precision)

    def step(self, place: int) -> None:
        """Match one model to the mean of the others, in a few sweeps."""
        share = self._models.shares[place]
        if not self._pending[place] or share in (0, 1):
            return
        before = self.permutations[place]
        # The mean becomes that of the others while the matcher runs, without a second copy.
        matcher = Matcher(
            self._models.spec,
            self._mean,
            self._models.models[place],
            before,
            self._models.precision,
            self._prices[place],
        )
        self._add_to_mean(matcher.weights, -share)
        self.sweeps += matcher.descend(pending=self._pending[place], sweeps=FEW_SWEEPS)
        self._add_to_mean(matcher.weights, share)
        self.permutations[place] = matcher.permutation
        self._pending[place] = set(matcher.pending)
        self._mark_pending(place, before, matcher)

    def _add_to_mean(self, weights: Mapping[str, Tensor], share: float) -> None:
        for key, value in weights.items():
            self._mean[key].add_(value.to(self._models.precision), alpha=share)

    def _mark_pending(self, place: int, before: Permutation, matcher: Matcher) -> None:
        """Mark the groups that changed, and their neighbours, as pending for the other models."""
        changed = [
            name
            for name, index in matcher.permutation.indices.items()
            if not torch.equal(index, before[name].expand_as(index))
        ]
        affected = set(changed).union(*map(matcher.incidence.neighbours, changed))
        for other, pending in enumerate(self._pending):
            if other != place:
                pending |= affected


def _match(
    models: Models,
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    groups: Collection[str] | None = None,
    limit: int = MAX_SWEEPS,
) -> tuple[Permutation, int]:
    """Match weights to a target; releases the matcher and its copy of the weights."""
    matcher, sweeps = best_match(
        models.spec, target, weights, groups=groups, precision=models.precision, sweeps=limit
    )
    return matcher.permutation, sweeps
