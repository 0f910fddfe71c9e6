"""Run many rounds in which one reply in ten is invalid, and compare with a run without faults.

    python benchmarks/soak.py [--rounds N] [--clients N] [--out DIR]

Trains a small model on scikit-learn's digits twice through Flower's simulation engine, without and
with faults: in each round each client sends, with a probability of 10 %, one of the faults of
`faults.py`. Writes the dropped replies, the server's memory and the accuracies to `soak.json` and
prints a summary. The exit code is 1 unless all rounds were completed and no value was ever NaN or
infinite. With 100 rounds or more it is also 1 if memory grew (the mean of the last quarter of the
rounds is more than 5 % above that of the first quarter) or if the accuracy is more than 1 point
lower.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, cast

for _name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
    os.environ.setdefault(_name, "0")

import numpy as np
import psutil
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from machine import versions
from output import script_parser, write_json
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from fl_rebasin.flower import Limits, ReBasinStrategy, add_rebasin_handlers

CHANCE = 0.1
TEST_IMAGES = 397
LONG = 100
"""Number of rounds from which memory and accuracy are judged."""
LIMITS = Limits(max_update_norm=20.0)
"""Random bytes can be finite numbers of any size, which no other check can tell from weights."""


def build() -> nn.Module:
    """Return the model."""
    return nn.Sequential(
        nn.Linear(64, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def digits() -> tuple[Tensor, Tensor]:
    """Return all images and labels, shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels).long()[order]


def make_client_app(clients: int) -> ClientApp:
    """Return clients that train for one epoch and, if the config asks for it, send faults."""
    app = ClientApp()

    def part(context: Context) -> tuple[Tensor, Tensor]:
        first = TEST_IMAGES + cast(int, context.node_config["partition-id"])
        images, labels = digits()
        return images[first::clients], labels[first::clients]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        config = message.content["config"]
        assert isinstance(config, ConfigRecord)
        arrays = cast(ArrayRecord, message.content["arrays"])
        content = trained(arrays, *part(context))
        number = cast(int, context.node_config["partition-id"])
        rng = np.random.default_rng([number, cast(int, config["server-round"])])
        if config["faults"] and rng.random() < CHANCE:
            content = faulty(content, rng)
        return Message(content, reply_to=message)

    add_rebasin_handlers(app, lambda context: (build(), [part(context)[0]]))
    return app


def trained(arrays: ArrayRecord, images: Tensor, labels: Tensor) -> RecordDict:
    """Train a model for one epoch; return the content of a valid reply."""
    model = build()
    model.load_state_dict(arrays.to_torch_state_dict())
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for chosen in torch.arange(len(labels)).split(16):
        optimiser.zero_grad()
        functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimiser.step()
    metrics = MetricRecord({"num-examples": len(labels)})
    return RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})


def faulty(content: RecordDict, rng: np.random.Generator) -> RecordDict:
    """Return a random fault in place of a valid reply."""
    from faults import FAULTS  # On the worker, which has this folder in its path.

    return list(FAULTS.values())[rng.integers(len(FAULTS))](content, rng)


class DroppedReplies(logging.Handler):
    """Counts the reasons for which replies were dropped or failed."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Count one line of Flower's log."""
        text = record.getMessage()
        if " dropped: " in text:
            self.reasons[text.split(" dropped: ")[1][:50]] += 1
        elif "error in reply" in text:
            self.reasons["the client crashed"] += 1


@contextmanager
def counting_dropped_replies() -> Iterator[Counter[str]]:
    """Count dropped replies; Flower's log does not go to the screen meanwhile."""
    logger = logging.getLogger("flwr")
    handlers, counter = list(logger.handlers), DroppedReplies()
    logger.handlers = [counter]
    try:
        yield counter.reasons
    finally:
        logger.handlers = handlers


@dataclass
class Evaluation:
    """Evaluates the global model after each round.

    Attributes:
        title: Name of the run, for the lines that it prints.
        accuracy: Accuracy of each round, round 0 included.
        memory: Resident memory of the server after each round, in MiB.
    """

    title: str
    accuracy: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        images, labels = digits()
        self._images, self._labels = images[:TEST_IMAGES], labels[:TEST_IMAGES]
        self._model = build().eval()

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Record the accuracy and the memory of a round; exit if the model is not finite."""
        state = arrays.to_torch_state_dict()
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise SystemExit(f"round {server_round}: the model has NaN or infinite values")
        self._model.load_state_dict(state)
        with torch.no_grad():
            correct = self._model(self._images).argmax(1) == self._labels
        self.accuracy.append(float(correct.float().mean()))
        self.memory.append(psutil.Process().memory_info().rss / 2**20)
        if server_round % 10 == 0:
            print(
                f"{self.title}: round {server_round}, accuracy {100 * self.accuracy[-1]:.1f} %, "
                f"{self.memory[-1]:.0f} MiB",
                file=sys.stderr,
            )
        return MetricRecord({"accuracy": self.accuracy[-1]})


def run(clients: int, rounds: int, *, faults: bool) -> dict[str, Any]:
    """Run a federation; return what happened."""
    torch.manual_seed(0)
    evaluation = Evaluation("with faults" if faults else "without faults")
    server_app = ServerApp()
    completed: list[int] = []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = ReBasinStrategy(
            FedAvg(fraction_evaluate=0.0),
            model=build(),
            example_inputs=torch.zeros(2, 64),
            limits=LIMITS,
        )
        result = strategy.start(
            grid,
            ArrayRecord(build().state_dict()),
            num_rounds=rounds,
            train_config=ConfigRecord({"faults": faults}),
            evaluate_fn=evaluation.evaluate,
        )
        completed.extend(result.train_metrics_clientapp)

    started = time.perf_counter()
    with counting_dropped_replies() as dropped:
        run_simulation(
            server_app,
            make_client_app(clients),
            clients,
            backend_config={
                "init_args": {"log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    return {
        "rounds": len(completed),
        "accuracy": evaluation.accuracy[1:],
        "memory": evaluation.memory[1:],
        "dropped": dict(dropped),
        "seconds": time.perf_counter() - started,
    }


def problems(plain: dict[str, Any], faulty: dict[str, Any], rounds: int) -> list[str]:
    """Return what is wrong with the run with faults."""
    found = []
    if faulty["rounds"] != rounds:
        found.append(f"{faulty['rounds']} of {rounds} rounds were completed")
    if not faulty["dropped"]:
        found.append("no reply was dropped: the run tested nothing")
    if rounds >= LONG:
        quarter = rounds // 4
        first, last = mean(faulty["memory"][:quarter]), mean(faulty["memory"][-quarter:])
        if last > 1.05 * first:
            found.append(f"memory grew from {first:.0f} to {last:.0f} MiB")
        if faulty["accuracy"][-1] < plain["accuracy"][-1] - 0.01:
            found.append("the accuracy is more than 1 point lower")
    return found


def print_summary(results: dict[str, Any]) -> None:
    """Print both runs, the reasons for dropped replies, and the problems."""
    rounds = results["rounds"]
    quarter = max(1, rounds // 4)
    for name in ("without faults", "with faults"):
        each = results[name]
        print(
            f"{name}: {each['rounds']} of {rounds} rounds, {results['clients']} clients, "
            f"{sum(each['dropped'].values())} replies dropped or failed, accuracy "
            f"{100 * each['accuracy'][-1]:.1f} %, memory {mean(each['memory'][:quarter]):.0f} -> "
            f"{mean(each['memory'][-quarter:]):.0f} MiB, {each['seconds']:.0f} s"
        )
    dropped = results["with faults"]["dropped"]
    for reason, count in sorted(dropped.items(), key=lambda item: -item[1]):
        print(f"{count:5d}  {reason}")
    for line in results["wrong"]:
        print(f"problem: {line}", file=sys.stderr)


def main() -> int:
    """Run as a program."""
    parser = script_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=200, metavar="N")
    parser.add_argument("--clients", type=int, default=20, metavar="N")
    options = parser.parse_args()
    if options.rounds < 1 or options.clients < 2:
        parser.error("--rounds must be at least 1, --clients at least 2")
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    torch.set_num_threads(1)
    plain = run(options.clients, options.rounds, faults=False)
    faulty = run(options.clients, options.rounds, faults=True)
    results = {
        "rounds": options.rounds,
        "clients": options.clients,
        "chance": CHANCE,
        "without faults": plain,
        "with faults": faulty,
        "wrong": problems(plain, faulty, options.rounds),
        "versions": versions("flwr", "torch", "ray"),
    }
    write_json(options.out / "soak.json", results)
    print_summary(results)
    return 1 if results["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
