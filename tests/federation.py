"""A federation in one process: real ClientApps behind a grid that hands messages over."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
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
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity
from helpers import State, random_state
from torch import Tensor, nn
from zoo import ZOO, Entry

from fl_rebasin.flower import ReBasinStrategy, add_rebasin_handlers
from fl_rebasin.merging.clients import Question

Answer = Callable[[Message, Context], Message]
Aggregate = tuple[ArrayRecord | None, MetricRecord | None]
Net = str | Entry
"""A model of the zoo by its name, or an entry of its own."""
ODD_NODE = 77
"""The node that does something else than the others."""


def prepare(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Allow messages outside a Flower task, and capture the log."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    caplog.set_level(logging.INFO, logger="flwr")


@dataclass
class Federation:
    """ClientApps by node, and the messages they were sent; a node with None never answers."""

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
        """Nodes that got a question, such as `matching` or `train`: sorted, once per message."""
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
    """Return a copy of a message, as after transport: a client cannot change the original."""
    received = copy.copy(message)
    received.content = RecordDict(
        {
            name: ArrayRecord(dict(record))  # The arrays are immutable bytes.
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
    more: Iterable[Question] = (),
) -> ClientApp:
    """A client that answers every question on its data; the guard's on its held-back data."""
    app = ClientApp()
    add_rebasin_handlers(
        app,
        lambda context: (build(), batches),
        None if held_back is None else lambda context: (build(), held_back),
        more=more,
    )
    return app


def federation(
    net: Net,
    data: Mapping[int, Iterable[Any]],
    held_back: Mapping[int, Iterable[Any]] | None = None,
    odd: Callable[[Answer], Answer | None] | None = None,
    more: Iterable[Question] = (),
) -> Federation:
    """Clients that answer every question on their data.

    Args:
        net: the model.
        data: batches of each node.
        held_back: held-back batches of each node, for the guard.
        odd: replaces the client of `ODD_NODE`; None for an honest one.
        more: further questions that the clients answer.
    """
    build = entry_of(net).build
    apps: dict[int, Answer | None] = {
        node: client(build, batches, None if held_back is None else held_back[node], more)
        for node, batches in data.items()
    }
    if odd is not None:
        honest = apps[ODD_NODE]
        assert honest is not None
        apps[ODD_NODE] = odd(honest)
    return Federation(apps)


def entry_of(net: Net) -> Entry:
    return ZOO[net] if isinstance(net, str) else net


@cache
def _template(net: Net, **options: Any) -> ReBasinStrategy:
    entry = entry_of(net)
    return ReBasinStrategy(model=entry.build(), example_inputs=entry.inputs(), **options)


def strategy_for(net: Net, inner: Strategy | None = None, **options: Any) -> ReBasinStrategy:
    """A new strategy around another one; the work for net and options is done only once.

    Args:
        net: the model.
        inner: the wrapped strategy; `FedAvg()` by default. It is not checked against the options:
            create a `ReBasinStrategy` directly to test that.
        options: options of `ReBasinStrategy`; they must be valid.
    """
    if "finish" in options:
        options["finish"] = tuple(options["finish"])
    strategy = copy.copy(_template(net, **options))
    strategy.strategy = FedAvg() if inner is None else inner
    return strategy


@cache
def _strangers(net: Net, nodes: tuple[int, ...], first_seed: int) -> dict[int, State]:
    entry = entry_of(net)
    return {node: random_state(entry, seed) for seed, node in enumerate(nodes, start=first_seed)}


def strangers(net: Net, nodes: Iterable[int], first_seed: int = 1) -> dict[int, State]:
    """Independent models by node: they have nothing in common but the architecture."""
    return dict(_strangers(net, tuple(nodes), first_seed))


def changing(app: Answer, action: str, change: Callable[[RecordDict], object]) -> Answer:
    """A client that changes its valid answer to one question before sending it."""

    def changed(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == f"query.rebasin_{action}":
            change(reply.content)
        return reply

    return changed


def failing(message: Message, context: Context) -> Message:
    raise OSError("disk is full\nand more")


class Nodes:
    """A grid for strategies that sample nodes but ask them nothing."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self.nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        return self.nodes


def replies_of(
    states: Mapping[int, State], weights: Mapping[int, float] | None = None, **metrics: Any
) -> list[Message]:
    """Replies to a round's training, by node; a metric is one value for all or a value by node."""
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
    """Start a round from a model, and aggregate the replies; the federation answers questions."""
    arrays = model if isinstance(model, ArrayRecord) else ArrayRecord(dict(model))
    list(strategy.configure_train(server_round, arrays, ConfigRecord(), world.grid))
    return strategy.aggregate_train(server_round, list(replies))


def run_round(
    strategy: Strategy,
    world: Federation,
    global_model: Mapping[str, Tensor] | ArrayRecord,
    states: Mapping[int, State],
    weights: Mapping[int, float] | None = None,
    server_round: int = 1,
    **metrics: Any,
) -> tuple[State, MetricRecord]:
    """Run one round that must have a result; return the new model and the metrics."""
    if weights is not None:
        weights = {node: weights[node] for node in states}
    replies = replies_of(states, weights, **metrics)
    result, own = one_round(strategy, world, global_model, replies, server_round)
    assert own is not None
    return tensors(result), own


def as_mock(reply: Message) -> Message:
    """A reply as a mock, as tests of Flower strategies often use them."""
    mock = Mock(spec=Message)
    mock.metadata.src_node_id = reply.metadata.src_node_id
    mock.has_error.return_value = reply.has_error()
    mock.has_content.return_value = not reply.has_error()
    name = "error" if reply.has_error() else "content"
    setattr(mock, name, getattr(reply, name))
    return mock


def tensors(arrays: ArrayRecord | None) -> State:
    assert arrays is not None
    return dict(arrays.to_torch_state_dict())


def put(content: RecordDict, record: str, key: str, values: Any) -> None:
    """Replace or add an array."""
    content.array_records[record][key] = Array(values)


def put_payload(content: RecordDict, record: str, key: str, data: bytes) -> None:
    """Replace the bytes of an array, but not its dtype and shape."""
    old = content.array_records[record][key]
    content.array_records[record][key] = Array(
        dtype=old.dtype, shape=old.shape, stype=old.stype, data=data
    )


def vast(descr: str = "<f8") -> bytes:
    """Return the header of a file with 10^13 numbers, without the numbers."""
    file = io.BytesIO()
    head = {"descr": descr, "fortran_order": False, "shape": (10**13,)}
    np.lib.format.write_array_header_1_0(file, head)
    return file.getvalue()


def dropped(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings about dropped replies and answers."""
    return [
        record.getMessage()
        for record in caplog.records
        if " dropped: " in record.getMessage() and record.levelno == logging.WARNING
    ]


def batches_of(
    shape: Sequence[int], sizes: Sequence[int], seed: int, classes: int | None = None
) -> list[Any]:
    """Batches of float32 inputs, or pairs with labels; each seed has its own mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Any] = []
    for size in sizes:
        inputs = torch.randn(size, *shape, generator=generator) * (1 + seed / 4) + seed / 8
        if classes is None:
            batches.append(inputs)
        else:
            batches.append((inputs, torch.randint(classes, (size,), generator=generator)))
    return batches
