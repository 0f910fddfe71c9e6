"""BatchNorm statistics of a merged model, re-estimated where the data are: on the clients."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from logging import INFO

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import nn

from fl_rebasin.flower.arrays import read_array, read_header
from fl_rebasin.flower.questions import TIMEOUT, LoadFn, Question, ask, loaded
from fl_rebasin.flower.wrapper import WrappedStrategy
from fl_rebasin.merging.batchnorm import (
    LayerStatistics,
    batchnorm_layers,
    batchnorm_statistics,
    pool_statistics,
    recentred,
    with_statistics,
)

QUESTION = Question("batchnorm", "BatchNorm statistics", "add_batchnorm_handler")
MAX_COUNT = 10**15
"""More values a channel than any client can have seen: a reply above it is dropped."""
MAX_MEAN, MAX_VARIANCE = 1e18, 1e36
"""Larger statistics could overflow when they are pooled into float32 buffers."""


def add_batchnorm_handler(app: ClientApp, load: LoadFn) -> None:
    """Let a ClientApp answer the server's question for BatchNorm statistics.

    Args:
        app: the ClientApp; gets a query handler for the action `rebasin_batchnorm`.
        load: returns a module of the architecture, whose weights are overwritten, and batches of
            the client's inputs: tensors, or tuples and lists whose first item is the input.
            Labels are not used.

    Example:
        >>> app = ClientApp()
        >>> add_batchnorm_handler(app, lambda context: (nn.BatchNorm1d(2), [torch.rand(8, 2)]))
    """

    @app.query(QUESTION.action)
    def statistics(message: Message, context: Context) -> Message:
        model, batches = load(context)
        loaded(model, message.content.array_records["arrays"])
        frozen = bool(message.content.config_records["config"].get("frozen", False))
        arrays = ArrayRecord()
        for name, layer in batchnorm_statistics(model, batches, frozen=frozen).items():
            arrays[f"{name}.count"] = Array(np.array([layer.count], dtype=np.int64))
            arrays[f"{name}.mean"] = Array(layer.mean.numpy())
            arrays[f"{name}.variance"] = Array(layer.variance.numpy())
        return Message(RecordDict({"statistics": arrays}), reply_to=message)


def _read(content: RecordDict, channels: dict[str, int]) -> dict[str, LayerStatistics]:
    """Return a reply's statistics.

    Raises:
        ValueError: they are not what was asked for.
    """
    record = content.array_records["statistics"]
    statistics = {}
    for name, size in channels.items():
        if not record.keys() & {f"{name}.count", f"{name}.mean", f"{name}.variance"}:
            continue  # a layer that the client's forward pass does not use
        keys = [f"{name}.{what}" for what in ("count", "mean", "variance")]
        heads = [read_header(record[key]) for key in keys]
        if [head.shape for head in heads] != [(1,), (size,), (size,)]:
            raise ValueError(f"{name}: expected {size} channels, got {heads[1].shape}")
        if [head.dtype.kind for head in heads] != ["i", "f", "f"]:
            raise ValueError(
                f"{name}: mean and variance must be floats, and the count an integer, got "
                f"{heads[1].dtype}, {heads[2].dtype} and {heads[0].dtype}"
            )
        count, mean, variance = (
            read_array(record[key], head) for key, head in zip(keys, heads, strict=True)
        )
        if not 0 < int(count[0]) <= MAX_COUNT:
            raise ValueError(f"{name}: {count[0]} is no number of values")
        # Written so that NaN fails.
        in_range = (np.abs(mean) <= MAX_MEAN) & (variance >= 0) & (variance <= MAX_VARIANCE)
        if not in_range.all():
            raise ValueError(
                f"{name}: mean or variance is not finite or too large, or a variance is negative"
            )
        statistics[name] = LayerStatistics(
            int(count[0]),
            torch.from_numpy(mean.astype(np.float64)),
            torch.from_numpy(variance.astype(np.float64)),
        )
    if not statistics:
        raise ValueError("it holds statistics of no layer")
    return statistics


def recalibrate_on_clients(
    grid: Grid,
    node_ids: Sequence[int],
    model: nn.Module,
    arrays: ArrayRecord,
    timeout: float = TIMEOUT,
    *,
    frozen: bool = False,
) -> tuple[ArrayRecord, dict[str, float | int]]:
    """Ask clients for BatchNorm statistics of a model and pool the answers exactly.

    Args:
        grid: the ServerApp's grid.
        node_ids: clients to ask; each needs `add_batchnorm_handler`.
        model: a module of the architecture, any weights; one without BatchNorm costs no message.
        arrays: the model's state dict.
        timeout: seconds to wait for the answers.
        frozen: do not change the function: take the statistics in evaluation mode, and let scale
            and shift take up the difference.

    Returns:
        The arrays with new running statistics (unchanged if nobody answered well), and metrics:
        `batchnorm-clients` (answers pooled), `batchnorm-seconds`, `batchnorm-bytes`.
    """
    channels = {name: layer.num_features for name, layer in batchnorm_layers(model).items()}
    if not channels:
        return arrays, {}
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"frozen": frozen})})
    answers = ask(
        grid, QUESTION, dict.fromkeys(node_ids, content), lambda reply: _read(reply, channels),
        timeout,
    )  # fmt: skip
    good = list(answers.by_node.values())
    log(INFO, "BatchNorm statistics pooled from %s of %s clients", len(good), len(node_ids))
    if not good:
        return arrays, answers.metrics
    pooled = pool_statistics(good)
    if frozen:
        found = recentred(loaded(copy.deepcopy(model), arrays), pooled)
        state_dict = {key: found[key] for key in arrays}
    else:
        state_dict = with_statistics(arrays.to_torch_state_dict(), pooled)
    return ArrayRecord(state_dict), answers.metrics


class BatchNormRecalibration(WrappedStrategy):
    """Wraps a strategy: re-estimates the BatchNorm statistics of its model after each round.

    `ReBasinStrategy` does so by itself; this is the same without alignment.

    Args:
        strategy: any Flower strategy; `FedAvg()` by default.
        model: a module of the federation's architecture, any weights.
    """

    def __init__(self, strategy: Strategy | None = None, *, model: nn.Module) -> None:
        super().__init__(strategy)
        self.model = model
        self._grid: Grid | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy; the grid is kept for the question after the round."""
        self._grid = grid
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate with the wrapped strategy, then ask those who replied for statistics."""
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None or self._grid is None:
            return arrays, metrics
        nodes = [reply.metadata.src_node_id for reply in replies if not reply.has_error()]
        arrays, own = recalibrate_on_clients(self._grid, nodes, self.model, arrays)
        return arrays, MetricRecord({**(metrics or {}), **own})

    def summary(self) -> None:
        """Log what is wrapped."""
        log(INFO, "\t├──> BatchNorm statistics re-estimated on the clients")
        super().summary()
