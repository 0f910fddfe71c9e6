"""Similarity matrix -> permutation: the linear assignment problem."""

from __future__ import annotations

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
