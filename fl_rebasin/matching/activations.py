"""Activation matching: permute one model so that its units respond to data like another's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fl_rebasin.matching.assignment import assign, assign_blocks
from fl_rebasin.matching.coordinate_descent import MAX_SWEEPS, Matcher
from fl_rebasin.matching.correlation import correlations
from fl_rebasin.matching.objective import check_finite, check_module, cosine, weights_of
from fl_rebasin.matching.sites import Key
from fl_rebasin.matching.weights import Match, best_match
from fl_rebasin.state_dicts import StateDict, with_weights
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

WEIGHT_HINT = 1e-4
"""Correlation that similar weights are worth: enough to break ties, up to noise."""


def match_activations(
    spec: PermutationSpec,
    model: nn.Module,
    reference: StateDict,
    other: StateDict,
    batches: Iterable[Any],
) -> Match:
    """Find the permutation of `other` whose units correlate best with those of `reference`.

    For each group, with `x_i` the activation of unit i of `reference` and `y_j` that of unit j of
    `other` over all samples, maximises over p

        sum_i corr(x_i, y_p[i])

    as a linear assignment. Only running sums are kept, `(n, n)` for a group of n units. Units are
    observed at the inputs of linear and convolutional layers, or else at the outputs of layers and
    norms. A group that cannot be observed (inside `nn.LSTM` and `nn.MultiheadAttention`, or if its
    activations move together with another group) is matched by its weights, given the other
    groups. Weights also decide between equal correlations, such as those of constant units. Both
    models run in evaluation mode.

    Args:
        spec: spec of both models.
        model: a module of the architecture; it is copied, and its weights do not matter. The
            copies run on its device and in its dtypes.
        reference: state dict whose unit order is kept.
        other: state dict to permute; neither is changed.
        batches: unlabelled inputs, or tuples and lists whose first item is the input; on the
            module's device.

    Raises:
        TypeError: `model` is not a module.
        SpecError: a model does not fit the spec, or holds NaN or infinite weights.
        ValueError: there is no batch, or an activation is not finite.

    Source: Li et al. (2015); Git Re-Basin, section 3.1, with standardised activations.

    Example:
        >>> from fl_rebasin import derive_spec
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> spec = derive_spec(net, torch.zeros(1, 2))
        >>> state, batches = net.state_dict(), [torch.randn(64, 2)]
        >>> match_activations(spec, net, state, state, batches).permutation.is_identity
        True
    """
    check_module(spec, model)
    check_finite(spec, reference, "reference")
    check_finite(spec, other, "other")
    left, right = with_weights(model, reference), with_weights(model, other)
    target, weights = weights_of(spec, left.state_dict()), weights_of(spec, right.state_dict())
    correlated = correlations(spec, left, right, batches)
    found, unobserved = assign_correlated(spec, correlated)
    matcher = refine_by_weights(spec, target, weights, found, correlated, unobserved)
    return Match(
        permutation=matcher.permutation,
        similarity=cosine(matcher.target, matcher.weights),
        similarity_before=cosine(target, weights),
        sweeps=0,
    )


def assign_correlated(
    spec: PermutationSpec, correlated: Mapping[Key, Tensor]
) -> tuple[Permutation, list[str]]:
    """Return the permutation that maximises correlation, and the groups that are not observed.

    Args:
        spec: spec of both models.
        correlated: correlations of the observed groups, as `correlations` returns them.
    """
    indices = dict(spec.identity().indices)
    unobserved = []
    for name, size in spec.groups.items():
        inside = [
            unit
            for unit, blocks in spec.within.items()
            if blocks == name and (name, unit) in correlated
        ]
        if name in spec.within:
            if (spec.within[name], name) not in correlated:
                unobserved.append(name)
        elif inside:
            gain = correlated.get((name,), torch.zeros(size, size, dtype=torch.float64))
            pairs = {unit: _by_blocks(correlated[name, unit], size) for unit in inside}
            indices[name], orders = assign_blocks(gain, pairs)
            indices |= orders
        elif (name,) in correlated:
            indices[name] = assign(correlated[name,])
        else:
            unobserved.append(name)
    return Permutation(indices, spec.within), unobserved


def _by_blocks(correlation: Tensor, blocks: int) -> Tensor:
    """Return a matrix over `blocks * units` in shape `(blocks, blocks, units, units)`."""
    units = len(correlation) // blocks
    return correlation.reshape(blocks, units, blocks, units).transpose(1, 2)


def refine_by_weights(
    spec: PermutationSpec,
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    found: Permutation,
    correlated: Mapping[Key, Tensor],
    unobserved: Sequence[str],
) -> Matcher:
    """Let the weights decide what the data leave open.

    These are the groups that are not observed, and ties between correlations: with little data,
    many units of a network are constant, in any order. On other data they may not be.

    Args:
        spec: spec of both models.
        target: learnable tensors of the reference.
        weights: learnable tensors of the model to permute.
        found: permutation that maximises correlation.
        correlated: correlations of the observed groups.
        unobserved: the other groups.
    """
    matcher, _ = best_match(spec, target, weights, found, unobserved)
    blocks = {*spec.within.values()}
    plain = [key[0] for key in correlated if len(key) == 1 and key[0] not in blocks]
    for _ in range(MAX_SWEEPS):
        before = matcher.permutation
        for name in plain:
            order = matcher.permutation[name]
            similar = matcher.similarity(name).cpu()
            hint = similar / similar.abs().max().clamp_min(torch.finfo(similar.dtype).tiny)
            matcher.move_to(name, assign(correlated[name,][:, order] + WEIGHT_HINT * hint))
        if matcher.permutation == before:
            break
    return matcher
