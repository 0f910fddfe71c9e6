"""An entry of the zoo, and example inputs that several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """A model, example inputs for it, and the sizes of the groups that its spec must have.

    Attributes:
        build: returns a fresh model.
        inputs: returns a tensor or keyword arguments.
        groups: the sorted sizes of all groups. A group within the blocks of another, such as the
            units within each head, counts once. None if the right answer is not known.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    groups: tuple[int, ...] | None


def image(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    """Return a function that returns two images."""
    return lambda: torch.zeros(2, channels, size, size)


def features(*shape: int) -> Callable[[], Tensor]:
    """Return a function that returns a float tensor."""
    return lambda: torch.zeros(*shape)


def numbers(limit: int, *shape: int) -> Callable[[], Tensor]:
    """Return a function that returns different integers below a limit."""
    count = int(torch.tensor(shape).prod())
    return lambda: (torch.arange(count) * 7 % limit).reshape(shape)
