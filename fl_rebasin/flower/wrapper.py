"""The base class of strategies that wrap another strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, TypeAlias

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

EvaluateFn: TypeAlias = Callable[[int, ArrayRecord], MetricRecord | None]
"""Evaluates the global model on the server: takes the round's number and the model."""


class WrappedStrategy(Strategy):
    """Delegates every method to another strategy; subclasses override what they change.

    Args:
        strategy: any Flower strategy; `FedAvg()` by default.

    Raises:
        TypeError: `strategy` is not an instance of a Flower strategy.

    Attributes:
        transient: names of the attributes that checkpoints leave out, because `__init__` or
            `configure_train` sets them anew.

    Example:
        >>> class Shouting(WrappedStrategy):
        ...     def summary(self):
        ...         print("HELLO")
        >>> Shouting(FedAvg()).summary()
        HELLO
    """

    transient: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, strategy: Strategy | None = None) -> None:
        strategy = FedAvg() if strategy is None else strategy
        if not isinstance(strategy, Strategy):
            raise TypeError(
                f"the wrapped strategy is {strategy!r}: give an instance, such as FedAvg()"
            )
        self.strategy = strategy

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run all rounds as Flower does, on the grid that `grid_for_rounds` returns."""
        return super().start(
            self.grid_for_rounds(grid),
            initial_arrays,
            num_rounds,
            timeout,
            train_config,
            evaluate_config,
            evaluate_fn,
        )

    def grid_for_rounds(self, grid: Grid) -> Grid:
        """Return the grid that sends and receives the messages of the rounds.

        The outermost strategy's `start` calls this once. By default the wrapped strategy decides;
        a strategy that is not a `WrappedStrategy` uses the grid unchanged.

        A subclass that releases each reply once it is read returns a `LazyGrid`. Its replies are
        an iterator, so a strategy that wraps such a subclass must not loop over them twice.
        """
        if isinstance(self.strategy, WrappedStrategy):
            return self.strategy.grid_for_rounds(grid)
        return grid

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Delegate to the wrapped strategy."""
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Delegate to the wrapped strategy."""
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Delegate to the wrapped strategy."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Delegate to the wrapped strategy."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Delegate to the wrapped strategy."""
        self.strategy.summary()


def levels(strategy: Strategy) -> list[Strategy]:
    """Return a strategy and the strategies it wraps, outermost first."""
    found = [strategy]
    while isinstance(inner := getattr(found[-1], "strategy", None), Strategy):
        found.append(inner)
    return found
