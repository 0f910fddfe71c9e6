"""A strategy that wraps another one and records its rounds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor

from fl_rebasin.flower import WrappedStrategy

ModelState = dict[str, Tensor]


def client_number(reply: Message) -> int:
    """Return the number of the client that sent a reply."""
    return cast(int, reply.content.config_records["client"]["number"])


class OneClient(FedAvg):
    """Returns the model of one client instead of the average.

    Args:
        client: The client's number.
    """

    def __init__(self, client: int) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.client = client

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the reply of one client only."""
        own = [reply for reply in replies if client_number(reply) == self.client]
        return super().aggregate_train(server_round, own)


class InitialModel(FedAvg):
    """Returns the model that the round started from instead of the average."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0)
        self._initial = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Keep the global model."""
        self._initial = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the metrics only."""
        _, metrics = super().aggregate_train(server_round, replies)
        return self._initial, metrics


class Recorder(WrappedStrategy):
    """Wraps a strategy and keeps the replies and the result of its last round.

    Attributes:
        replies: The replies without errors, sorted by client number, so that the results do not
            depend on the order of arrival.
        failures: Why the other clients failed.
        arrays: The aggregated model.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self.replies: list[Message] = []
        self.failures: list[str] = []
        self.arrays: ArrayRecord | None = None

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate with the wrapped strategy; record the replies and the result."""
        received = list(replies)
        self.failures = [
            str(reply.error.reason).strip().splitlines()[-1]
            for reply in received
            if reply.has_error()
        ]
        self.replies = sorted(
            (reply for reply in received if not reply.has_error()), key=client_number
        )
        self.arrays, metrics = super().aggregate_train(server_round, self.replies)
        return self.arrays, metrics

    def models(self) -> list[ModelState]:
        """Return the models of the recorded replies."""
        return [
            dict(next(iter(reply.content.array_records.values())).to_torch_state_dict())
            for reply in self.replies
        ]
