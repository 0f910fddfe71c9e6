"""A federation in one process: real ClientApps behind a grid that hands messages over."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity
from helpers import State
from torch import Tensor, nn

from fl_rebasin.flower import add_rebasin_handlers

Answer = Callable[[Message, Context], Message]
Aggregate = tuple[ArrayRecord | None, MetricRecord | None]
ODD_NODE = 77
"""The node that does something else than the others."""


def prepare(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Let messages be made, which carry the identity of a task, and catch the log."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    caplog.set_level(logging.INFO, logger="flwr")


@dataclass
class Federation:
    """ClientApps by node, and the messages that they were sent; a node of None never answers."""

    apps: dict[int, Answer | None]
    contexts: dict[int, Context] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grid = Mock(spec=Grid)
        self.grid.get_node_ids.side_effect = lambda: list(self.apps)
        self.grid.send_and_receive.side_effect = self.deliver

    def deliver(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = []
        for message in messages:
            self.sent.append(message)
            node_id = message.metadata.dst_node_id
            app = self.apps[node_id]
            if app is None:
                continue
            context = self.contexts.setdefault(node_id, Context(1, node_id, {}, RecordDict(), {}))
            try:
                replies.append(app(_received(message), context))
            except Exception as error:
                replies.append(Message(Error(code=2, reason=str(error)), reply_to=message))
        self.replies += replies
        return replies

    def asked(self, action: str) -> list[int]:
        """Nodes that got a question: `matching`, say, or `train`; sorted, once for each message."""
        kind = action if action == "train" else f"query.rebasin_{action}"
        return sorted(
            message.metadata.dst_node_id
            for message in self.sent
            if message.metadata.message_type == kind
        )

    def bytes_of(self, action: str) -> int:
        """Bytes of all arrays of a question and its answers."""
        kind = f"query.rebasin_{action}"
        return sum(
            len(array.data)
            for message in (*self.sent, *self.replies)
            if message.metadata.message_type == kind and not message.has_error()
            for record in message.content.array_records.values()
            for array in record.values()
        )


def _received(message: Message) -> Message:
    """Return a message as if it had travelled: what a client does to it changes nothing here."""
    received = copy.copy(message)
    received.content = RecordDict(
        {
            name: ArrayRecord(dict(record))  # The arrays themselves are bytes, which stay.
            if isinstance(record, ArrayRecord)
            else copy.deepcopy(record)
            for name, record in message.content.items()
        }
    )
    return received


def client(
    build: Callable[[], nn.Module],
    batches: Iterable[Any] = (),
    held_back: Iterable[Any] | None = None,
) -> ClientApp:
    """A client that answers every question on its data; the guard's on what it held back."""
    app = ClientApp()
    add_rebasin_handlers(
        app,
        lambda context: (build(), batches),
        None if held_back is None else lambda context: (build(), held_back),
    )
    return app


def changing(app: Answer, action: str, change: Callable[[RecordDict], object]) -> Answer:
    """A client that changes its good answer to one question before it leaves."""

    def changed(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == f"query.rebasin_{action}":
            change(reply.content)
        return reply

    return changed


def failing(message: Message, context: Context) -> Message:
    raise OSError("disk is full\nand more")


class Nodes:
    """A grid for strategies that sample nodes, and ask them nothing."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self.nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        return self.nodes


def replies_of(
    states: Mapping[int, State], weights: Mapping[int, float] | None = None, **metrics: Any
) -> list[Message]:
    """Replies to a round's training, by node; metrics are the same for all or one a node."""
    return [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord(state),
                    "metrics": MetricRecord(
                        {
                            "num-examples": 10 if weights is None else weights[node_id],
                            **{
                                key: value[node_id] if isinstance(value, Mapping) else value
                                for key, value in metrics.items()
                            },
                        }
                    ),
                }
            ),
            reply_to=Message(RecordDict(), dst_node_id=node_id, message_type="train"),
        )
        for node_id, state in states.items()
    ]


def one_round(
    strategy: Strategy,
    world: Federation,
    model: Mapping[str, Tensor] | ArrayRecord,
    replies: Iterable[Message],
    server_round: int = 1,
) -> Aggregate:
    """Begin a round with a model and end it with the replies; questions go to the federation."""
    arrays = model if isinstance(model, ArrayRecord) else ArrayRecord(dict(model))
    list(strategy.configure_train(server_round, arrays, ConfigRecord(), world.grid))
    return strategy.aggregate_train(server_round, list(replies))


def tensors(arrays: ArrayRecord | None) -> State:
    assert arrays is not None
    return dict(arrays.to_torch_state_dict())


def put(content: RecordDict, record: str, key: str, values: Any) -> None:
    """Put an array in the place of another one."""
    content.array_records[record][key] = Array(values)


def put_payload(content: RecordDict, record: str, key: str, data: bytes) -> None:
    """Put bytes in the place of an array's, under its dtype and shape."""
    old = content.array_records[record][key]
    content.array_records[record][key] = Array(
        dtype=old.dtype, shape=old.shape, stype=old.stype, data=data
    )


def vast(descr: str = "<f8") -> bytes:
    """Return the head of a file of 10^13 numbers."""
    file = io.BytesIO()
    head = {"descr": descr, "fortran_order": False, "shape": (10**13,)}
    np.lib.format.write_array_header_1_0(file, head)
    return file.getvalue()


def dropped(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings about what was dropped."""
    return [
        record.getMessage()
        for record in caplog.records
        if " dropped: " in record.getMessage() and record.levelno == logging.WARNING
    ]


def batches_of(
    shape: Sequence[int], sizes: Sequence[int], seed: int, classes: int | None = None
) -> list[Any]:
    """Batches of float32 inputs, each client's of another mean and scale; or pairs with labels."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Any] = []
    for size in sizes:
        inputs = torch.randn(size, *shape, generator=generator) * (1 + seed / 4) + seed / 8
        if classes is None:
            batches.append(inputs)
        else:
            batches.append((inputs, torch.randint(classes, (size,), generator=generator)))
    return batches
