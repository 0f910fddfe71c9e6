"""N models into one: permutation-aligned weighted averaging (MergeMany)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_rebasin.nearness import Reference
from fl_rebasin.objective import check_finite, weights_of
from fl_rebasin.spec import Permutation, PermutationSpec, StateDict, like
from fl_rebasin.topologies import (
    METHODS,
    Alignment,
    Method,
    Models,
    align,
    all_still,
    in_unit_order,
)


@dataclass(frozen=True)
class Merge:
    """The result of merging N models.

    Attributes:
        state_dict: the weighted mean of the permuted models; keys, dtypes and order of the first.
        permutations: one for each model, in the order given.
        similarity: weighted mean cosine of the permuted models to the merged one.
        similarity_before: the same for the models as they came and their plain mean.
        sweeps: sweeps over all groups, summed over the models.
        margins: for each group the factor, or less, by which the models' distances from the gauge
            (from their mean without one) could grow and still no unit would have to move: from 1
            on alignment changes nothing. Empty where the method does not ask.
    """

    state_dict: dict[str, Tensor]
    permutations: tuple[Permutation, ...]
    similarity: float
    similarity_before: float
    sweeps: int
    margins: Mapping[str, float]

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
        values = (state_dict[key] for state_dict in state_dicts)
        merged[key] = _weighted(values, shares, first)
    return like(state_dicts[0], merged)


def _weighted(values: Iterable[Tensor], shares: Sequence[float], first: Tensor) -> Tensor:
    """Return the weighted mean of tensors, taken one by one, in the dtype of the first."""
    total = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    for share, value in zip(shares, values, strict=True):
        total.add_(value.detach().double(), alpha=share)
    return (total if first.is_floating_point() else total.round()).to(first.dtype)


def align_many(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    gauge: StateDict | None = None,
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
    around = None if gauge is None else Reference(spec, weights_of(spec, gauge))
    if start is None:
        return align(models, method, around)
    still = spec.identity().indices
    given = [
        Permutation({name: each[name].expand_as(still[name]) for name in still}, spec.within)
        for each in start
    ]
    permutations, sweeps = models.descend(given)
    return in_unit_order(models, Alignment(tuple(permutations), sweeps), around)


def into_gauge(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None,
    permutations: Sequence[Permutation],
    gauge: StateDict,
) -> Alignment:
    """Return the permutations followed by one for all, which brings their mean to a gauge."""
    models = _models(spec, state_dicts, weights)
    around = Reference(spec, weights_of(spec, gauge))
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
    before = federation.similarity(federation.still())
    if all_still(permutations):
        return before, before
    return before, federation.similarity(permutations)


def merge_many(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    gauge: StateDict | None = None,
    method: Method = "joint",
) -> Merge:
    """Permute N models into one basin and return their weighted mean.

    Maximises `sum_{i<j} w_i w_j <p_i(theta_i), p_j(theta_j)>`, which is the same as minimising the
    weighted variance around the merged model. Models that need no alignment are recognised by a
    proof that takes no similarity matrix. The result does not depend on the order of the models,
    but for the unit order.

    Args:
        spec: spec of all models.
        state_dicts: the models, N >= 1; not changed.
        weights: one weight a model (for example its number of training examples), any scale;
            equal ones by default.
        gauge: a state dict whose unit order the merged model shall take, for example the global
            model of the last round; by default that of the heaviest model, of equal ones the
            first.
        method: who is matched to whom.
            `"joint"`: all to the heaviest, then each in turn to the weighted mean of the others,
            until nobody moves; where the first step is one down, from the models in pairs and as
            they came instead, and the better result is taken;
            `"reference"`: all to the heaviest;
            `"hierarchical"`: in pairs, which are merged, then these in pairs, and so on;
            `"textbook"`: each in turn to the weighted mean of the others, from the models as they
            came, as in the paper.

    Raises:
        SpecError: a model does not fit the spec, or holds NaN or infinite weights.
        ValueError: no models, bad weights, or an unknown method.

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
    shares = normalised(weights, len(state_dicts))
    for place, state_dict in enumerate(state_dicts):
        check_finite(spec, state_dict, f"model {place}")
    if gauge is not None:
        check_finite(spec, gauge, "gauge")
    found = align_many(spec, state_dicts, weights, gauge, method=method)
    merged = {}
    for key, first in state_dicts[0].items():
        values = (
            spec.move(key, state_dict[key], permutation)
            for state_dict, permutation in zip(state_dicts, found.permutations, strict=True)
        )
        merged[key] = _weighted(values, shares, first)
    before, after = mean_similarities(spec, state_dicts, found.permutations, weights)
    return Merge(
        state_dict=like(state_dicts[0], merged),
        permutations=found.permutations,
        similarity=after,
        similarity_before=before,
        sweeps=found.sweeps,
        margins=found.margins,
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
