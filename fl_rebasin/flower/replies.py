"""What a client's reply must be: read once, checked before anything is made of it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from logging import WARNING

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore import log
from torch import Tensor

from fl_rebasin.flower.arrays import read_head, read_tensor
from fl_rebasin.flower.limits import MAX_EXAMPLES
from fl_rebasin.flower.questions import printable, reason
from fl_rebasin.state_dicts import StateDict, is_finite
from fl_rebasin.symmetry.spec import PermutationSpec

MAX_VALUE = 1e60
"""No parameter is as large; beyond it sums of products overflow even in float64."""


@dataclass(frozen=True)
class ClientModel:
    """A reply that fits.

    Attributes:
        reply: its message, without the model.
        record_name: name of the record that held the model.
        state_dict: the model.
        weight: its weight.
        record: the record itself where it can be handed on as it is; its bytes are the model's.
    """

    reply: Message
    record_name: str
    state_dict: StateDict
    weight: float
    record: ArrayRecord | None = None

    @property
    def node(self) -> int:
        """The node that replied."""
        return int(self.reply.metadata.src_node_id)


@dataclass
class Inbox:
    """A round's replies, read one by one; what is no good is dropped, counted and named.

    Attributes:
        spec: what the models must fit.
        arrays: the global model, for shapes and dtypes.
        weighted_by_key: name of the metric that weighs a reply.
        max_examples: the largest weight.
        failed: replies of clients that failed.
        dropped: how many replies were no good.
    """

    spec: PermutationSpec
    arrays: ArrayRecord
    weighted_by_key: str
    max_examples: float
    failed: list[Message] = field(default_factory=list)
    dropped: int = 0

    def read(self, replies: Iterable[Message]) -> Iterator[ClientModel]:
        """Yield the good replies."""
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
                    raise ValueError("it has replied before")
            except Exception as error:  # A client may send anything; none of it may end the run.
                self.dropped += 1
                log_dropped(reply, reason(error))
                continue
            nodes.add(client.node)
            del reply  # What of it is needed is in the client.
            yield client
            del client

    def kept(self, clients: Sequence[ClientModel], good: Sequence[bool]) -> list[ClientModel]:
        """Return those that are good after all, and count the others as dropped."""
        self.dropped += len(good) - sum(good)
        return [client for client, each in zip(clients, good, strict=True) if each]


def read_reply(
    reply: Message,
    spec: PermutationSpec,
    arrays: ArrayRecord,
    weighted_by_key: str,
    max_examples: float = MAX_EXAMPLES,
) -> ClientModel:
    """Return model and weight of a reply.

    Args:
        reply: a reply without error.
        spec: what the model must fit.
        arrays: the global model, for shapes and dtypes.
        weighted_by_key: name of the metric that weighs the reply.
        max_examples: the largest weight.

    Raises:
        ValueError: they are not what the global model's shape and the round ask for.
    """
    records = {key: each for key, each in reply.content.items() if isinstance(each, ArrayRecord)}
    if len(records) != 1:
        raise ValueError(f"expected one ArrayRecord, got {len(records)}")
    name, record = next(iter(records.items()))
    weight = _read_weight(reply, weighted_by_key, max_examples)
    _check_metrics(reply)
    spec.check_keys(record)
    state_dict = {}
    as_wanted = list(record) == list(arrays)
    for key, wanted in arrays.items():
        dtype, shape = np.dtype(wanted.dtype), tuple(wanted.shape)
        try:
            head = read_head(record[key])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        if head.shape != shape:
            raise ValueError(f"{key} has shape {head.shape}, the spec expects {shape}")
        if head.dtype.kind != dtype.kind:
            raise ValueError(f"{key} is of dtype {head.dtype}, the global model's is {dtype}")
        said = record[key]
        as_wanted &= (
            head.dtype == dtype
            and not head.fortran
            and (said.dtype, tuple(said.shape)) == (str(dtype), shape)
        )
        values = read_tensor(record[key], head, dtype)
        _check_values(key, values)
        state_dict[key] = values
    rest = {key: ArrayRecord() if key == name else each for key, each in reply.content.items()}
    message = _with_content(reply, RecordDict(rest))
    return ClientModel(message, name, state_dict, weight, record if as_wanted else None)


def _check_values(key: str, values: Tensor) -> None:
    """Raise `ValueError` for values that are not finite, or beyond any parameter's size."""
    if not is_finite(values):
        raise ValueError(f"{key} holds NaN or infinite values")
    # No other dtype holds as much.
    if values.dtype == torch.float64 and bool((values.abs() > MAX_VALUE).any()):
        raise ValueError(f"{key} holds values beyond {MAX_VALUE:g}")


def _metrics(reply: Message) -> list[MetricRecord]:
    """Return a reply's metric records.

    Flower's own view of them is a reference cycle, which would keep the reply's model in memory.
    """
    return [each for each in reply.content.values() if isinstance(each, MetricRecord)]


def _read_weight(reply: Message, key: str, most: float) -> float:
    """Return the one number by which a reply is weighed.

    Raises:
        ValueError: it has none, or one that no number of examples can be.
    """
    found = _metrics(reply)
    # Flower's strategies take the first record, and end the run if there is another one.
    weight = found[0].get(key) if len(found) == 1 else None
    if not isinstance(weight, (int, float)):
        raise ValueError(f"expected one MetricRecord, with one number {key!r}")
    if not 0 < weight <= most:  # Written so that NaN fails.
        raise ValueError(f"{key} is {str(weight)[:20]}, it must be positive and at most {most:g}")
    return float(weight)


def _check_metrics(reply: Message) -> None:
    """Raise `ValueError` for an integer that no float can hold: averaging it would end the run."""
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
        weighted_by_key: name of the metric that weighs it, if the strategy weighs.
        max_examples: the largest weight.

    Raises:
        ValueError: its weight is none, or a metric is not finite.
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
    """Return the replies to an evaluation that are good or failed; name the others in the log.

    Args:
        replies: what came.
        weighted_by_key: name of the metric that weighs a reply, if the strategy weighs.
        max_examples: the largest weight.
    """
    good: list[Message] = []
    failed: list[Message] = []
    for reply in replies:
        try:
            if reply.has_error():
                failed.append(reply)
                continue
            check_evaluation(reply, weighted_by_key, max_examples)
            good.append(reply)
        except Exception as error:  # A client may send anything; none of it may end the run.
            log_dropped(reply, reason(error))
    return failed + [
        reply for reply, usual in zip(good, have_usual_records(good), strict=True) if usual
    ]


def log_dropped(reply: Message, why: str) -> None:
    """Name a reply that is dropped, and the reason, in the log."""
    log(WARNING, "reply of node %s dropped: %s", reply.metadata.src_node_id, why)


def read_label_counts(reply: Message, key: str) -> Tensor:
    """Return how many training examples of each class a reply reports, shape `(classes,)`.

    Raises:
        ValueError: it reports no list of numbers.
    """
    found = [metrics[key] for metrics in _metrics(reply) if key in metrics]
    if len(found) != 1 or not isinstance(found[0], list):
        raise ValueError(f"expected one list {key!r} in its metrics")
    counts = torch.tensor(found[0], dtype=torch.float64)
    if not bool(((counts >= 0) & (counts <= MAX_EXAMPLES)).all()):  # Written so that NaN fails.
        raise ValueError(
            f"{key} holds what is no number of examples: {str(found[0])[:40]}; they must be at "
            f"least 0 and at most {MAX_EXAMPLES:.0e}"
        )
    return counts


def have_usual_records(replies: Sequence[Message]) -> list[bool]:
    """Return of each reply whether its records are named as in most; Flower needs them so."""

    def records(reply: Message) -> str:
        return repr(
            sorted(
                (
                    name,
                    type(record).__name__,
                    sorted(
                        (key, len(value) if isinstance(value, list) else -1)
                        for key, value in record.items()
                    )
                    if isinstance(record, MetricRecord)
                    else [],
                )
                for name, record in reply.content.items()
            )
        )

    found = [records(reply) for reply in replies]
    usual = Counter(found).most_common(1)[0][0] if found else ""
    for reply, names in zip(replies, found, strict=True):
        if names != usual:
            log_dropped(
                reply, f"its records are not named as those of the others: {printable(names)}"
            )
    return [names == usual for names in found]


def reply_with_model(client: ClientModel, tensors: Iterable[tuple[str, Tensor]]) -> Message:
    """Return a client's reply with a model, whose tensors are taken one at a time."""
    content = RecordDict(dict(client.reply.content))
    content[client.record_name] = ArrayRecord({key: Array(value.numpy()) for key, value in tensors})
    return _with_content(client.reply, content)


def unchanged_reply(client: ClientModel, arrays: ArrayRecord) -> Message:
    """Return a client's reply with the model that came, in the global model's key order."""
    if client.record is None:
        return reply_with_model(client, ((key, client.state_dict[key]) for key in arrays))
    content = RecordDict(dict(client.reply.content))
    content[client.record_name] = ArrayRecord(dict(client.record))  # Some strategies clear it.
    return _with_content(client.reply, content)


def _with_content(reply: Message, content: RecordDict) -> Message:
    """Return a copy of a reply that carries something else; the reply stays as it is."""
    remade = copy.copy(reply)
    remade.content = content
    return remade


def like_global(arrays: ArrayRecord, model: ArrayRecord) -> ArrayRecord:
    """Return arrays with the key order and the dtypes of a model; integers are rounded.

    Averages of integer buffers come out of Flower as float64.
    """
    if odd := sorted(arrays.keys() ^ model.keys()):
        raise ValueError(f"the wrapped strategy changed the model's keys: {odd[:3]}")
    cast = {}
    for key, wanted in model.items():
        array, dtype = arrays[key], np.dtype(wanted.dtype)
        if np.dtype(array.dtype) != dtype:
            values = array.numpy()
            # np.rint makes a bare number of an array without axes.
            rounded = values if dtype.kind in "fc" else np.asarray(np.rint(values))
            array = Array(rounded.astype(dtype))
        cast[key] = array
    return ArrayRecord(cast)


def all_finite(arrays: ArrayRecord) -> bool:
    """Whether no value of a model is NaN or infinite."""
    return all(is_finite(read_tensor(array, read_head(array))) for array in arrays.values())
