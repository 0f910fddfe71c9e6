"""Questions that the server asks the clients between training and the end of a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from logging import WARNING
from typing import Any, TypeAlias

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import nn

from fl_rebasin.flower.arrays import read_header, read_tensor
from fl_rebasin.flower.context_memory import ContextMemory
from fl_rebasin.flower.log_text import reason
from fl_rebasin.merging.clients import Answer, Answers, Cost, Question, Read, Request, Tensors

TIMEOUT = 3600.0
"""Seconds that the server waits for answers."""

ANSWER = "answer"
"""Name of the record that holds the arrays of an answer."""

LoadFn: TypeAlias = Callable[[Context], tuple[nn.Module, Iterable[Any]]]
"""Returns a module of the architecture, whose weights are overwritten, and batches of the client's
own data: inputs, or tuples and lists of inputs and labels where a question needs labels."""


def action_of(question: Question) -> str:
    """Return the name under which a ClientApp registers the answer to a question."""
    return f"rebasin_{question.name.replace('-', '_')}"


def answer_with(app: ClientApp, question: Question, load: LoadFn) -> None:
    """Let a ClientApp answer a question.

    Args:
        app: the ClientApp; gets a query handler.
        question: the question.
        load: returns module and data of the client.
    """

    @app.query(action_of(question))
    def answer(message: Message, context: Context) -> Message:
        model, batches = load(context)
        request = replace(_request(message.content), memory=ContextMemory(context))
        tensors = question.answer(model, batches, request)
        arrays = {key: Array(value.cpu().numpy()) for key, value in tensors.items()}
        return Message(RecordDict({ANSWER: ArrayRecord(arrays)}), reply_to=message)


def _request(content: RecordDict) -> Request:
    states = {name: each.to_torch_state_dict() for name, each in content.array_records.items()}
    config: dict[str, Any] = {}
    for record in content.config_records.values():
        config |= record
    return Request(states, config)


def ask(
    grid: Grid,
    question: Question,
    contents: Mapping[int, RecordDict],
    read: Read[Answer],
    timeout: float = TIMEOUT,
) -> Answers[Answer]:
    """Ask clients a question; drop invalid answers, and name them in the log.

    Args:
        grid: the ServerApp's grid.
        question: the question.
        contents: what each node is sent.
        read: turns the tensors of one node into an answer, or raises: a client may send anything.
        timeout: seconds to wait.
    """
    started = time.perf_counter()
    messages = [
        Message(content=content, message_type=f"query.{action_of(question)}", dst_node_id=node_id)
        for node_id, content in contents.items()
    ]
    size = sum(map(size_of, contents.values()))
    by_node: dict[int, Answer] = {}
    unanswered = dict.fromkeys(contents)
    for reply in grid.send_and_receive(messages, timeout=timeout) if messages else ():
        node_id = reply.metadata.src_node_id
        unanswered.pop(node_id, None)
        try:
            if reply.has_error():
                raise ValueError(reply.error.reason)
            by_node[node_id] = read(tensors_of(reply.content))
            size += size_of(reply.content)
        except Exception as error:  # A client may send anything; none of it may end the run.
            log(
                WARNING,
                "%s of node %s dropped: %s (a ClientApp answers this question after "
                "fl_rebasin.flower.add_rebasin_handlers(app, ...))",
                question.subject,
                node_id,
                reason(error),
            )
    for node_id in unanswered:
        log(WARNING, "%s of node %s dropped: no answer", question.subject, node_id)
    seconds = time.perf_counter() - started
    return Answers(by_node, Cost(len(by_node), seconds, size, messages=1 if messages else 0))


def tensors_of(content: RecordDict) -> Tensors:
    """Return the tensors of an answer.

    Raises:
        ValueError: an array is not what its bytes say.
        KeyError: there is no answer.
    """
    record = content.array_records[ANSWER]
    tensors = {}
    for key, array in record.items():
        try:
            tensors[key] = read_tensor(array, read_header(array))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return tensors


def size_of(content: RecordDict) -> int:
    """Return the bytes of a message's arrays."""
    return sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )
