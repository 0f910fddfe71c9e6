"""Tensors that a client keeps from one question to the next, in Flower's context."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch
from flwr.app import Array, ArrayRecord, Context
from torch import Tensor

PREFIX = "rebasin/"
"""What the names of our records in the context's state begin with."""


class ContextMemory(MutableMapping[str, Tensor]):
    """The state of a client's context as tensors by name; each is read when it is asked for.

    Args:
        context: the client's context, which Flower keeps for the whole run.
    """

    def __init__(self, context: Context) -> None:
        self._state = context.state

    def __getitem__(self, key: str) -> Tensor:
        record = self._state.array_records[PREFIX + key]
        return torch.from_numpy(record["values"].numpy())

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._state[PREFIX + key] = ArrayRecord({"values": Array(value.cpu().numpy())})

    def __delitem__(self, key: str) -> None:
        del self._state[PREFIX + key]

    def __iter__(self) -> Iterator[str]:
        names = self._state.array_records
        return (name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))

    def __len__(self) -> int:
        return sum(1 for _ in self)
