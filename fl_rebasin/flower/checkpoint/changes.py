"""Finds what a run changes in its strategies and configs."""

from __future__ import annotations

from collections.abc import MutableMapping
from logging import WARNING
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log

from fl_rebasin.flower.checkpoint.codec import UnstorableError, encode, fingerprint, replaced
from fl_rebasin.flower.wrapper import WrappedStrategy, levels


class _Holder:
    """The attributes of a strategy, or the entries of a config, and how they were at the start.

    Args:
        name: name of the class of the strategy, or of the config.
        values: the attributes or entries themselves, not a copy.
        transient: names to leave out.
    """

    def __init__(
        self, name: str, values: MutableMapping[str, Any], transient: frozenset[str]
    ) -> None:
        self.name = name
        self._values = values
        self._transient = transient
        self._before = {key: fingerprint(value) for key, value in self._items().items()}
        # Fingerprints of unknown objects are their addresses: keep the objects alive, so that no
        # new object gets the address of an old one.
        self._alive = dict(values)
        self._restored: dict[str, Any] = {}

    def changed(self) -> dict[str, Any]:
        """Return the values that have changed since the start, or were restored."""
        return {
            key: value
            for key, value in self._items().items()
            if key in self._restored or self._before.get(key) != fingerprint(value)
        }

    def deleted(self) -> list[str]:
        """Return the names that have disappeared since the start."""
        return [key for key in {**self._before, **self._restored} if key not in self._values]

    def restore(self, values: dict[str, Any], deleted: list[str]) -> None:
        """Set and delete values as a checkpoint says."""
        for key in deleted:
            self._values.pop(key, None)
        for key, value in values.items():
            self._values[key] = replaced(self._values.get(key), value)
        # Later checkpoints must hold all of it, even what does not change again.
        self._restored = dict(values)
        self._before |= dict.fromkeys(deleted, "")

    def _items(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in self._values.items()
            if key not in self._transient
            # A wrapped strategy has a holder of its own, and the grid belongs to the process.
            and not (key == "strategy" and isinstance(value, Strategy))
            and not isinstance(value, Grid)
        }


class RunChanges:
    """Finds what has changed since a run started: checkpoints hold only these values.

    Values that the run did not change come from the user's own arguments when a run resumes.

    Args:
        strategy: the strategy before the run; the strategies that it wraps are included.
        configs: the configs of the run by name. Flower passes the same objects to every round,
            and strategies may write to them.
    """

    def __init__(self, strategy: Strategy, configs: dict[str, ConfigRecord]) -> None:
        self._strategies = [type(level).__qualname__ for level in levels(strategy)]
        self._holders = [
            _Holder(type(level).__qualname__, vars(level), _transient(level))
            for level in levels(strategy)
        ]
        self._holders += [_Holder(name, config, frozenset()) for name, config in configs.items()]
        self._lost: set[str] = set()

    def changes(self) -> dict[str, Any]:
        """Return what has changed; warn once about each value that a checkpoint cannot hold."""
        values = [self._storable(holder) for holder in self._holders]
        return {
            "strategies": self._strategies,
            "values": values,
            "deleted": [holder.deleted() for holder in self._holders],
            "lost": sorted(self._lost),
        }

    def restore(self, changes: dict[str, Any]) -> None:
        """Restore what a checkpoint holds.

        Raises:
            ValueError: the checkpoint belongs to other strategies.
        """
        if changes["strategies"] != self._strategies:
            raise ValueError(
                f"the checkpoint was written with {_nested(changes['strategies'])}, this run uses "
                f"{_nested(self._strategies)}: use the same strategies, or another folder"
            )
        for lost in changes["lost"]:
            self._warn_lost(lost)
        for holder, values, deleted in zip(
            self._holders, changes["values"], changes["deleted"], strict=True
        ):
            holder.restore(values, deleted)

    def _storable(self, holder: _Holder) -> dict[str, Any]:
        """Return a holder's changed values; warn about each one that cannot be stored."""
        values = {}
        for key, value in holder.changed().items():
            try:
                encode(value, {}, "")
            except (UnstorableError, RecursionError):
                self._warn_lost(f"{holder.name}.{key} ({type(value).__qualname__})")
            else:
                values[key] = value
        return values

    def _warn_lost(self, what: str) -> None:
        if what not in self._lost:
            self._lost.add(what)
            log(WARNING, "a checkpoint cannot hold %s: a resumed run starts without it", what)


def _transient(level: Strategy) -> frozenset[str]:
    return level.transient if isinstance(level, WrappedStrategy) else frozenset()


def _nested(names: list[str]) -> str:
    """Return names as nested calls: `Outer(Inner)`."""
    return "(".join(names) + ")" * (len(names) - 1)
