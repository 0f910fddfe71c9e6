"""Checks of the sums that clients answer with, before they are added up."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_COUNT = 1e15
"""More examples than any client can have: sums of more are invalid."""
MAX_ENTRY = 1e30
"""Larger sums could overflow when they are added up."""


def check_sum(what: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless a sum has the expected shape, is float64, finite and not huge.

    Args:
        what: name of the sum, for the error.
        value: the sum.
        shape: its expected shape.
    """
    if value.dtype != torch.float64 or tuple(value.shape) != shape:
        raise ValueError(
            f"{what} is {value.dtype} of shape {tuple(value.shape)}, expected float64 of shape "
            f"{shape}"
        )
    if not bool((value.abs() <= MAX_ENTRY).all()):  # Written so that NaN fails.
        raise ValueError(f"{what} is not finite or too large")


def check_gram(what: str, gram: Tensor) -> None:
    """Raise `ValueError` unless a matrix can be X^T X: symmetric, with a diagonal of at least 0.

    Args:
        what: name of the matrix, for the error.
        gram: the matrix.
    """
    if not torch.allclose(gram, gram.T, rtol=1e-3, atol=1e-6 * float(gram.abs().max())):
        raise ValueError(f"{what} is not symmetric")
    if float(gram.diagonal().min()) < 0:
        raise ValueError(f"{what} has a negative diagonal")
