"""What changes during a run in strategies and configs, whatever they are: found by comparison."""

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


class Memory:
    """The changes since a run began: only these go into a checkpoint.

    What the user gave and the run did not change is taken from the user again.

    Args:
        strategy: the outermost strategy, before the run.
        configs: the configs of the run by name; Flower hands the same objects to each round, and
            strategies may write into them.
    """

    def __init__(self, strategy: Strategy, configs: dict[str, ConfigRecord]) -> None:
        self.strategies = [type(level).__qualname__ for level in levels(strategy)]
        self._places: list[tuple[str, MutableMapping[str, Any], frozenset[str]]] = [
            *((type(level).__qualname__, vars(level), _passing(level))
              for level in levels(strategy)),
            *((name, config, frozenset()) for name, config in configs.items()),
        ]  # fmt: skip
        self._before = [
            {name: fingerprint(value) for name, value in self._items(index)}
            for index in range(len(self._places))
        ]
        # Kept alive, so that no other object gets the place in memory that tells them apart.
        self._alive = [dict(place) for _, place, _ in self._places]
        self._restored: list[dict[str, Any]] = [{} for _ in self._places]
        self._lost: set[str] = set()

    def changes(self) -> dict[str, Any]:
        """Return what has changed; what a checkpoint cannot hold is named once in the log."""
        values: list[dict[str, Any]] = []
        gone: list[list[str]] = []
        for index, (where, place, _) in enumerate(self._places):
            before, now = self._before[index], dict(self._items(index))
            restored = self._restored[index]
            changed = {
                name: value
                for name, value in now.items()
                if name in restored or before.get(name) != fingerprint(value)
            }
            gone.append([name for name in {**before, **restored} if name not in place])
            values.append({})
            for name, value in changed.items():
                try:
                    encode(value, {}, "")
                except (UnstorableError, RecursionError):
                    self._name_lost(f"{where}.{name} ({type(value).__qualname__})")
                else:
                    values[-1][name] = value
        return {"strategies": self.strategies, "values": values, "gone": gone,
                "lost": sorted(self._lost)}  # fmt: skip

    def restore(self, changes: dict[str, Any]) -> None:
        """Put back what a checkpoint holds.

        Raises:
            ValueError: it is of other strategies.
        """
        if changes["strategies"] != self.strategies:
            raise ValueError(
                f"the checkpoint is of the strategies {' around '.join(changes['strategies'])}, "
                f"these are {' around '.join(self.strategies)}: use the same ones, or another "
                "checkpoint_dir"
            )
        for lost in changes["lost"]:
            self._name_lost(lost)
        for index, (_, place, _) in enumerate(self._places):
            for name in changes["gone"][index]:
                place.pop(name, None)
            for name, value in changes["values"][index].items():
                place[name] = replaced(place.get(name), value)
            # From now on all of it stays in the checkpoints, also what does not change again.
            self._restored[index] = dict(changes["values"][index])
            self._before[index] |= dict.fromkeys(changes["gone"][index], "")

    def _items(self, index: int) -> list[tuple[str, Any]]:
        _, place, passing = self._places[index]
        return [
            (name, value)
            for name, value in place.items()
            if name not in passing
            # Strategies within have places of their own; the grid belongs to the process.
            and not (name == "strategy" and isinstance(value, Strategy))
            and not isinstance(value, Grid)
        ]

    def _name_lost(self, what: str) -> None:
        if what not in self._lost:
            self._lost.add(what)
            log(WARNING, "no checkpoint can hold %s: after a resume it starts anew", what)


def _passing(level: Strategy) -> frozenset[str]:
    return level.of_one_round if isinstance(level, WrappedStrategy) else frozenset()
