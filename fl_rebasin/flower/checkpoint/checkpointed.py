"""Rounds that leave checkpoints, and go on after the newest one; Flower runs them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from logging import INFO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log

from fl_rebasin.flower.checkpoint.changes import Memory
from fl_rebasin.flower.checkpoint.files import (
    Checkpoint,
    checkpoints_in,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from fl_rebasin.flower.wrapper import WrappedStrategy

EvaluateFn: TypeAlias = Callable[[int, ArrayRecord], MetricRecord | None]


def check_options(folder: str | Path | None, keep: int, resume: bool) -> None:
    """Raise `ValueError` for options that make no sense."""
    if keep < 1:
        raise ValueError(f"keep_checkpoints is {keep}: at least 1 must stay")
    if resume and folder is None:
        raise ValueError("resume=True needs checkpoint_dir, the folder with the checkpoints")


class Checkpointed(WrappedStrategy):
    """Wraps a strategy for one run: writes a checkpoint at the end of each round.

    Flower's own `start` runs the rounds that remain and counts them from 1; the wrapped strategy
    and `evaluate_fn` are told their true numbers.

    Args:
        strategy: the outermost strategy of the run.
        folder: where the checkpoints are; made if it is not there.
        keep: how many of them stay.
        resume: go on after the newest.
    """

    def __init__(self, strategy: Strategy, folder: Path, keep: int, *, resume: bool) -> None:
        super().__init__(strategy)
        self._folder = folder
        self._keep = keep
        self._resume = resume
        self._done = 0
        self._rounds = 0
        self._aggregated = False
        self._model = ArrayRecord()
        self._train: dict[int, MetricRecord] = {}
        self._evaluate: dict[int, MetricRecord] = {}
        self._server: dict[int, MetricRecord] = {}

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
        """Run the rounds that are not done yet.

        Raises:
            ValueError: there are checkpoints and `resume` is off; they are of another
                architecture or of other strategies; or none can be read.
            OSError: a checkpoint cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._resume and (found := checkpoints_in(self._folder)):
            raise ValueError(
                f"{self._folder} holds checkpoints, the newest is {found[-1].name}: use "
                "resume=True to go on after it, or another checkpoint_dir"
            )
        remove_unfinished(self._folder)
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        configs = {"train_config": train_config, "evaluate_config": evaluate_config}
        memory = Memory(self.strategy, configs)
        earlier = newest_checkpoint(self._folder) if self._resume else None
        self._model = initial_arrays
        self._rounds = num_rounds
        if earlier is not None:
            _check_architecture(earlier, initial_arrays)
            memory.restore(earlier.memory["changes"])
            self._model = earlier.arrays
            self._done = earlier.round
            self._aggregated = earlier.aggregated
            self._train |= earlier.train_metrics_clientapp
            self._evaluate |= earlier.evaluate_metrics_clientapp
            self._server |= earlier.evaluate_metrics_serverapp
            _set_random_state(earlier.memory["random"])
            log(INFO, "%s of %s rounds are done: resumed from the checkpoints in %s",
                *(self._done, num_rounds, self._folder))  # fmt: skip
        elif self._resume:
            log(INFO, "no checkpoint in %s: starting at round 1", self._folder)
        if earlier is not None and num_rounds <= self._done:
            return self._result()

        def end_of_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            number = server_round + self._done
            self._model = arrays
            # What a resumed run begins with was evaluated before it broke off.
            if server_round > 0 or self._done == 0:
                metrics = None if evaluate_fn is None else evaluate_fn(number, arrays)
                if metrics is not None:
                    self._server[number] = metrics
            if server_round > 0:
                self._save(number, memory)
            return self._server.get(number)

        super().start(
            grid, self._model, num_rounds - self._done, timeout, train_config, evaluate_config,
            end_of_round,
        )  # fmt: skip
        result = self._result()
        if self._done > 0:
            log(INFO, "Final results of all %s rounds:", num_rounds)
            for line in str(result).splitlines():
                log(INFO, "\t%s", line)
        return result

    def _result(self) -> Result:
        """Return what Flower returns: no model if no round has aggregated one."""
        return Result(
            arrays=self._model if self._aggregated else ArrayRecord(),
            train_metrics_clientapp=self._train,
            evaluate_metrics_clientapp=self._evaluate,
            evaluate_metrics_serverapp=self._server,
        )

    def _save(self, number: int, memory: Memory) -> None:
        changes = memory.changes()
        checkpoint = Checkpoint(
            round=number,
            arrays=self._model,
            aggregated=self._aggregated,
            train_metrics_clientapp=self._train,
            evaluate_metrics_clientapp=self._evaluate,
            evaluate_metrics_serverapp=self._server,
            memory={"changes": changes, "random": _random_state()},
        )
        save_checkpoint(self._folder, checkpoint, self._keep)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy, which is told the true number of the round."""
        number = server_round + self._done
        if self._done > 0:
            log(INFO, "this is round %s of %s", number, self._rounds)
        return super().configure_train(number, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the wrapped strategy, which is told the true number of the round."""
        number = server_round + self._done
        arrays, metrics = super().aggregate_train(number, replies)
        self._aggregated |= arrays is not None
        if metrics is not None:
            self._train[number] = metrics
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the wrapped strategy, which is told the true number of the round."""
        return super().configure_evaluate(server_round + self._done, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As the wrapped strategy, which is told the true number of the round."""
        number = server_round + self._done
        metrics = super().aggregate_evaluate(number, replies)
        if metrics is not None:
            self._evaluate[number] = metrics
        return metrics


def _check_architecture(checkpoint: Checkpoint, initial: ArrayRecord) -> None:
    """Raise `ValueError` unless a checkpoint's model has the keys, shapes and dtypes of another."""

    def described(arrays: ArrayRecord, key: str) -> str:
        if key not in arrays:
            return "missing"
        return f"{np.dtype(arrays[key].dtype)} {tuple(arrays[key].shape)}"

    then = checkpoint.arrays
    for key in dict.fromkeys([*initial, *then]):
        if described(then, key) != described(initial, key):
            raise ValueError(
                f"the checkpoint of round {checkpoint.round} is of another architecture: {key} is "
                f"{described(then, key)} there, {described(initial, key)} in the initial model; "
                "use the model that it was written with, or another checkpoint_dir"
            )
    for key, other in zip(then, initial, strict=True):
        if key != other:
            raise ValueError(
                f"the checkpoint of round {checkpoint.round} is of another architecture: it has "
                f"{key} where the initial model has {other}; use the model that it was written "
                "with, or another checkpoint_dir"
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
