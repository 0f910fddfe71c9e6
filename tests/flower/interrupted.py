"""A small federation that always does the same, and a script that kills its runs.

`python interrupted.py FOLDER ROUNDS CALLS RANDOM` starts a run with checkpoints again and again.
The run kills itself with SIGKILL: at chosen moments of writing (in the first CALLS calls of each
function that writes), then at RANDOM random moments. Once a run completes, its result is in
`FOLDER/result.json`, and the script prints the folder's file names after each death.
"""

from __future__ import annotations

import builtins
import copy
import gc
import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from federation import Federation, tensors
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, Result, Strategy
from flwr.supercore.task_identity import TaskIdentity
from helpers import nearby
from torch import nn

from fl_rebasin.flower import Checkpointed, ReBasinStrategy

NODES = range(1, 5)
MOST_EVENTS = 150_000
"""Function calls and returns in slightly more than one round."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


@cache
def template() -> ReBasinStrategy:
    return ReBasinStrategy(model=net(), example_inputs=torch.zeros(2, 3), finish=[])


def aligned(
    inner: Strategy, folder: Path | None = None, *, keep: int = 3, resume: bool = False
) -> Strategy:
    """A new `ReBasinStrategy`, with checkpoints if there is a folder; the spec is derived once."""
    strategy = copy.copy(template())
    strategy.strategy = inner
    if folder is None:
        return strategy
    return Checkpointed(strategy, folder, keep=keep, resume=resume)


def client(node: int) -> Callable[[Message, Context], Message]:
    """A client whose replies depend only on the model, the round and the config."""

    def answer(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        spec, seed = template().spec, 100 * config["server-round"] + node
        metrics = {"num-examples": node, "loss": math.sin(seed), "norm_bit": seed % 2}
        state = tensors(message.content.array_records["arrays"])
        if message.metadata.message_type != "train":
            metrics["weight"] = float(state["0.weight"].double().sum())
            return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
        trained = nearby(state, seed, scale=config.get("lr", 0.01))
        if seed % 3 == 0:
            generator = torch.Generator().manual_seed(seed)
            trained = spec.apply(spec.random(generator), trained)
        content = {"arrays": ArrayRecord(trained), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    return answer


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
    """Metrics that depend on the model and on all random states."""
    if server_round == 2:
        return None
    return MetricRecord(
        {
            "round": server_round,
            "norm": float(tensors(arrays)["3.weight"].double().norm()),
            "drawn": [random.random(), random.gauss(), float(np.random.normal())],
            "also-drawn": np.float64(torch.rand(()).item()),
            "odd": [math.nan, math.inf, -math.inf, -0.0],
            "count": 2**62 + server_round,
        }
    )


def run(strategy: Strategy, rounds: int, world: Federation | None = None, seed: int = 7) -> Result:
    """Run a strategy from the usual model, with seeded random states."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    world = Federation({node: client(node) for node in NODES}) if world is None else world
    initial = ArrayRecord(template().model.state_dict())
    config = ConfigRecord({"lr": 0.01})
    return strategy.start(world.grid, initial, rounds, train_config=config, evaluate_fn=evaluate)


def timeless(metrics: dict[int, MetricRecord]) -> list[Any]:
    """All metrics except times, as text, in which NaN equals NaN."""
    return [
        (number, [(key, repr(value)) for key, value in record.items() if "seconds" not in key])
        for number, record in metrics.items()
    ]


def everything(result: Result) -> list[Any]:
    """The result of a run and the random states after it, as text: equal only bit for bit."""
    numpy_state = np.random.get_state()
    return [
        [(key, a.dtype, list(a.shape), a.data.hex()) for key, a in result.arrays.items()],
        timeless(result.train_metrics_clientapp),
        timeless(result.evaluate_metrics_clientapp),
        timeless(result.evaluate_metrics_serverapp),
        repr(random.getstate()),
        repr([part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state]),
        torch.get_rng_state().tolist(),
    ]


def resumable(folder: Path, rounds: int) -> Result:
    """Run or resume the run of the script."""
    return run(aligned(FedAdam(fraction_train=0.5), folder, resume=True, keep=2), rounds)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _deadly(function: Callable[..., Any], calls: int, after: bool) -> Callable[..., Any]:
    """Kill the process in a later call of a function, before or after the call does its work."""
    counted = iter(range(calls))

    def call(*args: Any, **options: Any) -> Any:
        last = next(counted, None) is None
        if last and not after:
            _die()
        value = function(*args, **options)
        if last:
            _die()
        return value

    return call


def _half_written(calls: int) -> None:
    """Kill the process when half of a file is written."""
    counted = iter(range(calls))
    true_open = builtins.open

    def half_open(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = true_open(path, mode, *args, **options)
        if mode == "wb" and next(counted, None) is None:
            write = file.write

            class Half:
                def __enter__(self) -> Half:
                    return self

                def __exit__(self, *error: object) -> None: ...

                def write(self, data: bytes) -> None:
                    write(data[: len(data) // 2])
                    file.flush()
                    _die()

            return Half()
        return file

    builtins.open = half_open  # type: ignore[assignment]


def _anywhere(events: int) -> None:
    """Kill the process after a number of profiler events: no clock, so it always does the same."""
    counted = iter(range(events))

    def each(*event: object) -> None:
        if next(counted, None) is None:
            _die()

    sys.setprofile(each)


def _faults(most_calls: int, random_deaths: int) -> Iterator[Callable[[], None]]:
    """Functions that prepare a run to die: first while it writes, then anywhere."""

    def dying(name: str, calls: int, after: bool) -> Callable[[], None]:
        return lambda: setattr(os, name, _deadly(getattr(os, name), calls, after))

    for calls in range(most_calls):
        yield partial(_half_written, calls)
        for name in ("fsync", "replace", "unlink"):
            yield dying(name, calls, after=False)
            yield dying(name, calls, after=True)
    rng = random.Random(1)
    for _ in range(random_deaths):
        yield partial(_anywhere, rng.randrange(MOST_EVENTS))


def _child(folder: Path, rounds: int, fault: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        fault()
        result = resumable(folder, rounds)
        with open(folder / "result.json", "w") as file:
            json.dump(everything(result), file)
        os._exit(0)
    return pid


def main(folder: Path, rounds: int, most_calls: int, random_deaths: int) -> None:
    torch.set_num_threads(1)
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    template()
    gc.freeze()
    deaths: list[str] = []
    faults = _faults(most_calls, random_deaths)
    while True:
        pid = _child(folder, rounds, next(faults, lambda: None))
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the run failed"
            break
        deaths.append(" ".join(sorted(path.name for path in folder.iterdir())))
    sys.stdout.write(json.dumps(deaths))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
