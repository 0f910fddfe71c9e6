"""Reads clients' replies: checks each one, and rebuilds those that the wrapped strategy gets."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore import log
from torch import Tensor

from fl_rebasin.flower.arrays import read_header, read_tensor
from fl_rebasin.flower.limits import MAX_EXAMPLES
from fl_rebasin.flower.log_text import printable, reason
from fl_rebasin.state_dicts import StateDict, is_finite
from fl_rebasin.symmetry.spec import PermutationSpec

MAX_VALUE = 1e60
"""Largest absolute value of a parameter. Sums of products of larger values overflow float64."""


@dataclass(frozen=True)
class ClientModel:
    """A client's model and weight, from a reply that passed all checks.

    Attributes:
        reply: the message without the model.
        record_name: name of the record that held the model.
        state_dict: the model.
        weight: the client's weight in the average.
        record: the record that held the model, if it can be handed on unchanged; it shares its
            bytes with `state_dict`.
    """

    reply: Message
    record_name: str
    state_dict: StateDict
    weight: float
    record: ArrayRecord | None = None

    @property
    def node(self) -> int:
        """ID of the node that replied."""
        return int(self.reply.metadata.src_node_id)


@dataclass
class Inbox:
    """Reads the replies of a round one by one; drops, counts and logs the invalid ones.

    Attributes:
        spec: the permutation spec that the models must fit.
        arrays: the global model, for shapes and dtypes.
        weighted_by_key: name of the metric that weights a reply.
        max_examples: the largest weight allowed.
        failed: the replies of clients that report an error.
        dropped: number of invalid replies.
    """

    spec: PermutationSpec
    arrays: ArrayRecord
    weighted_by_key: str
    max_examples: float
    failed: list[Message] = field(default_factory=list)
    dropped: int = 0

    def read(self, replies: Iterable[Message]) -> Iterator[ClientModel]:
        """Yield the valid replies."""
        nodes: set[int] = set()
        for reply in replies:
            try:
                if reply.has_error():
                    self.failed.append(reply)
                    continue
                client = read_reply(
                    reply, self.spec, self.arrays, self.weighted_by_key, self.max_examples
                )
                if client.node in nodes:
                    raise ValueError("the node has already replied")
            except Exception as error:  # A client may send anything, and nothing may end the run.
                self.dropped += 1
                log_dropped(reply, reason(error))
                continue
            nodes.add(client.node)
            del reply  # The client holds the parts that are needed.
            yield client
            del client

    def kept(self, clients: Sequence[ClientModel], valid: Sequence[bool]) -> list[ClientModel]:
        """Return the clients that passed a later check, and count the others as dropped."""
        self.dropped += len(valid) - sum(valid)
        return [client for client, each in zip(clients, valid, strict=True) if each]


def read_reply(
    reply: Message,
    spec: PermutationSpec,
    arrays: ArrayRecord,
    weighted_by_key: str,
    max_examples: float = MAX_EXAMPLES,
) -> ClientModel:
    """Return the model and the weight of a reply.

    Args:
        reply: a reply without error.
        spec: the permutation spec that the model must fit.
        arrays: the global model, for shapes and dtypes.
        weighted_by_key: name of the metric that weights the reply.
        max_examples: the largest weight allowed.

    Raises:
        ValueError: the reply does not hold exactly one model and one weight, the model does not
            fit the global one, or a value is not allowed.
    """
    name, record = only_arrays(reply.content)
    weight = _read_weight(reply, weighted_by_key, max_examples)
    _check_metrics(reply)
    spec.check_keys(record)
    state_dict = {}
    reusable = list(record) == list(arrays)
    for key, wanted in arrays.items():
        state_dict[key], same = _read_values(key, record[key], wanted)
        reusable &= same
    rest = {key: ArrayRecord() if key == name else each for key, each in reply.content.items()}
    message = reply_with_content(reply, RecordDict(rest))
    return ClientModel(message, name, state_dict, weight, record if reusable else None)


def only_arrays(content: Mapping[str, Any]) -> tuple[str, ArrayRecord]:
    """Return the name of the only ArrayRecord of a message, and the record.

    Raises:
        ValueError: there is no ArrayRecord, or more than one.
    """
    found = [(key, each) for key, each in content.items() if isinstance(each, ArrayRecord)]
    if len(found) != 1:
        raise ValueError(f"expected one ArrayRecord, got {len(found)}")
    return found[0]


def _read_values(key: str, array: Array, wanted: Array) -> tuple[Tensor, bool]:
    """Return the values of an array in the wanted dtype, and whether it is like the wanted one.

    Raises:
        ValueError: the array has another shape or kind of dtype, or a value is not allowed.
    """
    dtype, shape = np.dtype(wanted.dtype), tuple(wanted.shape)
    try:
        header = read_header(array)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if header.shape != shape:
        raise ValueError(f"{key} has shape {header.shape}, the spec expects {shape}")
    if header.dtype.kind != dtype.kind:
        raise ValueError(f"{key} has dtype {header.dtype}, the global model has {dtype}")
    values = read_tensor(array, header, dtype)
    if not is_finite(values):
        raise ValueError(f"{key} holds NaN or infinite values")
    # No other dtype can hold larger values.
    if values.dtype == torch.float64 and bool((values.abs() > MAX_VALUE).any()):
        raise ValueError(f"{key} holds values beyond {MAX_VALUE:g}")
    declared = array.dtype, tuple(array.shape)
    same = header.dtype == dtype and not header.fortran and declared == (str(dtype), shape)
    return values, same


def _metrics(reply: Message) -> list[MetricRecord]:
    """Return the metric records of a reply.

    Flower's own view of them is a reference cycle that would keep the reply's model in memory.
    """
    return [each for each in reply.content.values() if isinstance(each, MetricRecord)]


def _read_weight(reply: Message, key: str, most: float) -> float:
    """Return the number that weights a reply.

    Raises:
        ValueError: there is no such number, or it cannot be a number of examples.
    """
    found = _metrics(reply)
    # Flower's strategies use the first record, and end the run if there is a second one.
    weight = found[0].get(key) if len(found) == 1 else None
    if not isinstance(weight, (int, float)):
        raise ValueError(f"expected one MetricRecord, with one number {key!r}")
    if not 0 < weight <= most:  # Written so that NaN fails.
        raise ValueError(f"{key} is {str(weight)[:20]}, it must be positive and at most {most:g}")
    return float(weight)


def _check_metrics(reply: Message) -> None:
    """Raise `ValueError` for an integer too large for a float: averaging it would end the run."""
    for metrics in _metrics(reply):
        for key, value in metrics.items():
            for number in value if isinstance(value, list) else [value]:
                try:
                    float(number)
                except OverflowError as error:
                    raise ValueError(f"its metric {key!r} is too large for a float") from error


def check_evaluation(reply: Message, weighted_by_key: str | None, max_examples: float) -> None:
    """Check a reply to an evaluation.

    Args:
        reply: a reply without error.
        weighted_by_key: name of the metric that weights it; None if the strategy does not weight.
        max_examples: the largest weight allowed.

    Raises:
        ValueError: the weight is missing or not allowed, or a metric is not finite.
    """
    if weighted_by_key is not None:
        _read_weight(reply, weighted_by_key, max_examples)
    _check_metrics(reply)
    for metrics in _metrics(reply):
        for key, value in metrics.items():
            if not all(map(math.isfinite, value if isinstance(value, list) else [value])):
                raise ValueError(f"its metric {key!r} is NaN or infinite")


def valid_evaluations(
    replies: Iterable[Message], weighted_by_key: str | None, max_examples: float
) -> list[Message]:
    """Return the replies to an evaluation that are valid or report an error; log the others.

    Args:
        replies: all replies of the round.
        weighted_by_key: name of the metric that weights a reply; None if the strategy does not
            weight.
        max_examples: the largest weight allowed.
    """
    valid: list[Message] = []
    failed: list[Message] = []
    for reply in replies:
        try:
            if reply.has_error():
                failed.append(reply)
                continue
            check_evaluation(reply, weighted_by_key, max_examples)
            valid.append(reply)
        except Exception as error:  # A client may send anything, and nothing may end the run.
            log_dropped(reply, reason(error))
    usual = have_usual_records(valid)
    return failed + [reply for reply, each in zip(valid, usual, strict=True) if each]


def log_dropped(reply: Message, why: str, *, what: str = "reply") -> None:
    """Log that a reply, or a part of it, is dropped, and why."""
    log(WARNING, "%s of node %s dropped: %s", what, reply.metadata.src_node_id, why)


def read_label_counts(reply: Message, key: str) -> Tensor:
    """Return the number of training examples of each class in a reply, shape `(classes,)`.

    Raises:
        ValueError: the reply has no such list, or an entry cannot be a number of examples.
    """
    found = [metrics[key] for metrics in _metrics(reply) if key in metrics]
    if len(found) != 1 or not isinstance(found[0], list):
        raise ValueError(f"expected one list {key!r} in its metrics")
    counts = torch.tensor(found[0], dtype=torch.float64)
    if not bool(((counts >= 0) & (counts <= MAX_EXAMPLES)).all()):  # Written so that NaN fails.
        raise ValueError(
            f"{key} must list numbers of examples from 0 to {MAX_EXAMPLES:.0e}, got "
            f"{str(found[0])[:40]}"
        )
    return counts


def have_usual_records(replies: Sequence[Message], *, what: str = "reply") -> list[bool]:
    """Return for each reply whether its records have the same layout as those of most replies.

    Flower aggregates only replies of one layout. The other replies are logged as dropped.

    Args:
        replies: the replies.
        what: what is dropped of the others, for the log.
    """
    layouts = [_layout(reply) for reply in replies]
    usual = Counter(layouts).most_common(1)[0][0] if layouts else ""
    for reply, layout in zip(replies, layouts, strict=True):
        if layout != usual:
            why = f"its records differ from those of most replies: {printable(layout)}"
            log_dropped(reply, why, what=what)
    return [layout == usual for layout in layouts]


def _layout(reply: Message) -> str:
    """Return the names and types of a reply's records, with the keys and lengths of metrics."""
    layout = []
    for name, record in reply.content.items():
        metrics = record if isinstance(record, MetricRecord) else {}
        lengths = {
            key: len(each) if isinstance(each, list) else -1 for key, each in metrics.items()
        }
        layout.append((name, type(record).__name__, sorted(lengths.items())))
    return repr(sorted(layout))


def reply_with_model(client: ClientModel, tensors: Iterable[tuple[str, Tensor]]) -> Message:
    """Return a client's reply with another model; its tensors are consumed one at a time."""
    content = RecordDict(dict(client.reply.content))
    content[client.record_name] = ArrayRecord({key: Array(value.numpy()) for key, value in tensors})
    return reply_with_content(client.reply, content)


def unchanged_reply(client: ClientModel, arrays: ArrayRecord) -> Message:
    """Return a client's reply with its own model, in the global model's key order."""
    if client.record is None:
        return reply_with_model(client, ((key, client.state_dict[key]) for key in arrays))
    content = RecordDict(dict(client.reply.content))
    content[client.record_name] = ArrayRecord(dict(client.record))  # Some strategies clear it.
    return reply_with_content(client.reply, content)


def reply_with_content(reply: Message, content: RecordDict) -> Message:
    """Return a copy of a reply with other content; the reply itself does not change."""
    remade = copy.copy(reply)
    remade.content = content
    return remade


def like_global(arrays: ArrayRecord, model: ArrayRecord) -> ArrayRecord:
    """Return arrays in the key order and the dtypes of a model; integers are rounded.

    Flower returns averages of integer buffers in float64.

    Raises:
        ValueError: the keys differ from the model's.
    """
    if changed := sorted(arrays.keys() ^ model.keys()):
        raise ValueError(
            f"the wrapped strategy changed the model's keys: {changed[:3]} are missing or new"
        )
    cast = {}
    for key, wanted in model.items():
        array, dtype = arrays[key], np.dtype(wanted.dtype)
        if np.dtype(array.dtype) != dtype:
            values = array.numpy()
            # np.rint turns an array without axes into a scalar.
            rounded = values if dtype.kind in "fc" else np.asarray(np.rint(values))
            array = Array(rounded.astype(dtype))
        cast[key] = array
    return ArrayRecord(cast)


def all_finite(arrays: ArrayRecord) -> bool:
    """Return whether all values of a model are finite."""
    return all(is_finite(read_tensor(array, read_header(array))) for array in arrays.values())
