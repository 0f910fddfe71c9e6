"""Weight matching: permute one model so that its weights are closest to another's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_rebasin.matching.canonical_start import start_canonical
from fl_rebasin.matching.certificate import Reference, margins, uncertified_groups
from fl_rebasin.matching.coordinate_descent import MAX_SWEEPS, Matcher
from fl_rebasin.matching.objective import check_finite, inner, precision_of, weights_of
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

TIE = 1e-6
"""Objectives that differ by a smaller share are equal up to rounding."""


@dataclass(frozen=True)
class Match:
    """The result of matching one model to another.

    Attributes:
        permutation: moves the units of `other` to those of `reference`.
        similarity: cosine between the learnable parameters of both models after the match.
        similarity_before: the same before the match.
        sweeps: number of sweeps over all groups; 0 for activation matching, which does not count.
    """

    permutation: Permutation
    similarity: float
    similarity_before: float
    sweeps: int


def match_weights(
    spec: PermutationSpec,
    reference: StateDict,
    other: StateDict,
    start: Permutation | None = None,
    *,
    restarts: int = 0,
    generator: torch.Generator | None = None,
) -> Match:
    """Find the permutation of `other` that brings its weights closest to `reference`.

    Maximises the inner product `<reference, p(other)>` of the learnable parameters over p, by
    coordinate descent with one linear assignment for each group.

    Args:
        spec: spec of both models.
        reference: state dict whose unit order is kept.
        other: state dict to permute; neither is changed.
        start: permutation of `other` to descend from, for example one that `match_activations`
            found; by default the better of its present order and a canonical one.
        restarts: number of further descents, from random permutations; the best result is kept.
            Each takes about as long as the match itself.
        generator: random generator for the restarts.

    Raises:
        SpecError: a state dict or `start` does not fit the spec, or values are not finite.
        ValueError: `restarts` is negative, or positive without a generator.

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
    if restarts < 0:
        raise ValueError(f"restarts must not be negative, got {restarts}")
    if restarts and generator is None:
        raise ValueError("restarts need a generator: torch.Generator().manual_seed(0), for example")
    check_finite(spec, reference, "reference")
    check_finite(spec, other, "other")
    target, weights = weights_of(spec, reference), weights_of(spec, other)
    precision, squares = precision_of([target, weights])
    scale = math.sqrt(squares[0] * squares[1]) or 1.0
    if start is None:
        matcher, sweeps = best_match(spec, target, weights, precision=precision)
    else:
        spec.check_permutation(start)
        matcher = Matcher(spec, target, weights, start, precision)
        sweeps = matcher.descend()
    for _ in range(restarts):
        assert generator is not None
        restarted = Matcher(spec, target, weights, spec.random(generator), precision)
        sweeps += restarted.descend()
        if restarted.objective > matcher.objective + TIE * abs(matcher.objective):
            matcher = restarted
    return Match(
        permutation=matcher.permutation,
        similarity=matcher.objective / scale,
        similarity_before=inner(target, weights, precision) / scale,
        sweeps=sweeps,
    )


def best_match(
    spec: PermutationSpec,
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    start: Permutation | None = None,
    groups: Collection[str] | None = None,
    precision: torch.dtype = torch.float64,
    sweeps: int = MAX_SWEEPS,
) -> tuple[Matcher, int]:
    """Descend from the better of two starts: the given one, and a canonical one.

    The given order suits models with a common history, the canonical one models without. If both
    are equally good, the given one is used.

    Args:
        spec: spec of both models.
        target: learnable tensors of the target.
        weights: learnable tensors of the model to permute.
        start: permutation to begin with; the identity by default.
        groups: groups that may move, all by default; the others keep their order in `start`.
        precision: dtype of all products.
        sweeps: largest number of sweeps.

    Returns:
        The matcher with its result, and the number of sweeps.
    """
    given = Matcher(spec, target, weights, start, precision)
    canonical = Matcher(spec, target, weights, start, precision)
    start_canonical(canonical, groups)
    baseline = given.objective
    better = canonical if canonical.objective > baseline + TIE * abs(baseline) else given
    return better, better.descend(groups, sweeps=sweeps)


def match_to(reference: Reference, weights: Mapping[str, Tensor]) -> tuple[Permutation, int]:
    """Match a model to a reference, except for groups that are certified to be in place.

    Args:
        reference: the reference model.
        weights: learnable tensors of the model.

    Returns:
        The permutation, and the number of sweeps: 0 if all groups are certified.
    """
    spec = reference.spec
    # With a single model, the margins certify its match with the reference.
    uncertified = uncertified_groups(margins(reference, [weights], [1.0]))
    if not uncertified:
        return spec.identity(), 0
    precision, _ = precision_of([reference.tensors, weights])
    matcher, sweeps = best_match(
        spec, reference.tensors, weights, groups=uncertified, precision=precision
    )
    if len(uncertified) < len(spec.groups):
        # Moves of these groups may invalidate the certificates of the others.
        pending = uncertified_groups(margins(reference, [matcher.weights], [1.0]))
        sweeps += matcher.descend(pending=pending)
    return matcher.permutation, sweeps
