"""A grid that hands over replies one at a time, so that each can be released once it is read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from logging import WARNING
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from fl_rebasin.flower.log_text import reason

POLL_SECONDS = 3.0
"""Pause between two polls for replies if the grid does not set one; Flower's own default."""


class LazyGrid(Grid):
    """Wraps a grid: its replies come as an iterator instead of a list.

    Args:
        grid: the ServerApp's grid.
        lazy: pull each reply only when the caller asks for it. Otherwise receive all of them
            first.
    """

    def __init__(self, grid: Grid, *, lazy: bool) -> None:
        self._grid = grid
        self._lazy = lazy

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send messages, and return an iterator that drops each reply as it yields it."""
        if not self._lazy:
            return _popped(list(self._grid.send_and_receive(messages, timeout=timeout)))
        return self._pulled(list(self._grid.push_messages(messages)), timeout)

    def _pulled(self, message_ids: list[str], timeout: float | None) -> Iterator[Message]:
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            # Checked before the poll: replies that arrived while the caller was busy still count.
            last = time.monotonic() >= end
            for message_id in list(message_ids):
                try:
                    replies = list(self._grid.pull_messages([message_id]))
                except (TypeError, ValueError, LookupError, AssertionError) as error:
                    # Flower raises these for a reply that it cannot parse; the others still can
                    # be pulled.
                    log(WARNING, "a reply is dropped: it cannot be parsed: %s", reason(error))
                    message_ids.remove(message_id)
                    continue
                if replies:
                    message_ids.remove(message_id)
                yield from _popped(replies)
            if not message_ids or last:
                return
            time.sleep(getattr(self._grid, "pull_interval", POLL_SECONDS))

    def set_run(self, *args: Any, **kwargs: Any) -> None:
        """Delegate to the wrapped grid."""
        self._grid.set_run(*args, **kwargs)

    @property
    def run(self) -> Any:
        """The wrapped grid's run."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Delegate to the wrapped grid."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Delegate to the wrapped grid."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Delegate to the wrapped grid."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Delegate to the wrapped grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Delegate to the wrapped grid."""
        return self._grid.pull_messages(message_ids)


def _popped(replies: list[Message]) -> Iterator[Message]:
    """Yield the replies in order, and remove each from the list first."""
    replies.reverse()
    while replies:
        yield replies.pop()
