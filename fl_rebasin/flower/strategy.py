"""`ReBasinStrategy`: permutation-aligned replies for any Flower strategy."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from logging import INFO, WARNING

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import Tensor, nn

from fl_rebasin.derive import ExampleInputs, derive_spec
from fl_rebasin.flower.batchnorm import recalibrate_on_clients
from fl_rebasin.flower.wrapper import WrappedStrategy
from fl_rebasin.matching import check_finite
from fl_rebasin.merging import align_many, average, mean_similarity, normalised
from fl_rebasin.spec import PermutationSpec

MAX_EXAMPLES = 1e15
"""More training examples than any client can have: a reply above it is dropped."""


@dataclass(frozen=True)
class _ClientModel:
    """A reply that fits: its message, its model and its weight."""

    reply: Message
    record_name: str
    record: ArrayRecord
    state_dict: dict[str, Tensor]
    weight: float


class ReBasinStrategy(WrappedStrategy):
    """Aligns the hidden units of the clients' models, then lets any strategy aggregate them.

    Each round the replies are permuted into one basin (MergeMany with the replies' example counts
    as weights, then to the unit order of the global model) and handed on, in the global model's
    key order, to the wrapped strategy. The wrapped strategy does everything else.

    Args:
        strategy: any Flower strategy; `FedAvg()` by default.
        model: a module of the federation's architecture, any weights; not changed.
        example_inputs: inputs that `model` runs on; only shapes and dtypes matter.
        recalibrate_batchnorm: re-estimate the BatchNorm statistics of the merged model on the
            round's clients, which answer after `add_batchnorm_handler`. A model without BatchNorm
            skips it.

    Attributes:
        spec: the permutation spec of the model.

    Raises:
        SpecError: no spec can be derived from model and inputs.

    Aggregated training metrics gain `rebasin-similarity-before`, `rebasin-similarity-after`
    (weighted mean cosine of the clients' models to their mean), `rebasin-units-moved`,
    `rebasin-sweeps`, `rebasin-seconds`, and with BatchNorm `batchnorm-clients` and
    `batchnorm-seconds`.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin (ICLR 2023), Algorithm 3.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> strategy = ReBasinStrategy(model=net, example_inputs=torch.zeros(1, 4))
        >>> strategy.spec.groups
        {'0': 8}
    """

    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        model: nn.Module,
        example_inputs: ExampleInputs,
        recalibrate_batchnorm: bool = True,
    ) -> None:
        super().__init__(strategy)
        self.model = model
        self.recalibrate_batchnorm = recalibrate_batchnorm
        self.spec: PermutationSpec = derive_spec(model, example_inputs)
        self._arrays: ArrayRecord | None = None
        self._grid: Grid | None = None

    @property
    def weighted_by_key(self) -> str:
        """Name of the metric that weighs a reply: that of the innermost wrapped strategy."""
        strategy: object = self.strategy
        while isinstance(getattr(strategy, "strategy", None), Strategy):
            strategy = strategy.strategy  # type: ignore[attr-defined]
        return str(getattr(strategy, "weighted_by_key", "num-examples"))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Keep the global model, then let the wrapped strategy choose clients.

        Raises:
            SpecError: the global model is not of the architecture that the spec was derived from,
                or holds NaN or infinite values.
        """
        check_finite(self.spec, arrays.to_torch_state_dict(), "global model")
        self._arrays = arrays
        self._grid = grid
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Align the replies, aggregate them with the wrapped strategy, re-estimate BatchNorm.

        Replies that do not fit the global model are dropped, with a line in the log.
        """
        if self._arrays is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        clients: list[_ClientModel] = []
        handed_on: list[Message] = []
        for reply in replies:
            if reply.has_error():
                handed_on.append(reply)
                continue
            try:
                clients.append(self._read(reply))
            except Exception as error:  # A client may send anything; none of it may end the run.
                log(
                    WARNING,
                    "reply of node %s dropped: %s",
                    reply.metadata.src_node_id,
                    str(error).splitlines()[0] if str(error) else type(error).__name__,
                )
        own: dict[str, float | int] = {}
        clients = _alike(clients)
        if clients:
            aligned, own = self._align(clients)
            handed_on += aligned
        arrays, metrics = super().aggregate_train(server_round, handed_on)
        if arrays is None:
            return arrays, metrics
        arrays = _like(arrays, self._arrays)
        if self.recalibrate_batchnorm and self._grid is not None:
            nodes = [client.reply.metadata.src_node_id for client in clients]
            arrays, batchnorm = recalibrate_on_clients(self._grid, nodes, self.model, arrays)
            own |= batchnorm
        return arrays, MetricRecord({**(metrics or {}), **own})

    def _read(self, reply: Message) -> _ClientModel:
        """Return model and weight of a reply.

        Raises:
            ValueError: they are not what the global model's shape and the round ask for.
        """
        records = reply.content.array_records
        if len(records) != 1:
            raise ValueError(f"expected one ArrayRecord, got {len(records)}")
        name, record = next(iter(records.items()))
        weights = [
            metrics[self.weighted_by_key]
            for metrics in reply.content.metric_records.values()
            if self.weighted_by_key in metrics
        ]
        if len(weights) != 1 or not isinstance(weights[0], (int, float)):
            raise ValueError(f"expected one number {self.weighted_by_key!r} in its metrics")
        if not 0 < weights[0] <= MAX_EXAMPLES:
            raise ValueError(
                f"{self.weighted_by_key} is {str(weights[0])[:20]}, it must be positive and at "
                f"most {MAX_EXAMPLES:.0e}"
            )
        state_dict = self._as_global(record)
        check_finite(self.spec, state_dict, "its model")
        return _ClientModel(reply, name, record, state_dict, float(weights[0]))

    def _as_global(self, record: ArrayRecord) -> dict[str, Tensor]:
        """Return a reply's tensors in the dtypes of the global model.

        Raises:
            ValueError: a tensor is of another kind: say, integers where floats belong.
        """
        assert self._arrays is not None
        state_dict = dict(record.to_torch_state_dict())
        for key in state_dict.keys() & self._arrays.keys():
            wanted = np.dtype(self._arrays[key].dtype)
            found = np.dtype(record[key].numpy().dtype)
            if found.kind != wanted.kind:
                raise ValueError(f"{key} is of dtype {found}, the global model's is {wanted}")
            if found != wanted:
                state_dict[key] = torch.from_numpy(record[key].numpy().astype(wanted))
        return state_dict

    def _align(self, clients: list[_ClientModel]) -> tuple[list[Message], dict[str, float | int]]:
        """Return the replies with aligned models, and what the alignment did."""
        assert self._arrays is not None
        started = time.perf_counter()
        models = [client.state_dict for client in clients]
        weights = [client.weight for client in clients]
        gauge = self._arrays.to_torch_state_dict()
        permutations, sweeps = align_many(self.spec, models, weights, gauge)
        aligned, messages = [], []
        for client, permutation in zip(clients, permutations, strict=True):
            still = permutation.is_identity
            moved = client.state_dict if still else self.spec.apply(permutation, client.state_dict)
            arrays = {key: Array(moved[key].numpy()) for key in self._arrays}
            aligned.append(moved)
            messages.append(_with_arrays(client, ArrayRecord(arrays)))
        shares = normalised(weights, len(weights))
        before, after = (
            mean_similarity(self.spec, each, average(each, weights), shares)
            for each in (models, aligned)
        )
        units = sum(permutation.moved for permutation in permutations)
        seconds = time.perf_counter() - started
        log(
            INFO,
            "aligned %s models: similarity %.3f -> %.3f, %s units moved, %.2f s",
            *(len(models), before, after, units, seconds),
        )
        return messages, {
            "rebasin-similarity-before": before,
            "rebasin-similarity-after": after,
            "rebasin-units-moved": units,
            "rebasin-sweeps": sweeps,
            "rebasin-seconds": seconds,
        }

    def summary(self) -> None:
        """Log what may move, then what the wrapped strategy has to say."""
        log(
            INFO,
            "\t├──> Re-Basin: %s groups of units, %.1f %% of the parameters may move",
            *(len(self.spec.groups), 100 * self.spec.freedom),
        )
        super().summary()


def _alike(clients: list[_ClientModel]) -> list[_ClientModel]:
    """Return the replies whose records are named as in most; Flower's strategies need them so."""

    def records(client: _ClientModel) -> str:
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


def _with_arrays(client: _ClientModel, arrays: ArrayRecord) -> Message:
    """Return a copy of a reply that carries other arrays; the reply stays as it is."""
    content = RecordDict(dict(client.reply.content))
    content[client.record_name] = arrays
    remade = copy.copy(client.reply)
    remade.content = content
    return remade


def _like(arrays: ArrayRecord, model: ArrayRecord) -> ArrayRecord:
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
