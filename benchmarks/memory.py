"""How much memory a round takes: replies of ResNet-18, one after the other, in one process.

    python benchmarks/memory.py [--clients N] [--cases CASE ...] [--out DIR]

For each way of aligning, a process of its own aggregates one round of N replies that a grid makes
when it is asked for them, as a server would receive them. The peak of the resident memory over
that before the round is given in models (44.7 MiB each), twice: with glibc as it is, which keeps
part of what is freed for later, and with `MALLOC_MMAP_THRESHOLD_=131072`, with which it gives all
of it back. Clients are the global model with a little noise; `permuted` ones have all their units
shuffled besides.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from machine import versions
from torchvision.models import resnet18

from fl_rebasin import ReBasinStrategy
from fl_rebasin.flower.lazy_grid import LazyGrid

CASES = {
    "FedAvg alone": ("", False),
    "joint, in place": ("joint", False),
    "joint, permuted": ("joint", True),
    "global, in place": ("global", False),
    "global, permuted": ("global", True),
}


ALLOCATORS = {"glibc as it is": {}, "all given back": {"MALLOC_MMAP_THRESHOLD_": "131072"}}


class Mailbox:
    """A grid whose replies come into being when they are received."""

    pull_interval = 0.0

    def __init__(self, state: dict[str, torch.Tensor], strategy: Any, permuted: bool) -> None:
        self.state, self.spec = state, getattr(strategy, "spec", None)
        self.permuted = permuted

    def reply(self, node: int) -> Message:
        """Return the reply of a node."""
        generator = torch.Generator().manual_seed(node)
        state = {
            key: value + 1e-3 * value.std() * torch.randn(value.shape, generator=generator)
            if value.is_floating_point() and value.numel() > 1
            else value
            for key, value in self.state.items()
        }
        if self.permuted and self.spec is not None:
            state = self.spec.apply(self.spec.random(generator), state)
        content = RecordDict(
            {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 10})}
        )
        asked = Message(RecordDict(), dst_node_id=node, message_type="train")
        return Message(content, reply_to=asked)

    def push_messages(self, messages: Iterable[int]) -> list[str]:
        """Take the numbers of nodes for messages."""
        return [str(node) for node in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return replies."""
        return [self.reply(int(each)) for each in message_ids]

    def send_and_receive(self, messages: Iterable[int], *, timeout: float | None) -> list[Message]:
        """Return all replies."""
        return [self.reply(node) for node in messages]

    def get_node_ids(self) -> list[int]:
        """Return the nodes."""
        return [1, 2]


def measure(case: str, clients: int) -> dict[str, float]:
    """Aggregate one round; return seconds and the peak of the memory, in models."""
    align_to, permuted = CASES[case]
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = resnet18()
    strategy: Any = FedAvg()
    if align_to:
        strategy = ReBasinStrategy(
            FedAvg(), model=model, example_inputs=torch.zeros(1, 3, 64, 64),
            recalibrate_batchnorm=False, align_to=align_to,  # type: ignore[arg-type]
        )  # fmt: skip
    state = {key: value.clone() for key, value in model.state_dict().items()}
    size = sum(value.numel() * value.element_size() for value in state.values())
    grid: Any = Mailbox(state, strategy, permuted)
    arrays = ArrayRecord(state)
    list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    strategy._grid = None
    grid.reply(1)
    process, peak, done = psutil.Process(), 0, False
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # What is free already is not counted.
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    nodes: Any = range(1, clients + 1)
    lazy = bool(align_to) and strategy._streams
    replies = LazyGrid(grid, lazy=lazy).send_and_receive(nodes, timeout=1.0)
    result, _ = strategy.aggregate_train(1, replies if align_to else list(replies))
    seconds = time.perf_counter() - started
    done = True
    watcher.join()
    assert result is not None
    return {"seconds": seconds, "models": (peak - before) / size}


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=100, metavar="N")
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "results", metavar="DIR")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
        help=f"some of: {', '.join(CASES)} (default: all); permuted clients take seconds each",
    )  # fmt: skip
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clients < 2:
        parser.error("--clients must be at least 2")
    if options.case:
        print(json.dumps(measure(options.case, options.clients)))
        return
    rows: dict[str, dict[str, Any]] = {}
    for case in options.cases:
        command = [sys.executable, __file__, "--case", case, "--clients", str(options.clients)]
        rows[case] = {}
        for name, environment in ALLOCATORS.items():
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, **environment}
            )
            if done.returncode:
                sys.exit(f"{case}: {done.stderr.strip().splitlines()[-1]}")
            rows[case][name] = json.loads(done.stdout)
            print(
                f"{case:18s} {options.clients} clients, {name}: at most "
                f"{rows[case][name]['models']:6.1f} models, {rows[case][name]['seconds']:6.1f} s"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"clients": options.clients, "rows": rows, "versions": versions("flwr", "torch")}
    path = options.out / f"memory-{options.clients}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
