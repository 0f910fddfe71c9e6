"""Similarity matrix -> permutation: the linear assignment problem."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(similarity: Tensor) -> Tensor:
    """Return the permutation that maximises the summed similarity.

    Args:
        similarity: shape `(n, n)`; entry `[i, j]` is the gain of putting unit `j` at place `i`.

    Returns:
        int64 tensor of shape `(n,)`: the unit for each place. The identity where no permutation
        is better than it by more than rounding, so that equal units do not move about.

    Raises:
        ValueError: the matrix is not square or not finite.

    Source: Jonker and Volgenant (1987), by `scipy.optimize.linear_sum_assignment`.

    Example:
        >>> assign(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([1, 0])
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity must be square, it has shape {tuple(similarity.shape)}")
    if not bool(torch.isfinite(similarity).all()):
        raise ValueError("similarity holds NaN or infinite values: a model has diverged")
    matrix = similarity.double().cpu().numpy()
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    gain = float(matrix[rows, columns].sum() - matrix.trace())
    scale = float(abs(matrix).max(initial=0.0)) * len(matrix)
    if gain <= 1e-12 * scale:
        return torch.arange(len(matrix))
    return torch.from_numpy(columns)


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
