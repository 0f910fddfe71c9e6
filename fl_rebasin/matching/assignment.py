"""The linear assignment problem: from a similarity matrix to a permutation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import lap
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Gains up to this share of the largest entry, for each unit, are rounding errors."""
MIN_PRICED = 64
"""Number of units from which prices save time."""
PRICE_ROUNDS = 8
"""Rounds of Bellman-Ford: more of them cost more than the better prices save."""

Prices: TypeAlias = NDArray[Any]


def assign(similarity: Tensor) -> Tensor:
    """Return the permutation p that maximises `sum_i similarity[i, p[i]]`.

    Args:
        similarity: shape `(n, n)`, float32 or float64; entry `[i, j]` is the gain of moving unit
            `j` to place `i`.

    Returns:
        int64 tensor of shape `(n,)`: the unit for each place. The identity if no permutation
        beats it by more than rounding, so that equal units stay in place.

    Raises:
        ValueError: the matrix is not square or not finite.

    Source: Jonker and Volgenant (1987), as implemented by `lap.lapjvr`.

    Example:
        >>> assign(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([1, 0])
    """
    return assign_again(similarity, None)[0]


def assign_again(similarity: Tensor, prices: Prices | None) -> tuple[Tensor, Prices | None]:
    """Return the best permutation, and prices that speed up the next similar problem.

    Prices are dual variables of the assignment problem. Subtracting a price from all gains of a
    unit does not change the best permutation. With the prices of a similar problem most units are
    already cheapest in their own place, so the solver has little left to do. Approximate prices
    are good enough.

    Args:
        similarity: as for `assign`.
        prices: what the call for a similar problem returned, whose units have been permuted by
            its result since; shape `(n,)`. None for the first problem.

    Returns:
        The permutation, and the prices of the units in their new order, shape `(n,)`; None for a
        matrix too small to need them.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity must be square, it has shape {tuple(similarity.shape)}")
    matrix = similarity.detach().cpu().numpy()
    count = len(matrix)
    if not count:
        return torch.arange(0), None
    largest = float(max(matrix.max(), -matrix.min()))  # NaN if any entry is NaN.
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
    if count >= MIN_PRICED:
        prices = _prices(costs[:, order], prices, order)
    return torch.from_numpy(order), prices


def _prices(costs: Prices, before: Prices | None, order: NDArray[np.int64]) -> Prices:
    """Return approximate prices, under which few units are cheaper in another place.

    Exact prices are shortest paths in the graph of exchanges; a few rounds of Bellman-Ford
    approximate them.

    Args:
        costs: costs with the previous prices subtracted, and with the units in their new order.
        before: the previous prices, in the previous order.
        order: the permutation from the previous order to the new one.
    """
    costs = costs - costs.diagonal()[:, None]
    change = np.zeros(len(costs), dtype=costs.dtype)
    for _ in range(PRICE_ROUNDS):
        change = np.minimum(change, (change[:, None] + costs).min(0))
    return change if before is None else change + before[order]


def assign_blocks(gain: Tensor, within: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the best permutation of blocks and of the units within them.

    The gain of a pair of blocks depends on how their units are paired. The best pairing of the
    units does not depend on the other blocks, so it is found first, for each pair of blocks; then
    the blocks are assigned.

    Args:
        gain: shape `(n, n)`; entry `[i, j]` is the gain of moving block `j` to place `i`, without
            the gain of its units.
        within: for each group of units within the blocks, shape `(n, n, m, m)`; entry
            `[i, j, k, l]` is the gain of moving unit `l` of block `j` to place `k` of place `i`.

    Returns:
        int64 tensor of shape `(n,)`, the block for each place; and for each group within, shape
        `(n, m)`, whose row `i` orders the units of the block that moves to place `i`.
    """
    orders = {}
    for name, each in within.items():
        orders[name] = torch.stack([torch.stack([assign(pair) for pair in row]) for row in each])
        gain = gain + each.gather(3, orders[name][..., None].to(each.device)).sum((2, 3))
    index = assign(gain)
    places = torch.arange(len(index))
    return index, {name: order[places, index] for name, order in orders.items()}
