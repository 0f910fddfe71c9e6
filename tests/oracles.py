"""Independent reimplementations that the results of matching are compared with."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from helpers import State
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fl_rebasin import Permutation, PermutationSpec, match_weights
from fl_rebasin.matching.objective import inner, weights_of

Batches = list[tuple[Any, Tensor]]


def pairwise_objective(
    spec: PermutationSpec, models: Sequence[State], weights: Sequence[float] | None = None
) -> float:
    """`sum_{i<j} w_i w_j <theta_i, theta_j>`, with weights that sum to 1."""
    weights = [1.0] * len(models) if weights is None else weights
    shares = [weight / sum(weights) for weight in weights]
    tensors = [weights_of(spec, model) for model in models]
    return sum(
        shares[i] * shares[j] * inner(tensors[i], tensors[j])
        for i, j in itertools.combinations(range(len(models)), 2)
    )


def cross_correlation(left: Tensor, right: Tensor) -> NDArray[np.float64]:
    """NumPy's correlations between two sets of units, each `(units, samples)`; 0 for constants."""
    expected = np.zeros((len(left), len(right)))
    alive = [np.flatnonzero(np.ptp(each.numpy(), axis=1) > 1e-9) for each in (left, right)]
    joint = np.corrcoef(left.numpy()[alive[0]], right.numpy()[alive[1]])
    expected[np.ix_(*alive)] = joint[: len(alive[0]), len(alive[0]) :]
    return expected


def best_block_gain(gain: Tensor, within: Mapping[str, Tensor]) -> float:
    """The largest gain over all permutations of blocks and of the units within each, by trial.

    Args:
        gain: shape `(n, n)`.
        within: for each group of units, shape `(n, n, m, m)`; as for `assign_blocks`.
    """
    count = len(gain)
    sizes = [each.shape[-1] for each in within.values()]
    orders = [
        list(itertools.product(itertools.permutations(range(size)), repeat=count)) for size in sizes
    ]
    return max(
        block_gain(gain, within, blocks, dict(zip(within, rows, strict=True)))
        for blocks in itertools.permutations(range(count))
        for rows in itertools.product(*orders)
    )


def block_gain(
    gain: Tensor,
    within: Mapping[str, Tensor],
    blocks: Sequence[int],
    orders: Mapping[str, Sequence[Sequence[int]]],
) -> float:
    """The gain of one permutation of blocks and of the units within each."""
    total = sum(float(gain[place, block]) for place, block in enumerate(blocks))
    for name, rows in orders.items():
        for place, block in enumerate(blocks):
            pair = within[name][place, block]
            total += sum(float(pair[k, unit]) for k, unit in enumerate(rows[place]))
    return total


def midpoint_loss(
    spec: PermutationSpec,
    left: nn.Module,
    right: nn.Module,
    permutation: Permutation,
    batches: Batches,
) -> float:
    """The summed loss of the mean of two models, with BatchNorm by the statistics of the batch."""
    moved, middle = spec.apply(permutation, right.state_dict()), copy.deepcopy(left).eval()
    middle.load_state_dict(
        {
            key: (value + moved[key]) / 2 if value.is_floating_point() else value
            for key, value in left.state_dict().items()
        }
    )
    for module in middle.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    with torch.no_grad():
        return sum(float(F.cross_entropy(middle(x), y)) for x, y in batches)


def algorithm_2(
    spec: PermutationSpec, left: nn.Module, right: nn.Module, batches: Batches, rate: float
) -> Permutation:
    """The permutation after one epoch of Git Re-Basin's Algorithm 2, with Adam written out."""
    free = {key: value.clone() for key, value in left.state_dict().items()}
    first = {key: torch.zeros_like(value) for key, value in free.items()}
    second = {key: torch.zeros_like(value) for key, value in free.items()}
    permutation = match_weights(spec, left.state_dict(), right.state_dict()).permutation
    for step, (inputs, labels) in enumerate(batches, start=1):
        permutation = match_weights(spec, free, right.state_dict(), permutation).permutation
        moved = spec.apply(permutation, right.state_dict())
        middle = copy.deepcopy(left)
        middle.load_state_dict({k: (v + moved[k]) / 2 for k, v in left.state_dict().items()})
        middle.zero_grad()
        F.cross_entropy(middle(inputs), labels).backward()
        for key, parameter in middle.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad / 2
            first[key].mul_(0.9).add_(0.1 * gradient)
            second[key].mul_(0.999).add_(0.001 * gradient**2)
            scale = (second[key] / (1 - 0.999**step)).sqrt() + 1e-8
            free[key] = free[key] - rate * first[key] / (1 - 0.9**step) / scale
    return permutation
