"""Aggregates replies one at a time: keeps a running sum instead of all models."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from logging import INFO
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
from flwr.supercore import log
from numpy.typing import NDArray

from fl_rebasin.flower.replies import ClientModel, Inbox, have_usual_records
from fl_rebasin.flower.round import Round
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.spec import Permutation

MEAN_STRATEGIES = (FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi)
"""Flower's strategies that compute their result from the weighted mean of the replies alone."""


def needs_only_the_mean(strategy: Strategy) -> bool:
    """Return whether a strategy needs only the weighted mean of the replies.

    Subclasses do not qualify, and neither do strategies with their own aggregation of metrics:
    both may look at each reply.
    """
    return (
        type(strategy) in MEAN_STRATEGIES
        and cast(FedAvg, strategy).train_metrics_aggr_fn is aggregate_metricrecords
    )


class RunningMean:
    """The weighted mean of the models added so far, in float64.

    `mean = sum_i weight_i model_i / sum_i weight_i`, McMahan et al., Communication-Efficient
    Learning of Deep Networks from Decentralized Data (AISTATS 2017), Algorithm 1.

    Args:
        arrays: the global model, for keys and dtypes.

    Attributes:
        replies: the reply of each node whose model was added, without the model.
        weights: the weight of each of these nodes.
    """

    def __init__(self, arrays: ArrayRecord) -> None:
        self.replies: dict[int, Message] = {}
        self.weights: dict[int, float] = {}
        self._arrays = arrays
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._weight = 0.0

    @property
    def count(self) -> int:
        """Number of models added."""
        return len(self.replies)

    def add(self, client: ClientModel, model: StateDict) -> None:
        """Add a client's model, and keep only the metrics of its reply."""
        for key, value in model.items():
            part = client.weight * value.double().numpy()
            self._sums[key] = self._sums[key] + part if key in self._sums else part
        self._weight += client.weight
        self.replies[client.node] = client.reply
        self.weights[client.node] = client.weight

    def finish(self, strategy: Strategy) -> tuple[Message, MetricRecord]:
        """Return one reply with the mean, and the metrics that a strategy aggregates from all."""
        assert isinstance(strategy, FedAvg)
        replies = list(self.replies.values())
        usual = have_usual_records(replies, what="metrics")
        contents = [reply.content for reply, kept in zip(replies, usual, strict=True) if kept]
        metrics = strategy.train_metrics_aggr_fn(contents, strategy.weighted_by_key)
        record = ArrayRecord()
        for key, like in self._arrays.items():
            mean = self._sums.pop(key) / self._weight
            # The means of integers stay fractions, as in FedAvg; `like_global` rounds the result.
            exact = np.dtype(like.dtype).kind != "f"
            record[key] = Array(np.asarray(mean if exact else mean.astype(like.dtype)))
        # Only the metadata of this client's message is used.
        reply = copy.copy(replies[-1])
        reply.content = RecordDict(
            {"arrays": record, "metrics": MetricRecord({strategy.weighted_by_key: self._weight})}
        )
        return reply, metrics


def sum_one_by_one(
    current: Round,
    inbox: Inbox,
    replies: Iterable[Message],
    align_one: Callable[[Round, ClientModel], Permutation],
    is_near: Callable[[ClientModel, Permutation], bool],
) -> tuple[RunningMean, dict[str, float | int]]:
    """Align each reply as it arrives, and add it up; one client's model exists at a time.

    Args:
        current: the round.
        inbox: reads the replies.
        replies: the replies, which may arrive one by one.
        align_one: returns the permutation of a model.
        is_near: whether an aligned model is within the limits.

    Returns:
        The mean of the aligned models, and the round's metrics.
    """
    started = time.perf_counter()
    mean = RunningMean(current.arrays)
    units = 0
    for client in inbox.read(replies):
        permutation = align_one(current, client)
        if inbox.kept([client], [is_near(client, permutation)]):
            mean.add(client, current.spec.apply(permutation, client.state_dict))
            units += permutation.moved
        del client  # Before the next one is read.
    seconds = time.perf_counter() - started
    log(INFO, "aligned %s models one by one: %s units moved, %.2f s", mean.count, units, seconds)
    return mean, {
        "rebasin-units-moved": units,
        "rebasin-seconds": seconds,
        "rebasin-dropped": inbox.dropped,
    }
