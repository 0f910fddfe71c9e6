"""Replies to a round of training, made in this process without a federation."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor


def allow_messages() -> None:
    """Let this process create messages, which Flower allows only in a run; log errors only."""
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    logging.getLogger("flwr").setLevel(logging.ERROR)


def reply_with(content: RecordDict, node: int) -> Message:
    """Return a node's reply to a training message."""
    request = Message(RecordDict(), dst_node_id=node, message_type="train")
    return Message(content, reply_to=request)


def training_reply(state: Mapping[str, Tensor], node: int, examples: int) -> Message:
    """Return the reply of a node that has trained a model."""
    arrays = ArrayRecord(dict(state))
    metrics = MetricRecord({"num-examples": examples})
    return reply_with(RecordDict({"arrays": arrays, "metrics": metrics}), node)


class Nodes:
    """A grid for strategies that sample nodes and send no queries."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self._nodes = list(nodes)

    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes."""
        return self._nodes
