"""Aggregation by the wrapped strategy: checks its result, and keeps or restores all its state."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from logging import WARNING
from typing import TypeAlias

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log

from fl_rebasin.flower.replies import all_finite, like_global
from fl_rebasin.flower.wrapper import levels

Aggregate: TypeAlias = tuple[ArrayRecord | None, MetricRecord | None]


def aggregate(
    strategy: Strategy, global_model: ArrayRecord, server_round: int, replies: Iterable[Message]
) -> Aggregate:
    """Let a strategy aggregate; if the result is not finite, restore the strategy's state.

    Args:
        strategy: the strategy.
        global_model: the model before the round, for key order and dtypes.
        server_round: number of the round.
        replies: the clients' replies.

    Returns:
        The model in the keys and dtypes of the global one, None if there is no finite one; and the
        strategy's metrics.

    Raises:
        ValueError: the strategy changed the model's keys.
    """
    # Flower's strategies bind new values to their attributes and do not write into old ones.
    before = [dict(vars(each)) for each in levels(strategy)]
    with np.errstate(over="ignore", invalid="ignore"):  # An overflow is found below.
        arrays, metrics = strategy.aggregate_train(server_round, replies)
    if arrays is None:
        return None, metrics
    arrays = like_global(arrays, global_model)
    if is_usable(arrays, server_round):
        return arrays, metrics
    for each, attributes in zip(levels(strategy), before, strict=True):
        vars(each).clear()
        vars(each).update(attributes)
    return None, metrics


def is_usable(arrays: ArrayRecord, server_round: int) -> bool:
    """Whether a model is finite; log a warning if it is not."""
    usable = all_finite(arrays)
    if not usable:
        log(
            WARNING,
            "round %s: the aggregated model holds NaN or infinite values and is not used",
            server_round,
        )
    return usable


def copy_of(strategy: Strategy, grid: Grid) -> Strategy:
    """Return a copy of a strategy and its state; a grid that it keeps is shared."""
    return copy.deepcopy(strategy, {id(grid): grid})


def check_copyable(strategy: Strategy) -> None:
    """Raise `ValueError` if a strategy cannot be copied."""
    try:
        copy.deepcopy(strategy)
    except Exception as error:
        raise ValueError(
            "the guard needs a wrapped strategy that can be copied, "
            f"{type(strategy).__name__} cannot: {error}"
        ) from error


def adopt(strategy: Strategy, chosen: Strategy, grid: Grid) -> None:
    """Give a strategy, and those it wraps, the state of a copy; they stay the same objects."""
    if chosen is strategy:
        return
    pairs = list(zip(levels(strategy), levels(chosen), strict=True))
    memo = {id(grid): grid, **{id(copied): old for old, copied in pairs}}
    for old, copied in pairs:
        vars(old).update(copy.deepcopy(vars(copied), memo))
