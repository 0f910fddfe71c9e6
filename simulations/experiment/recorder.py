"""A strategy that only watches another one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fl_rebasin.flower import WrappedStrategy

ModelState = dict[str, Tensor]


def client_number(reply: Message) -> int:
    """Return the number of the client that a reply comes from."""
    return cast(int, reply.content.config_records["client"]["number"])


class Recorder(WrappedStrategy):
    """Wraps a strategy and keeps what goes in and out of its aggregation.

    Attributes:
        replies: The good replies of the last round, by client number, so that a run does not
            depend on the order in which they come in.
        failures: Reasons of the last round's failed clients.
        arrays: What the wrapped strategy made of the replies.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self.replies: list[Message] = []
        self.failures: list[str] = []
        self.arrays: ArrayRecord | None = None

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the wrapped strategy; replies and result are kept."""
        replies = list(replies)
        self.failures = [
            str(reply.error.reason).strip().splitlines()[-1]
            for reply in replies
            if reply.has_error()
        ]
        self.replies = sorted(
            (reply for reply in replies if not reply.has_error()), key=client_number
        )
        self.arrays, metrics = super().aggregate_train(server_round, self.replies)
        return self.arrays, metrics

    def models(self) -> list[ModelState]:
        """Return the models of the last round's replies."""
        return [
            dict(next(iter(reply.content.array_records.values())).to_torch_state_dict())
            for reply in self.replies
        ]
