"""A strategy around a strategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy


class WrappedStrategy(Strategy):
    """Leaves everything to another strategy; subclasses change what they are about.

    Args:
        strategy: any Flower strategy; `FedAvg()` by default.

    Attributes:
        of_one_round: names of attributes that `configure_train` sets anew each round, so that no
            checkpoint needs them.
    """

    of_one_round: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, strategy: Strategy | None = None) -> None:
        self.strategy = strategy if strategy is not None else FedAvg()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy."""
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the wrapped strategy."""
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As the wrapped strategy."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """As the wrapped strategy."""
        self.strategy.summary()


def levels(strategy: Strategy) -> list[Strategy]:
    """Return a strategy and those that it wraps, the outermost first."""
    found = [strategy]
    while isinstance(inner := getattr(found[-1], "strategy", None), Strategy):
        found.append(inner)
    return found
