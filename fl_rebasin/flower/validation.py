"""What a client's reply must be: read once, checked before anything is made of it."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from logging import WARNING

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore import log
from torch import Tensor

from fl_rebasin.matching import check_finite
from fl_rebasin.spec import PermutationSpec

MAX_EXAMPLES = 1e15
"""More training examples than any client can have: a reply above it is dropped."""


@dataclass(frozen=True)
class ClientModel:
    """A reply that fits: its message, its model and its weight."""

    reply: Message
    record_name: str
    record: ArrayRecord
    state_dict: dict[str, Tensor]
    weight: float

    @property
    def node(self) -> int:
        """The node that replied."""
        return int(self.reply.metadata.src_node_id)


def read_reply(
    reply: Message, spec: PermutationSpec, arrays: ArrayRecord, weighted_by_key: str
) -> ClientModel:
    """Return model and weight of a reply.

    Args:
        reply: a reply without error.
        spec: what the model must fit.
        arrays: the global model, for the dtypes.
        weighted_by_key: name of the metric that weighs the reply.

    Raises:
        ValueError: they are not what the global model's shape and the round ask for.
    """
    records = reply.content.array_records
    if len(records) != 1:
        raise ValueError(f"expected one ArrayRecord, got {len(records)}")
    name, record = next(iter(records.items()))
    weights = [
        metrics[weighted_by_key]
        for metrics in reply.content.metric_records.values()
        if weighted_by_key in metrics
    ]
    if len(weights) != 1 or not isinstance(weights[0], (int, float)):
        raise ValueError(f"expected one number {weighted_by_key!r} in its metrics")
    if not 0 < weights[0] <= MAX_EXAMPLES:
        raise ValueError(
            f"{weighted_by_key} is {str(weights[0])[:20]}, it must be positive and at "
            f"most {MAX_EXAMPLES:.0e}"
        )
    _check_metrics(reply)
    state_dict = _as_global(record, arrays)
    check_finite(spec, state_dict, "its model")
    return ClientModel(reply, name, record, state_dict, float(weights[0]))


def _check_metrics(reply: Message) -> None:
    """Raise `ValueError` for an integer that no float can hold: averaging it would end the run."""
    for metrics in reply.content.metric_records.values():
        for key, value in metrics.items():
            for number in value if isinstance(value, list) else [value]:
                try:
                    float(number)
                except OverflowError as error:
                    raise ValueError(f"its metric {key!r} is too large for a float") from error


def _as_global(record: ArrayRecord, arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return a reply's tensors in the dtypes of the global model.

    Raises:
        ValueError: a tensor is of another kind: say, integers where floats belong.
    """
    state_dict = dict(record.to_torch_state_dict())
    for key in state_dict.keys() & arrays.keys():
        wanted = np.dtype(arrays[key].dtype)
        found = np.dtype(record[key].numpy().dtype)
        if found.kind != wanted.kind:
            raise ValueError(f"{key} is of dtype {found}, the global model's is {wanted}")
        if found != wanted:
            state_dict[key] = torch.from_numpy(record[key].numpy().astype(wanted))
    return state_dict


def read_label_counts(reply: Message, key: str) -> Tensor:
    """Return how many training examples of each class a reply reports, shape `(classes,)`.

    Raises:
        ValueError: it reports no list of numbers.
    """
    found = [metrics[key] for metrics in reply.content.metric_records.values() if key in metrics]
    if len(found) != 1 or not isinstance(found[0], list):
        raise ValueError(f"expected one list {key!r} in its metrics")
    counts = torch.tensor(found[0], dtype=torch.float64)
    if not bool(((counts >= 0) & (counts <= MAX_EXAMPLES)).all()):  # Written so that NaN fails.
        raise ValueError(
            f"{key} holds what is no number of examples: {str(found[0])[:40]}; they must be at "
            f"least 0 and at most {MAX_EXAMPLES:.0e}"
        )
    return counts


def alike(clients: list[ClientModel]) -> list[ClientModel]:
    """Return the replies whose records are named as in most; Flower's strategies need them so."""

    def records(client: ClientModel) -> str:
        named = {client.record_name: ["model"]}
        for name, metrics in client.reply.content.metric_records.items():
            named[name] = [
                f"{key}[{len(value)}]" if isinstance(value, list) else key
                for key, value in sorted(metrics.items())
            ]
        return str(named)

    if not clients:
        return []
    usual, _ = Counter(map(records, clients)).most_common(1)[0]
    for client in clients:
        if records(client) != usual:
            log(
                WARNING,
                "reply of node %s dropped: its records are not named as those of the others: %s",
                client.reply.metadata.src_node_id,
                records(client),
            )
    return [client for client in clients if records(client) == usual]


def with_arrays(client: ClientModel, arrays: ArrayRecord) -> Message:
    """Return a copy of a reply that carries other arrays; the reply stays as it is."""
    content = RecordDict(dict(client.reply.content))
    content[client.record_name] = arrays
    remade = copy.copy(client.reply)
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
