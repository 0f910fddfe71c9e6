"""What a row of the table is, and inputs that several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """A model, inputs that it runs on, and the groups that it must have.

    Attributes:
        build: makes a fresh model.
        inputs: a tensor, or keyword arguments.
        groups: sorted sizes of all that may be permuted, as far as the function allows it; a
            family (units within each head or block, each with its own permutation) counts once.
            None where the answer is not known: then only the laws are tried.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    groups: tuple[int, ...] | None


def image(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.zeros(2, channels, size, size)


def features(*shape: int) -> Callable[[], Tensor]:
    """Return a maker of floats."""
    return lambda: torch.zeros(*shape)


def numbers(limit: int, *shape: int) -> Callable[[], Tensor]:
    """Return a maker of integers below a limit, not all alike."""
    count = int(torch.tensor(shape).prod())
    return lambda: (torch.arange(count) * 7 % limit).reshape(shape)
