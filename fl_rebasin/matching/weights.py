"""Weight matching: permute one model until its weights lie closest to another's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_rebasin.matching.certificate import Reference, margins, uncertified_groups
from fl_rebasin.matching.coordinate_descent import MAX_SWEEPS, Matcher
from fl_rebasin.matching.objective import check_finite, inner, precision_of, weights_of
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

TIE = 1e-6
"""An objective is higher than another one by more than rounding if it is by this share."""


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


def best_match(
    spec: PermutationSpec,
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    start: Permutation | None = None,
    groups: Collection[str] | None = None,
    precision: torch.dtype = torch.float64,
    sweeps: int = MAX_SWEEPS,
) -> tuple[Matcher, int]:
    """Match from the better of two starts; return the result with the number of sweeps.

    One start is the order that the model came in: right for models that share a history. The
    other is `start_canonical`, right for models that do not. A tie keeps the first. Only `groups`
    move (all by default), in at most `sweeps` sweeps; the others are where `start` puts them.
    """
    came = Matcher(spec, target, weights, start, precision)
    fresh = Matcher(spec, target, weights, start, precision)
    fresh.start_canonical(groups)
    least = came.objective
    better = fresh if fresh.objective > least + TIE * abs(least) else came
    return better, better.descend(groups, sweeps=sweeps)


def match_to(reference: Reference, weights: Mapping[str, Tensor]) -> tuple[Permutation, int]:
    """Match a model to a reference, but for groups that a proof says are where they belong.

    Args:
        reference: what stays.
        weights: learnable tensors of the model.

    Returns:
        The permutation, and the number of sweeps: 0 where no group had to be looked at.
    """
    spec = reference.spec
    # Of one model alone the margins are those of a match with the reference.
    unsettled = uncertified_groups(margins(reference, [weights], [1.0]))
    if not unsettled:
        return spec.identity(), 0
    precision, _ = precision_of([reference.tensors, weights])
    matcher, sweeps = best_match(
        spec, reference.tensors, weights, groups=unsettled, precision=precision
    )
    if len(unsettled) < len(spec.groups):
        # What was proved of a group no longer holds once its neighbours have moved.
        again = uncertified_groups(margins(reference, [matcher.weights], [1.0]))
        sweeps += matcher.descend(unsettled=again)
    return matcher.permutation, sweeps


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

    Maximises the inner product of the learnable parameters by coordinate descent, one linear
    assignment a group.

    Args:
        spec: spec of both models.
        reference: state dict that stays.
        other: state dict to be permuted; neither is changed.
        start: permutation of `other` to descend from, for example what `match_activations`
            found; by default the better of the order that it came in and a fresh one.
        restarts: so many more descents, from random permutations; the best result is kept. One
            takes as long as the match itself.
        generator: what they are drawn with.

    Raises:
        SpecError: a state dict or `start` does not fit the spec, or weights are not finite.
        ValueError: restarts without a generator, or fewer than none.

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
        other_way = Matcher(spec, target, weights, spec.random(generator), precision)
        sweeps += other_way.descend()
        if other_way.objective > matcher.objective + TIE * abs(matcher.objective):
            matcher = other_way
    return Match(
        permutation=matcher.permutation,
        similarity=matcher.objective / scale,
        similarity_before=inner(target, weights, precision) / scale,
        sweeps=sweeps,
    )
