"""Time the alignment of N models against the textbook's MergeMany, and a round against FedAvg's.

    python benchmarks/merging.py [--repeats R] [--data-dir DIR] [--only WORK]

With --data-dir the MNIST nets are trained first; without it this work is left out. The textbook
runs once. Results go to `results/merging.json` and `results/merging.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any, get_args

import textbook
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from machine import versions
from matching import cosine, timed
from nets import NETS, State, state_of
from torchvision.models import resnet18

from fl_rebasin import Permutation, PermutationSpec, ReBasinStrategy, derive_spec
from fl_rebasin.matching.many import Method, align_many

PACKAGES = ("flwr", "torch", "lapx", "numpy", "scipy")
WORK = {"MLP 3x512, trained": ("MLP 3x512", 5, True), "ResNet-20 x4": ("ResNet-20 x4", 10, False)}
NOISE = 0.02
"""Deviation of a client's weights from the global model's, as a share of that tensor's own."""


def similarity(
    spec: PermutationSpec, models: list[State], permutations: list[Permutation]
) -> float:
    """Return the mean cosine of all pairs of permuted models."""
    moved = [spec.apply(*pair) for pair in zip(permutations, models, strict=True)]
    pairs = list(itertools.combinations(moved, 2))
    return sum(cosine(spec, left, right) for left, right in pairs) / len(pairs)


def merge(work: str, data: Path | None, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each method."""
    name, count, _ = WORK[work]
    torch.set_num_threads(2)
    models = [state_of(name, seed, data) for seed in range(count)]
    spec = derive_spec(NETS[name].build(), torch.zeros(NETS[name].shape))
    torch.set_num_threads(1)
    learnable = [{key: state[key] for key in spec.learnable} for state in models]
    rows = []
    for method in get_args(Method):
        runs = [
            timed(lambda: align_many(spec, models, method=method))  # noqa: B023
            for _ in range(repeats)
        ]
        found = runs[0][1]
        rows.append({"work": work, "models": count, "method": method,
                     "seconds": [seconds for seconds, _ in runs],
                     "similarity": similarity(spec, models, found.permutations)})  # fmt: skip
        print(f"{work}, {method}: {runs[0][0]:.2f} s", file=sys.stderr)
    seconds, found = timed(
        lambda: textbook.merge_many(spec, learnable, torch.Generator().manual_seed(0))
    )
    alike = similarity(spec, models, found[0])
    rows.append({"work": work, "models": count, "method": "textbook, as in the paper",
                 "seconds": [seconds], "similarity": alike})  # fmt: skip
    return rows


def round_of_aligned_clients(repeats: int) -> list[dict[str, Any]]:
    """Return rows for aggregating ten ResNet-18 that need no alignment."""
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = resnet18(num_classes=100)
    state = model.state_dict()
    strategy = ReBasinStrategy(
        model=model, example_inputs=torch.zeros(2, 3, 64, 64), recalibrate_batchnorm=False
    )

    def replies() -> list[Message]:
        made = []
        for node in range(1, 11):
            generator = torch.Generator().manual_seed(node)
            own = {
                key: value + NOISE * value.std() * torch.randn(value.shape, generator=generator)
                if value.ndim > 1
                else value
                for key, value in state.items()
            }
            content = RecordDict(
                {"arrays": ArrayRecord(own), "metrics": MetricRecord({"num-examples": 10 * node})}
            )
            asked = Message(RecordDict(), dst_node_id=node, message_type="train")
            made.append(Message(content, reply_to=asked))
        return made

    class Nodes:
        def get_node_ids(self) -> list[int]:
            return list(range(1, 11))

    nodes: Any = Nodes()
    list(strategy.configure_train(1, ArrayRecord(state), ConfigRecord(), nodes))
    rows: dict[str, list[float]] = {"FedAvg": [], "ReBasinStrategy(FedAvg())": []}
    metrics: Any = {}
    for _ in range(repeats + 1):
        for name, each in zip(rows, (FedAvg(), strategy), strict=True):
            received = replies()
            seconds, (_, metrics) = timed(lambda: each.aggregate_train(1, received))  # noqa: B023
            rows[name].append(seconds)
    print(f"margin {metrics['rebasin-margin']:.1f}", file=sys.stderr)
    return [
        {"work": "a round of ResNet-18, nothing to be done", "models": 10, "method": name,
         "seconds": seconds[1:], "margin": metrics["rebasin-margin"]}
        for name, seconds in rows.items()
    ]  # fmt: skip


def table(rows: list[dict[str, Any]], used: dict[str, str]) -> str:
    """Return the rows as a table."""
    lines = [
        "# Alignment of N models",
        "",
        "Medians, one thread (a round: two); the mean cosine of all pairs of permuted models. Made",
        "by `python benchmarks/merging.py --data-dir DIR`.",
        "",
        "| work | models | method | s | times faster than the textbook (FedAvg) | similarity |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = next(
            other
            for other in rows
            if other["work"] == row["work"]
            and other["method"] in ("textbook, as in the paper", "FedAvg")
        )
        median = statistics.median(row["seconds"])
        ratio = statistics.median(base["seconds"]) / median
        alike = f"{row['similarity']:.4f}" if "similarity" in row else ""
        lines.append(
            f"| {row['work']} | {row['models']} | {row['method']} | {median:.2f} | {ratio:.2f} "
            f"| {alike} |"
        )
    note = ", ".join(f"{name} {value}" for name, value in used.items())
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="R")
    parser.add_argument("--data-dir", type=Path, default=None, metavar="DIR")
    parser.add_argument("--only", choices=[*WORK, "round"], metavar="WORK")
    options = parser.parse_args()
    path = Path(__file__).parent / "results" / "merging.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for work, (_, _, trained) in WORK.items():
        if options.only in (None, work) and (options.data_dir is not None or not trained):
            made = merge(work, options.data_dir if trained else None, options.repeats)
            rows = [row for row in rows if row["work"] != work] + made
    if options.only in (None, "round"):
        made = round_of_aligned_clients(options.repeats)
        rows = [row for row in rows if row["work"] != made[0]["work"]] + made
    used = versions(*PACKAGES)
    path.write_text(json.dumps({"rows": rows, "versions": used}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rows, used))
    print(table(rows, used))


if __name__ == "__main__":
    main()
