"""MergeMany: merge N models into one by a weighted average of the aligned models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fl_rebasin.matching.many import Method, align_many, mean_similarities
from fl_rebasin.matching.objective import check_finite
from fl_rebasin.state_dicts import StateDict, like, normalised, weighted_mean
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec


@dataclass(frozen=True)
class Merge:
    """The result of merging N models.

    Attributes:
        state_dict: the weighted mean of the permuted models, with the keys, their order and the
            dtypes of the first model.
        permutations: one for each model, in the order given.
        similarity: weighted mean cosine between the permuted models and the merged model.
        similarity_before: the same for the models without permutations and their plain mean.
        sweeps: sweeps over all groups, summed over the models.
        margins: for each group a factor by which all models' distances from `unit_order_of` (by
            default from their mean) could grow without any need for alignment; if it is at least
            1, alignment changes nothing. Empty unless the method is `"joint"`.
    """

    state_dict: dict[str, Tensor]
    permutations: tuple[Permutation, ...]
    similarity: float
    similarity_before: float
    sweeps: int
    margins: Mapping[str, float]

    @property
    def moved(self) -> int:
        """Number of units that the permutations displace, summed over the models."""
        return sum(permutation.moved for permutation in self.permutations)


def merge_many(
    spec: PermutationSpec,
    state_dicts: Sequence[StateDict],
    weights: Sequence[float] | None = None,
    *,
    unit_order_of: StateDict | None = None,
    method: Method = "joint",
) -> Merge:
    """Permute N models into one basin and return their weighted mean.

    With shares `w_i` (the weights, scaled to sum to 1), permutations `p_i` and the merged model
    `m = sum_i w_i p_i(theta_i)`, it maximises

        sum_{i<j} w_i w_j <p_i(theta_i), p_j(theta_j)>

    over the learnable parameters. As permutations keep norms, this is the same as to minimise the
    weighted variance `sum_i w_i |p_i(theta_i) - m|^2`. Models that need no alignment are recognised
    by a certificate, without any similarity matrix. The result does not depend on the order of the
    models, except for its unit order.

    Args:
        spec: spec of all models.
        state_dicts: the models, at least one; not changed.
        weights: one weight for each model (for example its number of training examples), on any
            scale; equal weights by default.
        unit_order_of: the state dict whose unit order the merged model takes, for example the
            global model of the last round; by default the heaviest model, of equally heavy ones
            the first.
        method: which models are matched to which.
            `"joint"`: all to the heaviest; then each to the weighted mean of the others, until
            none moves. If the first step lowers the objective, the second starts from the models
            merged in pairs and from the unaligned models instead, and the better result is kept.
            `"reference"`: all to the heaviest.
            `"hierarchical"`: in pairs, which are merged; then the merged models in pairs; and so
            on.
            `"textbook"`: each to the weighted mean of the others, starting from the unaligned
            models, as in the paper.

    Raises:
        SpecError: a model does not fit the spec, or holds NaN or infinite weights.
        ValueError: there are no models, the weights are invalid, or the method is unknown.

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
    if unit_order_of is not None:
        check_finite(spec, unit_order_of, "unit_order_of")
    found = align_many(spec, state_dicts, weights, unit_order_of=unit_order_of, method=method)
    merged = {}
    for key, first in state_dicts[0].items():
        values = (
            spec.move(key, state_dict[key], permutation)
            for state_dict, permutation in zip(state_dicts, found.permutations, strict=True)
        )
        merged[key] = weighted_mean(values, shares, first)
    before, after = mean_similarities(spec, state_dicts, found.permutations, weights)
    return Merge(
        state_dict=like(state_dicts[0], merged),
        permutations=found.permutations,
        similarity=after,
        similarity_before=before,
        sweeps=found.sweeps,
        margins=found.margins,
    )
