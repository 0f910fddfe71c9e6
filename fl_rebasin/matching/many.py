"""Alignment of N models: permutations that bring them into one basin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from fl_rebasin.matching.certificate import Reference, margins, uncertified_groups
from fl_rebasin.matching.many_methods import (
    descend,
    hierarchical,
    joint,
    textbook,
    to_heaviest,
)
from fl_rebasin.matching.models import Models
from fl_rebasin.matching.objective import weights_of
from fl_rebasin.matching.weights import match_to
from fl_rebasin.state_dicts import StateDict, normalised
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

Method = Literal["joint", "reference", "hierarchical", "textbook"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Alignment:
    """Permutations that align N models.

    Attributes:
        permutations: one for each model.
        sweeps: sweeps over all groups that were needed, summed over the models.
        margins: for each group how far the models are from needing any alignment (see
            `certificate.margins`); only the method `"joint"` computes them.
    """

    permutations: tuple[Permutation, ...]
    sweeps: int
    margins: Mapping[str, float] = field(default_factory=dict)


def heaviest(weights: Sequence[float]) -> int:
    """Return the index of the largest weight; the first of equal ones."""
    return max(range(len(weights)), key=lambda place: (weights[place], -place))


def all_identity(permutations: Iterable[Permutation]) -> bool:
    """Return whether every permutation is the identity."""
    return all(permutation.is_identity for permutation in permutations)


def align_many(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    *,
    unit_order_of: StateDict | None = None,
    start: Sequence[Permutation] | None = None,
    method: Method = "joint",
) -> Alignment:
    """Find permutations that align N models, without merging them.

    Does the same as `merge_many`, for callers that compute the average themselves. It does not
    check the models: they must fit the spec and be finite.

    Args:
        spec: spec of all models.
        state_dicts: the models.
        weights: one weight for each model, on any scale; equal weights by default.
        unit_order_of: the model whose unit order the aligned models take; by default the heaviest
            one.
        start: permutations to begin with. With a start, `method` is ignored, and each model is
            matched to the mean of the others.
        method: as for `merge_many`.

    Raises:
        ValueError: the method is unknown, or the weights are invalid.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    models = _models(spec, state_dicts, weights)
    target = None if unit_order_of is None else Reference(spec, weights_of(spec, unit_order_of))
    if start is None:
        return _align(models, method, target)
    identity = spec.identity().indices
    # A start may give one order for the units of all blocks.
    given = [
        Permutation({name: each[name].expand_as(identity[name]) for name in identity}, spec.within)
        for each in start
    ]
    permutations, sweeps = descend(models, given)
    return _in_unit_order(models, Alignment(tuple(permutations), sweeps), target)


def restore_unit_order(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None,
    permutations: Sequence[Permutation],
    unit_order_of: StateDict,
) -> Alignment:
    """Follow each permutation by a common one that matches the models' mean to a given model.

    Args:
        spec: spec of all models.
        state_dicts: the models.
        weights: one weight for each model; None for equal weights.
        permutations: permutations that align the models, in any unit order.
        unit_order_of: the model whose unit order the aligned models take.
    """
    models = _models(spec, state_dicts, weights)
    target = Reference(spec, weights_of(spec, unit_order_of))
    return _in_unit_order(models, Alignment(tuple(permutations), 0), target)


def mean_similarities(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    permutations: Sequence[Permutation],
    weights: Sequence[float] | None,
) -> tuple[float, float]:
    """Return the weighted mean cosine between models and their mean, before and after alignment.

    Only learnable parameters count.
    """
    models = _models(spec, state_dicts, weights)
    before = models.similarity(models.identities())
    if all_identity(permutations):
        return before, before
    return before, models.similarity(permutations)


def _models(
    spec: PermutationSpec, state_dicts: Sequence[StateDict], weights: Sequence[float] | None
) -> Models:
    models = [weights_of(spec, state_dict) for state_dict in state_dicts]
    return Models(spec, models, normalised(weights, len(models)))


def _align(models: Models, method: Method, unit_order_of: Reference | None) -> Alignment:
    """Align models by one method; see `merge_many`."""
    found_margins: dict[str, float] = {}
    match method:
        case "joint":
            identities = models.identities()
            reference = unit_order_of or Reference(models.spec, models.mean(identities))
            found_margins = margins(reference, models.models, models.shares)
            uncertified = uncertified_groups(found_margins)
            if not uncertified:
                return Alignment(tuple(identities), 0, found_margins)
            permutations, sweeps = joint(models, uncertified)
        case "reference":
            permutations, sweeps = to_heaviest(models)
        case "hierarchical":
            permutations, sweeps = hierarchical(models)
        case "textbook":
            permutations, sweeps = textbook(models)
    found = Alignment(tuple(permutations), sweeps, found_margins)
    return _in_unit_order(models, found, unit_order_of)


def _in_unit_order(models: Models, found: Alignment, unit_order_of: Reference | None) -> Alignment:
    """Apply one common permutation to all models, which fixes the unit order of their mean.

    By default it undoes the permutation of the heaviest model; given a model, it matches the mean
    to that.
    """
    back = found.permutations[heaviest(models.shares)].invert()
    permutations = [back.compose(each) for each in found.permutations]
    sweeps = found.sweeps
    if unit_order_of is not None:
        common, used = match_to(unit_order_of, models.mean(permutations))
        permutations = [common.compose(each) for each in permutations]
        sweeps += used
    return Alignment(tuple(permutations), sweeps, found.margins)
