"""Time the alignment of N models against the textbook's MergeMany, and a round against FedAvg's.

    python benchmarks/merging.py [--repeats R] [--data-dir DIR] [--only TASK] [--out DIR]

With --data-dir the MNIST nets are trained first; without it, their task is skipped. The textbook
runs once. Results are written to `merging.json` and `merging.md`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args

import textbook
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import FedAvg
from machine import timed, versions
from matching import cosine
from nets import NETS, State, state_of
from output import markdown_table, read_json, report, script_parser, versions_line, write_json
from replies import Nodes, allow_messages, training_reply
from torchvision.models import resnet18

from fl_rebasin import Permutation, PermutationSpec, derive_spec
from fl_rebasin.flower import ReBasinStrategy
from fl_rebasin.matching.many import Method, align_many

PACKAGES = ("flwr", "torch", "lapx", "numpy", "scipy")
TASKS = {"MLP 3x512, trained": ("MLP 3x512", 5, True), "ResNet-20 x4": ("ResNet-20 x4", 10, False)}
"""For each task: the net, the number of models, whether they are trained."""
ROUND = "round of ResNet-18, already aligned"
BASELINES = ("textbook, as in the paper", "FedAvg")
CLIENTS = 10
NOISE = 0.02
"""Deviation of a client's weights from the global model's, relative to that tensor's own."""


def similarity(
    spec: PermutationSpec, models: list[State], permutations: list[Permutation]
) -> float:
    """Return the mean cosine of all pairs of permuted models."""
    moved = [spec.apply(*pair) for pair in zip(permutations, models, strict=True)]
    pairs = list(itertools.combinations(moved, 2))
    return sum(cosine(spec, left, right) for left, right in pairs) / len(pairs)


def merge(task: str, data: Path | None, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each method."""
    name, count, _ = TASKS[task]
    torch.set_num_threads(2)
    models = [state_of(name, seed, data) for seed in range(count)]
    spec = derive_spec(NETS[name].build(), torch.zeros(NETS[name].shape))
    torch.set_num_threads(1)
    rows = []

    def add_row(method: str, seconds: list[float], permutations: list[Permutation]) -> None:
        print(f"{task}, {method}: {seconds[0]:.2f} s", file=sys.stderr)
        found = similarity(spec, models, permutations)
        row = {"work": task, "models": count, "method": method}
        rows.append({**row, "seconds": seconds, "similarity": found})

    for method in get_args(Method):
        runs = [timed(partial(align_many, spec, models, method=method)) for _ in range(repeats)]
        add_row(method, [seconds for seconds, _ in runs], list(runs[0][1].permutations))
    learnable = [{key: state[key] for key in spec.learnable} for state in models]
    generator = torch.Generator().manual_seed(0)
    seconds, (found, _) = timed(partial(textbook.merge_many, spec, learnable, generator))
    add_row("textbook, as in the paper", [seconds], found)
    return rows


def noisy_replies(state: State) -> list[Message]:
    """Return the replies of clients whose models differ from the global one by a little noise."""
    replies = []
    for node in range(1, CLIENTS + 1):
        generator = torch.Generator().manual_seed(node)
        own = {
            key: value + NOISE * value.std() * torch.randn(value.shape, generator=generator)
            if value.ndim > 1
            else value
            for key, value in state.items()
        }
        replies.append(training_reply(own, node, 10 * node))
    return replies


def round_of_aligned_clients(repeats: int) -> list[dict[str, Any]]:
    """Return rows for the aggregation of ten ResNet-18 that need no alignment."""
    allow_messages()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = resnet18(num_classes=100)
    state = model.state_dict()
    example = torch.zeros(2, 3, 64, 64)
    strategy = ReBasinStrategy(model=model, example_inputs=example, finish=[])
    nodes: Any = Nodes(range(1, CLIENTS + 1))
    list(strategy.configure_train(1, ArrayRecord(state), ConfigRecord(), nodes))
    seconds: dict[str, list[float]] = {"FedAvg": [], "ReBasinStrategy(FedAvg())": []}
    margins = []
    for _ in range(repeats + 1):
        for name, each in zip(seconds, (FedAvg(), strategy), strict=True):
            received = noisy_replies(state)
            taken, (_, metrics) = timed(partial(each.aggregate_train, 1, received))
            seconds[name].append(taken)
            if each is strategy and metrics is not None:
                margins.append(metrics["rebasin-margin"])
    print(f"margin {margins[-1]:.1f}", file=sys.stderr)
    row = {"work": ROUND, "models": CLIENTS, "margin": margins[-1]}
    # The first run warms up.
    return [{**row, "method": name, "seconds": taken[1:]} for name, taken in seconds.items()]


def page(rows: list[dict[str, Any]], used: dict[str, str]) -> str:
    """Return the rows as a Markdown page."""
    headings = (
        "task",
        "models",
        "method",
        "s",
        "speed-up over the textbook (FedAvg)",
        "similarity",
    )
    baselines = {
        row["work"]: statistics.median(row["seconds"]) for row in rows if row["method"] in BASELINES
    }
    cells = []
    for row in rows:
        median = statistics.median(row["seconds"])
        cosines = f"{row['similarity']:.4f}" if "similarity" in row else ""
        ratio = baselines[row["work"]] / median
        own = [row["work"], row["models"], row["method"]]
        cells.append([*own, f"{median:.2f}", f"{ratio:.2f}", cosines])
    explanation = (
        "Median times on one thread (two for a round); similarity is the mean cosine of all pairs\n"
        "of permuted models. Made by `python benchmarks/merging.py --data-dir DIR`."
    )
    lines = markdown_table(headings, cells)
    return report("Alignment of N models", explanation, lines, [versions_line(used)])


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, metavar="R")
    parser.add_argument("--data-dir", type=Path, default=None, metavar="DIR")
    parser.add_argument("--only", choices=[*TASKS, "round"], metavar="TASK")
    return parser.parse_args()


def main() -> None:
    """Run as a program."""
    options = parse()
    path = options.out / "merging.json"
    rows: list[dict[str, Any]] = read_json(path, {"rows": []})["rows"]
    for task, (_, _, trained) in TASKS.items():
        if options.only in (None, task) and (options.data_dir is not None or not trained):
            made = merge(task, options.data_dir if trained else None, options.repeats)
            rows = [row for row in rows if row["work"] != task] + made
    if options.only in (None, "round"):
        made = round_of_aligned_clients(options.repeats)
        rows = [row for row in rows if row["work"] != ROUND] + made
    used = versions(*PACKAGES)
    write_json(path, {"rows": rows, "versions": used})
    text = page(rows, used)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
