"""Questions that the server asks the clients between training and the end of a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from logging import WARNING
from typing import Any, Generic, TypeAlias, TypeVar

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import nn

TIMEOUT = 3600.0
"""Seconds that the server waits for answers."""

MAX_REASON = 300
"""Characters of a reason that go to the log."""

LoadFn: TypeAlias = Callable[[Context], tuple[nn.Module, Iterable[Any]]]
"""Returns a module of the architecture, whose weights are overwritten, and batches of the client's
own data: inputs, or tuples and lists of inputs and labels where a question needs labels."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Question:
    """A question to clients.

    Attributes:
        name: in small letters; the action is `rebasin_NAME`, metrics begin with it.
        what: what is asked for, as the log says it.
        handler: the function of `fl_rebasin.flower` that lets a ClientApp answer.
    """

    name: str
    what: str
    handler: str

    @property
    def action(self) -> str:
        """The action, as ClientApps register it."""
        return f"rebasin_{self.name}"


@dataclass(frozen=True)
class Answers(Generic[Answer]):
    """What clients answered.

    Attributes:
        by_node: the good answers.
        metrics: `NAME-clients` (good answers), `NAME-seconds`, `NAME-bytes` (both ways).
    """

    by_node: dict[int, Answer]
    metrics: dict[str, float | int]


def size_of(content: RecordDict) -> int:
    """Return the bytes of a message's arrays."""
    return sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )


def ask(
    grid: Grid,
    question: Question,
    contents: Mapping[int, RecordDict],
    read: Callable[[RecordDict], Answer],
    timeout: float = TIMEOUT,
) -> Answers[Answer]:
    """Ask clients a question; drop, and name in the log, every answer that is not good.

    Args:
        grid: the ServerApp's grid.
        question: the question.
        contents: for each node what it is sent.
        read: turns what came back into an answer, or raises: a client may send anything.
        timeout: seconds to wait.
    """
    started = time.perf_counter()
    messages = [
        Message(content=content, message_type=f"query.{question.action}", dst_node_id=node_id)
        for node_id, content in contents.items()
    ]
    moved = sum(map(size_of, contents.values()))
    by_node: dict[int, Answer] = {}
    silent = dict.fromkeys(contents)
    for reply in grid.send_and_receive(messages, timeout=timeout) if messages else ():
        node_id = reply.metadata.src_node_id
        silent.pop(node_id, None)
        try:
            if reply.has_error():
                raise ValueError(reply.error.reason)
            by_node[node_id] = read(reply.content)
            moved += size_of(reply.content)
        except Exception as error:  # None of what a client sends may end the run.
            log(
                WARNING,
                "%s of node %s dropped: %s (a ClientApp answers this query after "
                "fl_rebasin.flower.%s(app, ...))",
                *(question.what, node_id, reason(error), question.handler),
            )
    for node_id in silent:
        log(WARNING, "%s of node %s dropped: no answer", question.what, node_id)
    metrics = {
        f"{question.name}-clients": len(by_node),
        f"{question.name}-seconds": time.perf_counter() - started,
        f"{question.name}-bytes": moved,
    }
    return Answers(by_node, metrics)


def reason(error: Exception) -> str:
    """Return an error's first line, fit for a log."""
    if isinstance(error, KeyError):
        return printable(f"{error} is missing")
    return printable(str(error).splitlines()[0] if str(error).strip() else type(error).__name__)


def printable(text: str) -> str:
    """Return the beginning of what a client may have written, without control characters."""
    return "".join(each if each.isprintable() else "?" for each in text[:MAX_REASON])


def loaded(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Return the model with arrays for its state, on the device that it is on."""
    model.load_state_dict(arrays.to_torch_state_dict())
    return model
