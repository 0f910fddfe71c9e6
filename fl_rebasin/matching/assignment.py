"""Similarity matrix -> permutation: the linear assignment problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import lap
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-12}
"""A gain counts when it exceeds this share of the largest entry, a unit."""
HARD = 64
"""From this number of units on prices pay."""
ROUNDS = 8

Prices: TypeAlias = NDArray[Any]


def assign(similarity: Tensor) -> Tensor:
    """Return the permutation that maximises the summed similarity.

    Args:
        similarity: shape `(n, n)`, float32 or float64; entry `[i, j]` is the gain of putting unit
            `j` at place `i`.

    Returns:
        int64 tensor of shape `(n,)`: the unit for each place. The identity where no permutation
        is better than it by more than rounding, so that equal units do not move about.

    Raises:
        ValueError: the matrix is not square or not finite.

    Source: Jonker and Volgenant (1987), by `lap.lapjvr`.

    Example:
        >>> assign(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([1, 0])
    """
    return assign_again(similarity, None)[0]


def assign_again(similarity: Tensor, prices: Prices | None) -> tuple[Tensor, Prices | None]:
    """Return the best permutation, and prices that make the next such problem easy.

    A problem like the last one is nearly solved once each unit's gain is lowered by its price: the
    duals of the assignment, which are found roughly, since they change no result.

    Args:
        similarity: as for `assign`.
        prices: what an earlier call returned for a problem like this one, whose units have been
            put in its order since; shape `(n,)`.

    Returns:
        The permutation, and the prices of the units in its order, shape `(n,)`; None for a matrix
        that is easy as it is.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity must be square, it has shape {tuple(similarity.shape)}")
    matrix = similarity.detach().cpu().numpy()
    count = len(matrix)
    if not count:
        return torch.arange(0), None
    largest = float(max(matrix.max(), -matrix.min()))  # NaN goes through.
    if not np.isfinite(largest):
        raise ValueError("similarity holds NaN or infinite values: a model has diverged")
    if not largest:
        return torch.arange(count), None
    costs = matrix * (-1 / largest)
    if prices is not None:
        costs -= prices
    costs -= costs.min(1, keepdims=True)
    places, units = lap.lapjvr(costs, return_cost=False)
    order = np.empty(count, dtype=np.int64)
    order[places] = units
    gain = float((matrix[places, order[places]] - matrix.diagonal()).sum(dtype=np.float64))
    if gain <= ROUNDING.get(similarity.dtype, ROUNDING[torch.float32]) * largest * count:
        order = np.arange(count)
    if count >= HARD:
        prices = _prices(costs[:, order], prices, order)
    return torch.from_numpy(order), prices


def _prices(costs: Prices, before: Prices | None, order: NDArray[np.int64]) -> Prices:
    """Return prices under which few units cost less elsewhere than where they are.

    A few rounds of the method of Bellman and Ford; without the last the prices are rough.

    Args:
        costs: in the order that was found, with the prices before taken off.
        before: these prices, in the order before.
        order: the order that was found.
    """
    costs = costs - costs.diagonal()[:, None]
    change = np.zeros(len(costs), dtype=costs.dtype)
    for _ in range(ROUNDS):
        change = np.minimum(change, (change[:, None] + costs).min(0))
    return change if before is None else change + before[order]


def assign_blocks(gain: Tensor, within: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the permutation of blocks, and of the units within them, that maximises the sum.

    What a pair of blocks gains depends on how the units within are paired, which is best found
    for each pair of blocks by itself.

    Args:
        gain: shape `(n, n)`; what putting block `j` at place `i` gains besides its units.
        within: for each group of units within the blocks shape `(n, n, m, m)`; entry
            `[i, j, k, l]` is the gain of putting unit `l` of block `j` at place `k` of place `i`.

    Returns:
        int64 tensor of shape `(n,)`, the block for each place, and for each group within shape
        `(n, m)`: row `i` is the order within the block that comes to place `i`.
    """
    orders = {}
    for name, each in within.items():
        orders[name] = torch.stack([torch.stack([assign(pair) for pair in row]) for row in each])
        gain = gain + each.gather(3, orders[name][..., None].to(each.device)).sum((2, 3))
    index = assign(gain)
    places = torch.arange(len(index))
    return index, {name: order[places, index] for name, order in orders.items()}
