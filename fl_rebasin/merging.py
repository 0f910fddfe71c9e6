"""N models into one: permutation-aligned weighted averaging (MergeMany)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fl_rebasin.matching import (
    MAX_SWEEPS,
    RELATIVE_TOLERANCE,
    Matcher,
    best_match,
    check_finite,
    cosine,
    inner,
    weights_of,
)
from fl_rebasin.spec import Permutation, PermutationSpec, StateDict, like


@dataclass(frozen=True)
class Merge:
    """The result of merging N models.

    Attributes:
        state_dict: the weighted mean of the permuted models; keys, dtypes and order of the first.
        permutations: one for each model, in the order given.
        similarity: weighted mean cosine of the permuted models to the merged one.
        similarity_before: the same for the models as they came and their plain mean.
        sweeps: sweeps over all groups, summed over the models.
    """

    state_dict: dict[str, Tensor]
    permutations: tuple[Permutation, ...]
    similarity: float
    similarity_before: float
    sweeps: int

    @property
    def moved(self) -> int:
        """Number of units that changed place, summed over the models."""
        return sum(permutation.moved for permutation in self.permutations)


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return weights that sum to 1; equal ones for None.

    Raises:
        ValueError: no models, a wrong number of weights, or one that is negative, not finite, or
            all zero.
    """
    if count == 0:
        raise ValueError("no models to merge")
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} models")
    bad = [weight for weight in weights if not 0 <= weight < float("inf")]
    if bad:
        raise ValueError(f"weights must be finite and not negative, got {bad[0]}")
    total = float(sum(weights))
    if total == 0:
        raise ValueError("all weights are 0: give at least one model a positive weight")
    return [float(weight) / total for weight in weights]


def average(state_dicts: Sequence[StateDict], weights: Sequence[float] | None) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts with equal keys and shapes.

    Sums run in float64; dtypes are kept, integers are rounded.
    """
    shares = normalised(weights, len(state_dicts))
    merged = {}
    for key, first in state_dicts[0].items():
        total = sum(
            share * state_dict[key].detach().double()
            for share, state_dict in zip(shares, state_dicts, strict=True)
        )
        assert isinstance(total, Tensor)
        merged[key] = (total if first.is_floating_point() else total.round()).to(first.dtype)
    return like(state_dicts[0], merged)


def _combine(
    spec: PermutationSpec,
    models: Sequence[StateDict],
    permutations: Sequence[Permutation],
    shares: Sequence[float],
) -> dict[str, Tensor]:
    """Return the weighted sum of permuted models in float64; one at a time is permuted."""
    total: dict[str, Tensor] = {}
    for model, permutation, share in zip(models, permutations, shares, strict=True):
        for key, value in model.items():
            part = spec.move(key, value, permutation).double()
            total[key] = total[key].add_(part, alpha=share) if key in total else share * part
    return total


@dataclass
class _Alignment:
    """The permutations of N models, and the sweeps it took to find them."""

    permutations: list[Permutation]
    sweeps: int


def _by_weight(shares: Sequence[float]) -> list[int]:
    """Return the models' places from light to heavy; of equal ones the first counts as heaviest.

    The heaviest model is the last to move, so that its unit order tends to stay.
    """
    return sorted(range(len(shares)), key=lambda place: (shares[place], -place))


def _match_to_heaviest(
    models: Sequence[StateDict], spec: PermutationSpec, shares: Sequence[float]
) -> _Alignment:
    """Match every model to the heaviest one."""
    reference = heaviest(shares)
    result = _Alignment([spec.identity() for _ in models], 0)
    for place, model in enumerate(models):
        if place != reference:
            matcher, used = best_match(spec, models[reference], model)
            result.permutations[place] = matcher.permutation
            result.sweeps += used
    return result


def _descend_jointly(
    models: Sequence[StateDict], start: _Alignment, spec: PermutationSpec, shares: Sequence[float]
) -> _Alignment:
    """Align each model to the weighted mean of the others, until nobody moves.

    Of the permuted models only the one that is being aligned exists; their sum is kept.
    """
    permutations, sweeps = list(start.permutations), start.sweeps
    total = _combine(spec, models, permutations, shares)
    for _ in range(MAX_SWEEPS):
        moved = False
        for place in _by_weight(shares):
            share = shares[place]
            if share == 1:
                continue
            matcher = Matcher(spec, total, models[place], permutations[place])
            for key, value in matcher.weights.items():
                total[key].sub_(value.double(), alpha=share)
            sweeps += matcher.descend()
            for key, value in matcher.weights.items():
                total[key].add_(value.double(), alpha=share)
            if matcher.permutation != permutations[place]:
                moved = True
                permutations[place] = matcher.permutation
        if not moved:
            break
    return _Alignment(permutations, sweeps)


def align_many(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    gauge: StateDict | None = None,
    start: Sequence[Permutation] | None = None,
) -> tuple[tuple[Permutation, ...], int]:
    """Find permutations that bring N models together; return them and the sweeps needed.

    The same as `merge_many` without the average: for callers that average otherwise. With `start`
    the joint descent runs from there only.
    """
    shares, models = _checked(spec, state_dicts, weights)
    if start is not None:
        given = [
            Matcher(spec, model, model, each).permutation
            for model, each in zip(models, start, strict=True)
        ]
        found = _descend_jointly(models, _Alignment(given, 0), spec, shares)
        return _in_unit_order(spec, models, shares, found, gauge)
    still = _Alignment([spec.identity() for _ in models], 0)
    best = _descend_jointly(models, still, spec, shares)
    # Descent from the models as they came stays stuck when some are aligned among themselves:
    # once more, with everybody first matched to the heaviest model. A tie changes nothing.
    matched = _descend_jointly(models, _match_to_heaviest(models, spec, shares), spec, shares)
    norms = sum(share**2 * inner(model, model) for share, model in zip(shares, models, strict=True))
    # The squared norm of the merged model is the objective, up to what never changes.
    reached = []
    for each in (best, matched):
        merged = _combine(spec, models, each.permutations, shares)
        reached.append(inner(merged, merged))
    if reached[1] > reached[0] + RELATIVE_TOLERANCE * norms:
        best, matched = matched, best
    best.sweeps += matched.sweeps
    return _in_unit_order(spec, models, shares, best, gauge)


def align_to_heaviest(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    gauge: StateDict | None = None,
) -> tuple[tuple[Permutation, ...], int]:
    """Match each of N models to the heaviest one; return the permutations and the sweeps."""
    shares, models = _checked(spec, state_dicts, weights)
    return _in_unit_order(spec, models, shares, _match_to_heaviest(models, spec, shares), gauge)


def heaviest(weights: Sequence[float]) -> int:
    """Return the place of the heaviest model; of equal ones the first."""
    return _by_weight(weights)[-1]


def into_gauge(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None,
    permutations: Sequence[Permutation],
    gauge: StateDict,
) -> tuple[Permutation, ...]:
    """Return the permutations followed by one for all, which brings their mean to a gauge."""
    shares, models = _checked(spec, state_dicts, weights)
    found = _Alignment(list(permutations), 0)
    return _in_unit_order(spec, models, shares, found, gauge)[0]


def _checked(
    spec: PermutationSpec, state_dicts: Sequence[StateDict], weights: Sequence[float] | None
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Return shares that sum to 1 and the learnable tensors of each model."""
    shares = normalised(weights, len(state_dicts))
    for place, state_dict in enumerate(state_dicts):
        check_finite(spec, state_dict, f"model {place}")
    return shares, [weights_of(spec, state_dict) for state_dict in state_dicts]


def _in_unit_order(
    spec: PermutationSpec,
    models: Sequence[StateDict],
    shares: Sequence[float],
    found: _Alignment,
    gauge: StateDict | None,
) -> tuple[tuple[Permutation, ...], int]:
    """Move all models alike, so that the heaviest stays or their mean lies closest to the gauge."""
    home = found.permutations[heaviest(shares)].invert()
    permutations = [home.compose(permutation) for permutation in found.permutations]
    sweeps = found.sweeps
    if gauge is not None:
        check_finite(spec, gauge, "gauge")
        merged = _combine(spec, models, permutations, shares)
        matcher, used = best_match(spec, weights_of(spec, gauge), merged)
        permutations = [matcher.permutation.compose(each) for each in permutations]
        sweeps += used
    return tuple(permutations), sweeps


def merge_many(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    gauge: StateDict | None = None,
) -> Merge:
    """Permute N models into one basin and return their weighted mean.

    Maximises `sum_{i<j} w_i w_j <p_i(theta_i), p_j(theta_j)>`, which is the same as minimising the
    weighted variance around the merged model, by matching each model in turn to the weighted mean
    of the others. That descent runs twice, from the models as they came and from the models
    matched to the heaviest one; the higher objective is kept.

    Args:
        spec: spec of all models.
        state_dicts: the models, N >= 1; not changed.
        weights: one weight a model (for example its number of training examples), any scale;
            equal ones by default.
        gauge: a state dict whose unit order the merged model shall take, for example the global
            model of the last round; by default that of the heaviest model.

    Raises:
        SpecError: a model does not fit the spec, or holds NaN or infinite weights.
        ValueError: no models, or bad weights.

    Source: Git Re-Basin, Algorithm 3 (MergeMany), with weights.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fl_rebasin import derive_spec
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> spec = derive_spec(net, torch.zeros(1, 4))
        >>> copies = [spec.apply(spec.random(torch.Generator().manual_seed(i)), net.state_dict())
        ...           for i in range(3)]
        >>> merge = merge_many(spec, copies, weights=[1, 2, 3])
        >>> bool(torch.allclose(merge.state_dict["0.weight"], copies[2]["0.weight"]))
        True
    """
    permutations, sweeps = align_many(spec, state_dicts, weights, gauge)
    aligned = [
        spec.apply(permutation, state_dict)
        for permutation, state_dict in zip(permutations, state_dicts, strict=True)
    ]
    still = [spec.identity() for _ in permutations]
    return Merge(
        state_dict=average(aligned, weights),
        permutations=permutations,
        similarity=mean_similarity(spec, state_dicts, permutations, weights),
        similarity_before=mean_similarity(spec, state_dicts, still, weights),
        sweeps=sweeps,
    )


def mean_similarity(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    permutations: Sequence[Permutation],
    weights: Sequence[float] | None,
) -> float:
    """Return the weighted mean cosine of permuted models to their mean, over what can be learnt."""
    shares = normalised(weights, len(state_dicts))
    models = [weights_of(spec, state_dict) for state_dict in state_dicts]
    centre = _combine(spec, models, permutations, shares)
    return sum(
        share * cosine({key: spec.move(key, model[key], permutation) for key in model}, centre)
        for share, model, permutation in zip(shares, models, permutations, strict=True)
    )


def interpolate(left: StateDict, right: StateDict, lam: float) -> dict[str, Tensor]:
    """Return `(1 - lam) * left + lam * right`, key by key; dtypes are kept, integers rounded.

    Args:
        left: state dict at `lam = 0`.
        right: state dict at `lam = 1`, with the same keys and shapes.
        lam: place on the line, in [0, 1].

    Raises:
        ValueError: `lam` is outside [0, 1], or the keys or shapes differ.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    if odd := sorted(left.keys() ^ right.keys()):
        raise ValueError(f"the state dicts differ in their keys: only one of them has {odd[:3]}")
    if odd := [key for key in left if left[key].shape != right[key].shape]:
        raise ValueError(f"the state dicts differ in the shapes of {odd[:3]}")
    return average([left, right], [1 - lam, lam])
