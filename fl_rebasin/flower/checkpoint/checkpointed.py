"""`Checkpointed`: a strategy that writes a checkpoint after each round and can resume a run."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import INFO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log

from fl_rebasin.flower.checkpoint.changes import RunChanges
from fl_rebasin.flower.checkpoint.files import (
    Checkpoint,
    checkpoints_in,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from fl_rebasin.flower.wrapper import EvaluateFn, WrappedStrategy


@dataclass
class _Run:
    """The state of a run between two rounds.

    Attributes:
        num_rounds: number of rounds in the whole run.
        changes: finds what the run changed in the strategies and configs.
        arrays: the global model.
        layout: dtypes and shapes of the initial model.
        done: number of rounds that were done when the run started or resumed.
        aggregated: whether any round so far has aggregated a model.
        train: aggregated training metrics by round.
        evaluate: aggregated evaluation metrics of the clients by round.
        server: metrics that `evaluate_fn` returned, by round.
    """

    num_rounds: int
    changes: RunChanges
    arrays: ArrayRecord
    layout: dict[str, str]
    done: int = 0
    aggregated: bool = False
    train: dict[int, MetricRecord] = field(default_factory=dict)
    evaluate: dict[int, MetricRecord] = field(default_factory=dict)
    server: dict[int, MetricRecord] = field(default_factory=dict)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: the checkpoint belongs to another architecture or to other strategies.
        """
        _check_architecture(checkpoint.state["layout"], self.layout, checkpoint.round)
        self.changes.restore(checkpoint.state["changes"])
        _set_random_state(checkpoint.state["random"])
        self.arrays = checkpoint.arrays
        self.done = checkpoint.round
        self.aggregated = checkpoint.aggregated
        self.train = checkpoint.train_metrics_clientapp
        self.evaluate = checkpoint.evaluate_metrics_clientapp
        self.server = checkpoint.evaluate_metrics_serverapp

    def checkpoint(self, number: int) -> Checkpoint:
        """Return the checkpoint of a round."""
        changes = self.changes.changes()
        return Checkpoint(
            round=number,
            arrays=self.arrays,
            aggregated=self.aggregated,
            train_metrics_clientapp=self.train,
            evaluate_metrics_clientapp=self.evaluate,
            evaluate_metrics_serverapp=self.server,
            state={"changes": changes, "random": _random_state(), "layout": self.layout},
        )

    def result(self) -> Result:
        """Return what Flower returns: no model if no round has aggregated one."""
        return Result(
            arrays=self.arrays if self.aggregated else ArrayRecord(),
            train_metrics_clientapp=self.train,
            evaluate_metrics_clientapp=self.evaluate,
            evaluate_metrics_serverapp=self.server,
        )


class Checkpointed(WrappedStrategy):
    """Writes a checkpoint after each round, and resumes a run that was interrupted.

    Wrap the outermost strategy: `Checkpointed(strategy, folder).start(...)` runs as
    `strategy.start(...)` does. A resumed run returns the same result as an uninterrupted one, bit
    for bit.

    A checkpoint holds the global model, the metrics, whatever the run changed in the strategies
    and configs, and the random state of `random`, NumPy and PyTorch on the CPU. It does not hold
    what clients store. The log names every value that a checkpoint cannot hold.

    Flower's own `start` runs the remaining rounds and numbers them from 1; the wrapped strategy's
    `start` is not called. The wrapped strategy and `evaluate_fn` get the round's number in the
    whole run.

    Args:
        strategy: any Flower strategy.
        folder: where the checkpoints are; created if it does not exist.
        keep: number of checkpoints to keep, the newest ones.
        resume: continue after the newest checkpoint that can be read; start at round 1 if there
            is none.

    Raises:
        ValueError: `keep` is not an int of at least 1, or `folder` is a file.

    Example:
        >>> from flwr.serverapp.strategy import FedAdam
        >>> strategy = Checkpointed(FedAdam(), "checkpoints", resume=True)
        >>> # In the ServerApp: result = strategy.start(grid, initial_arrays, num_rounds=10)
    """

    def __init__(
        self, strategy: Strategy, folder: str | Path, *, keep: int = 3, resume: bool = False
    ) -> None:
        super().__init__(strategy)
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise ValueError(
                f"keep must be an int of at least 1, got {keep!r}: it is the number of "
                "checkpoints to keep"
            )
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file: give a folder for the checkpoints")
        self.keep = keep
        self.resume = resume
        self._run: _Run | None = None

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
        """Run the remaining rounds.

        Raises:
            ValueError: the folder holds checkpoints and `resume` is off; or its checkpoints
                cannot be read, or belong to another architecture or to other strategies.
            OSError: a checkpoint cannot be written.
        """
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        configs = {"train_config": train_config, "evaluate_config": evaluate_config}
        earlier = self._earlier()
        changes = RunChanges(self.strategy, configs)
        run = _Run(num_rounds, changes, initial_arrays, _layout(initial_arrays))
        if earlier is not None:
            run.restore(earlier)
            log(
                INFO,
                "%s of %s rounds are done: resumed from the checkpoints in %s",
                run.done,
                num_rounds,
                self.folder,
            )
            if num_rounds <= run.done:
                return run.result()
        self._run = run
        try:
            super().start(
                grid,
                run.arrays,
                num_rounds - run.done,
                timeout,
                train_config,
                evaluate_config,
                lambda number, arrays: self._end_round(number, arrays, evaluate_fn),
            )
        finally:
            self._run = None
        result = run.result()
        if run.done > 0:
            log(INFO, "Final results of all %s rounds:", num_rounds)
            for line in str(result).splitlines():
                log(INFO, "\t%s", line)
        return result

    def _earlier(self) -> Checkpoint | None:
        """Prepare the folder; return the checkpoint to resume from, if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoints_in(self.folder)
        if found and not self.resume:
            raise ValueError(
                f"{self.folder} already holds checkpoints, the newest is {found[-1].name}: use "
                "Checkpointed(..., resume=True) to continue after it, or another folder"
            )
        remove_unfinished(self.folder)
        if self.resume and not found:
            log(INFO, "no checkpoint in %s: starting at round 1", self.folder)
        return newest_checkpoint(self.folder) if self.resume else None

    def _end_round(
        self, server_round: int, arrays: ArrayRecord, evaluate_fn: EvaluateFn | None
    ) -> MetricRecord | None:
        """Evaluate the model on the server, then write the checkpoint of the round.

        Flower calls this after each round, and with round 0 before the first one.
        """
        run = self._running()
        number = server_round + run.done
        run.arrays = arrays
        # The model that a resumed run starts from was evaluated before the interruption.
        if evaluate_fn is not None and (server_round > 0 or run.done == 0):
            metrics = evaluate_fn(number, arrays)
            if metrics is not None:
                run.server[number] = metrics
        if server_round > 0:
            save_checkpoint(self.folder, run.checkpoint(number), self.keep)
        return run.server.get(number)

    def _running(self) -> _Run:
        if self._run is None:
            raise ValueError(
                "Checkpointed writes checkpoints only when its own start() runs the rounds: make "
                "it the outermost strategy"
            )
        return self._run

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Delegate to the wrapped strategy with the round's number in the whole run.

        Raises:
            ValueError: another strategy's `start` runs the rounds.
        """
        run = self._running()
        number = server_round + run.done
        if run.done > 0:
            log(INFO, "this is round %s of %s", number, run.num_rounds)
        return super().configure_train(number, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Delegate to the wrapped strategy with the round's number in the whole run."""
        run = self._running()
        number = server_round + run.done
        arrays, metrics = super().aggregate_train(number, replies)
        run.aggregated |= arrays is not None
        if metrics is not None:
            run.train[number] = metrics
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Delegate to the wrapped strategy with the round's number in the whole run."""
        return super().configure_evaluate(server_round + self._running().done, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Delegate to the wrapped strategy with the round's number in the whole run."""
        run = self._running()
        number = server_round + run.done
        metrics = super().aggregate_evaluate(number, replies)
        if metrics is not None:
            run.evaluate[number] = metrics
        return metrics


def _layout(arrays: ArrayRecord) -> dict[str, str]:
    """Return the dtype and shape of each array of a model, in the model's key order."""
    return {key: f"{np.dtype(each.dtype)} {tuple(each.shape)}" for key, each in arrays.items()}


def _check_architecture(saved: dict[str, str], initial: dict[str, str], number: int) -> None:
    """Raise `ValueError` unless two layouts are equal.

    Args:
        saved: layout of the initial model of the run that wrote the checkpoint. The layout of the
            checkpoint's model may differ: some strategies change dtypes.
        initial: layout of the initial model of this run.
        number: round of the checkpoint.
    """
    problem = f"the checkpoint of round {number} belongs to another architecture"
    remedy = "use the model that it was written with, or another folder"
    for key in {**initial, **saved}:
        there, here = saved.get(key, "missing"), initial.get(key, "missing")
        if there != here:
            raise ValueError(
                f"{problem}: {key} is {there} in the checkpoint, {here} in the initial model; "
                f"{remedy}"
            )
    for there, here in zip(saved, initial, strict=True):
        if there != here:
            raise ValueError(
                f"{problem}: it has {there} where the initial model has {here}; {remedy}"
            )


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
