"""Replies one at a time: a sum instead of all models."""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Strategy,
)
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from numpy.typing import NDArray

from fl_rebasin.flower.replies import ClientModel, have_usual_records
from fl_rebasin.state_dicts import StateDict

MEANS = (FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi)


def takes_only_the_mean(strategy: Strategy) -> bool:
    """Whether a strategy makes of replies what it makes of their weighted mean.

    A subclass of these may look at each reply, and so may an aggregation of metrics of its own.
    """
    return (
        type(strategy) in MEANS
        and cast(FedAvg, strategy).train_metrics_aggr_fn is aggregate_metricrecords
    )


class RunningMean:
    """The weighted mean of the models that were added, in float64.

    Args:
        arrays: the global model, for keys and dtypes.

    Attributes:
        replies: the reply of each node whose model was added, without the model.
    """

    def __init__(self, arrays: ArrayRecord) -> None:
        self.replies: dict[int, Message] = {}
        self._arrays = arrays
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._weight = 0.0

    @property
    def count(self) -> int:
        """How many models were added."""
        return len(self.replies)

    def add(self, client: ClientModel, model: StateDict) -> None:
        """Add a client's model; of its reply only the metrics are kept."""
        for key, value in model.items():
            part = client.weight * value.double().numpy()
            self._sums[key] = self._sums[key] + part if key in self._sums else part
        self._weight += client.weight
        self.replies[client.node] = client.reply

    def finish(self, strategy: Strategy) -> tuple[Message, MetricRecord]:
        """Return one reply that stands for all, and the metrics that a strategy makes of theirs."""
        assert isinstance(strategy, FedAvg)
        replies = list(self.replies.values())
        usual = have_usual_records(replies)
        contents = [reply.content for reply, kept in zip(replies, usual, strict=True) if kept]
        metrics = strategy.train_metrics_aggr_fn(contents, strategy.weighted_by_key)
        record = ArrayRecord()
        for key, like in self._arrays.items():
            mean = self._sums.pop(key) / self._weight
            # Integers stay fractions, as in FedAvg; who takes the result rounds them.
            exact = np.dtype(like.dtype).kind != "f"
            record[key] = Array(np.asarray(mean if exact else mean.astype(like.dtype)))
        # Of the client whose message this was nothing else goes in.
        reply = copy.copy(replies[-1])
        reply.content = RecordDict(
            {"arrays": record, "metrics": MetricRecord({strategy.weighted_by_key: self._weight})}
        )
        return reply, metrics
