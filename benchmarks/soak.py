"""Many rounds in which every tenth reply is broken: does the run go on, and is it worth as much?

    python benchmarks/soak.py [--rounds N] [--clients N] [--out DIR]

Runs a small model on scikit-learn's digits through Flower's simulation engine twice, without and
with faults: in each round each client sends, with a chance of 10 %, one of the faults of
`faults.py`. Writes what was dropped, the server's memory and the accuracies to `soak.json` and
prints them; the exit code is 1 unless all rounds were completed, no value was ever NaN or
infinite, and, over 100 rounds or more, memory stayed flat (the mean of the last quarter of the
rounds within 5 % of that of the first) and the accuracy within 1 point.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
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
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from fl_rebasin import ReBasinStrategy
from fl_rebasin.flower import add_rebasin_handlers

CHANCE = 0.1
TEST_IMAGES = 397
LONG = 100
MAX_UPDATE_NORM = 20.0
"""Some spoilt bytes are finite numbers of any size, which no other check can tell from weights."""


def build() -> nn.Module:
    """Return the model."""
    return nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    """Return all images and labels, shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels).long()[order]


def make_client_app(clients: int) -> ClientApp:
    """Return clients that train an epoch, and send what they are told to send."""
    app = ClientApp()

    def part(context: Context) -> tuple[Tensor, Tensor]:
        place = TEST_IMAGES + cast(int, context.node_config["partition-id"])
        images, labels = digits()
        return images[place::clients], labels[place::clients]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from faults import FAULTS  # a module of this folder, on the worker

        torch.set_num_threads(1)
        config = message.content["config"]
        assert isinstance(config, ConfigRecord)
        images, labels = part(context)
        model = build()
        model.load_state_dict(cast(ArrayRecord, message.content["arrays"]).to_torch_state_dict())
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for chosen in torch.arange(len(labels)).split(16):
            optimiser.zero_grad()
            functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimiser.step()
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": len(labels)}),
            }
        )
        number = cast(int, context.node_config["partition-id"])
        rng = np.random.default_rng([number, cast(int, config["server-round"])])
        if config["faults"] and rng.random() < CHANCE:
            content = list(FAULTS.values())[rng.integers(len(FAULTS))](content, rng)
        return Message(content, reply_to=message)

    add_rebasin_handlers(app, lambda context: (build(), [part(context)[0]]))
    return app


def run(clients: int, rounds: int, *, faults: bool) -> dict[str, Any]:
    """Run a federation; return what happened."""
    images, labels = digits()
    images, labels = images[:TEST_IMAGES], labels[:TEST_IMAGES]
    torch.manual_seed(0)
    memory: list[float] = []
    accuracy: list[float] = []
    model = build()
    dropped: Counter[str] = Counter()

    class Reasons(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if " dropped: " in text:
                dropped[text.split(" dropped: ")[1][:50]] += 1
            elif "error in reply" in text:
                dropped["the client crashed"] += 1

    log = logging.getLogger("flwr")
    handlers, handler = list(log.handlers), Reasons()
    for each in handlers:
        log.removeHandler(each)
    log.addHandler(handler)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        state = arrays.to_torch_state_dict()
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise SystemExit(f"round {server_round}: the model holds NaN or infinite values")
        model.load_state_dict(state)
        with torch.no_grad():
            accuracy.append(float((model.eval()(images).argmax(1) == labels).float().mean()))
        memory.append(psutil.Process().memory_info().rss / 2**20)
        if server_round % 10 == 0:
            print(
                f"faults {'on' if faults else 'off'}: round {server_round} of {rounds}, accuracy "
                f"{100 * accuracy[-1]:.1f} %, {memory[-1]:.0f} MiB",
                file=sys.stderr,
            )
        return MetricRecord({"accuracy": accuracy[-1]})

    server_app = ServerApp()
    completed: list[int] = []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = ReBasinStrategy(
            FedAvg(fraction_evaluate=0.0), model=build(), example_inputs=torch.zeros(2, 64),
            max_update_norm=MAX_UPDATE_NORM,
        )  # fmt: skip
        result = strategy.start(
            grid, ArrayRecord(build().state_dict()), num_rounds=rounds,
            train_config=ConfigRecord({"faults": faults}), evaluate_fn=evaluate,
        )  # fmt: skip
        completed.extend(result.train_metrics_clientapp)

    started = time.perf_counter()
    try:
        run_simulation(
            server_app, make_client_app(clients), clients,
            backend_config={
                "init_args": {"log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )  # fmt: skip
    finally:
        log.removeHandler(handler)
        for each in handlers:
            log.addHandler(each)
    return {
        "rounds": len(completed),
        "accuracy": accuracy[1:],
        "memory": memory[1:],
        "dropped": dict(dropped),
        "seconds": time.perf_counter() - started,
    }


def judge(plain: dict[str, Any], faulty: dict[str, Any], rounds: int) -> list[str]:
    """Return what is not as it should be."""
    wrong = []
    if faulty["rounds"] != rounds:
        wrong.append(f"{faulty['rounds']} of {rounds} rounds were completed")
    if not faulty["dropped"]:
        wrong.append("no fault was dropped: nothing was tried")
    if rounds >= LONG:
        quarter = rounds // 4
        first, last = mean(faulty["memory"][:quarter]), mean(faulty["memory"][-quarter:])
        if last > 1.05 * first:
            wrong.append(f"memory grew from {first:.0f} to {last:.0f} MiB")
        if faulty["accuracy"][-1] < plain["accuracy"][-1] - 0.01:
            wrong.append("the accuracy is more than 1 point lower")
    return wrong


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200, metavar="N")
    parser.add_argument("--clients", type=int, default=20, metavar="N")
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "results", metavar="DIR")
    options = parser.parse_args()
    if options.rounds < 1 or options.clients < 2:
        parser.error("--rounds must be at least 1, --clients at least 2")
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    torch.set_num_threads(1)
    plain = run(options.clients, options.rounds, faults=False)
    faulty = run(options.clients, options.rounds, faults=True)
    wrong = judge(plain, faulty, options.rounds)
    results = {
        "rounds": options.rounds, "clients": options.clients, "chance": CHANCE,
        "without faults": plain, "with faults": faulty, "wrong": wrong,
        "versions": versions("flwr", "torch", "ray"),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.json").write_text(json.dumps(results, indent=1) + "\n")
    quarter = max(1, options.rounds // 4)
    for name, each in (("without faults", plain), ("with faults", faulty)):
        print(
            f"{name}: {each['rounds']} of {options.rounds} rounds, {options.clients} clients, "
            f"{sum(each['dropped'].values())} replies dropped or failed, accuracy "
            f"{100 * each['accuracy'][-1]:.1f} %, memory {mean(each['memory'][:quarter]):.0f} -> "
            f"{mean(each['memory'][-quarter:]):.0f} MiB, {each['seconds']:.0f} s"
        )
    for reason, count in sorted(faulty["dropped"].items(), key=lambda item: -item[1]):
        print(f"{count:5d}  {reason}")
    for line in wrong:
        print(f"not as it should be: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
