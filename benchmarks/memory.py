"""Measure the memory of a round: replies of ResNet-18, received one by one in one process.

    python benchmarks/memory.py [--clients N] [--cases CASE ...] [--out DIR]

For each way of aligning, a separate process aggregates one round of N replies. Its grid creates a
reply when the strategy asks for it, as a server would receive it. The result is the peak of the
resident memory, minus the memory before the round, in models (44.7 MiB each). It is measured twice:
with glibc's default allocator, which keeps some freed memory for later, and with
`MALLOC_MMAP_THRESHOLD_=131072`, with which glibc returns all of it. The clients' models are the
global model with a little noise; in the `permuted` cases all their units are shuffled as well.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import FedAvg
from machine import PeakMemory, timed, versions
from output import script_parser, write_json
from replies import allow_messages, training_reply
from torchvision.models import resnet18

from fl_rebasin import PermutationSpec
from fl_rebasin.flower import ReBasinStrategy, WeightMatching


@dataclass(frozen=True)
class Case:
    """A way of aggregating a round.

    Attributes:
        align: How the strategy aligns; None for plain `FedAvg`.
        permuted: Whether the units of the clients' models are shuffled.
    """

    align: WeightMatching | None
    permuted: bool = False


CASES = {
    "FedAvg alone": Case(None),
    "joint, in place": Case(WeightMatching(to="others")),
    "joint, permuted": Case(WeightMatching(to="others"), permuted=True),
    "global, in place": Case(WeightMatching(to="global")),
    "global, permuted": Case(WeightMatching(to="global"), permuted=True),
}

ALLOCATORS = {
    "default allocator": {},
    "freed memory returned": {"MALLOC_MMAP_THRESHOLD_": "131072"},
}


class Mailbox:
    """A grid that creates each reply when it is pulled; its messages are the numbers of nodes.

    Args:
        state: The global model.
        shuffled: Shuffles the units of the clients' models; None to leave them in place.
    """

    pull_interval = 0.0

    def __init__(self, state: dict[str, torch.Tensor], shuffled: PermutationSpec | None) -> None:
        self._state = state
        self._shuffled = shuffled

    def reply(self, node: int) -> Message:
        """Return the reply of a node."""
        generator = torch.Generator().manual_seed(node)
        state = {
            key: value + 1e-3 * value.std() * torch.randn(value.shape, generator=generator)
            if value.is_floating_point() and value.numel() > 1
            else value
            for key, value in self._state.items()
        }
        if self._shuffled is not None:
            state = self._shuffled.apply(self._shuffled.random(generator), state)
        return training_reply(state, node, 10)

    def push_messages(self, messages: Iterable[int]) -> list[str]:
        """Return the ids of messages."""
        return [str(node) for node in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages."""
        return [self.reply(int(each)) for each in message_ids]

    def send_and_receive(self, messages: Iterable[int], *, timeout: float | None) -> list[Message]:
        """Return all replies."""
        return [self.reply(node) for node in messages]

    def get_node_ids(self) -> list[int]:
        """Return the ids of two nodes, as many as the strategy asks for at least."""
        return [1, 2]


def measure(case: Case, clients: int) -> dict[str, float]:
    """Aggregate one round; return the seconds and the peak of the memory in models."""
    allow_messages()
    torch.manual_seed(0)
    model = resnet18()
    example = torch.zeros(1, 3, 64, 64)
    strategy: Any = FedAvg()
    if case.align is not None:
        strategy = ReBasinStrategy(model=model, example_inputs=example, align=case.align, finish=[])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    size = sum(value.numel() * value.element_size() for value in state.values())
    mailbox = Mailbox(state, strategy.spec if case.permuted else None)
    grid: Any = mailbox
    if case.align is not None:
        grid = strategy.grid_for_rounds(mailbox)
    list(strategy.configure_train(1, ArrayRecord(state), ConfigRecord(), grid))
    mailbox.reply(1)  # Loads the libraries.
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # Memory that is already free must not hide the peak.
    nodes = range(1, clients + 1)

    def aggregate() -> ArrayRecord | None:
        replies = grid.send_and_receive(nodes, timeout=1.0)
        arrays: ArrayRecord | None = strategy.aggregate_train(1, replies)[0]
        return arrays

    with PeakMemory() as memory:
        seconds, arrays = timed(aggregate)
    assert arrays is not None
    return {"seconds": seconds, "models": (memory.peak - memory.start) / size}


def measure_apart(name: str, clients: int, allocator: str) -> dict[str, float]:
    """Measure a case in a separate process."""
    command = [sys.executable, __file__, "--case", name, "--clients", str(clients)]
    environment = {**os.environ, **ALLOCATORS[allocator]}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--clients", type=int, default=100, metavar="N")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        metavar="CASE",
        help=f"any of: {', '.join(CASES)} (default: all); permuted clients take seconds each",
    )
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clients < 2:
        parser.error("--clients must be at least 2")
    return options


def main() -> None:
    """Run as a program."""
    options = parse()
    if options.case:
        print(json.dumps(measure(CASES[options.case], options.clients)))
        return
    rows: dict[str, dict[str, Any]] = {}
    for name in options.cases:
        rows[name] = {}
        for allocator in ALLOCATORS:
            found = measure_apart(name, options.clients, allocator)
            rows[name][allocator] = found
            print(
                f"{name:18s} {options.clients} clients, {allocator}: at most "
                f"{found['models']:6.1f} models, {found['seconds']:6.1f} s"
            )
    results = {"clients": options.clients, "rows": rows, "versions": versions("flwr", "torch")}
    write_json(options.out / f"memory-{options.clients}.json", results)


if __name__ == "__main__":
    main()
