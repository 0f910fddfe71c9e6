"""Time weight matching of two models against the textbook's Algorithm 1, in one run.

    python benchmarks/matching.py [NETS ...] [--threads T ...] [--repeats R] [--data-dir DIR]

Both get the same two models and take turns; the table gives the medians, their ratio, and the
cosine of the two models before and after. With --data-dir the nets that the table calls trained
are trained first, on MNIST or CIFAR-100 as torchvision reads them. Results are added to
`results/matching.json`, and `results/matching.md` is made from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import textbook
import torch
from machine import versions
from nets import NETS, State, state_of

from fl_rebasin import PermutationSpec, derive_spec, match_weights

PACKAGES = ("torch", "torchvision", "lapx", "numpy", "scipy")


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a function takes, and what it returns."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def cosine(spec: PermutationSpec, left: State, right: State) -> float:
    """Return the cosine of two models in float64, over what can be learnt."""
    one, other = (
        torch.cat([s[k].double().flatten() for k in spec.learnable]) for s in (left, right)
    )
    return float(one @ other / (one.norm() * other.norm()))


def measure(name: str, data: Path | None, threads: int, repeats: int) -> dict[str, Any]:
    """Return a row of the table."""
    torch.set_num_threads(2)
    left, right = (state_of(name, seed, data) for seed in (0, 1))
    spec = derive_spec(NETS[name].build(), torch.zeros(NETS[name].shape))
    torch.set_num_threads(threads)
    one, other = ({key: state[key] for key in spec.learnable} for state in (left, right))
    match_weights(spec, left, right)  # Libraries are loaded now.
    ours, theirs = [], []
    reached = []
    for repeat in range(repeats):
        seconds, match = timed(lambda: match_weights(spec, left, right))
        ours.append(seconds)
        generator = torch.Generator().manual_seed(repeat)
        seconds, found = timed(lambda: textbook.match(spec, one, other, generator))  # noqa: B023
        theirs.append(seconds)
        reached.append((cosine(spec, left, spec.apply(found[0], right)), found[1]))
        print(f"{name}: {ours[-1]:.3f} s, textbook {theirs[-1]:.3f} s", file=sys.stderr)
    return {
        "net": name,
        "weights": "random" if data is None else "trained",
        "threads": threads,
        "ours": ours,
        "textbook": theirs,
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "before": cosine(spec, left, right),
        "after": cosine(spec, left, spec.apply(match.permutation, right)),
        "textbook-after": [value for value, _ in reached],
        "textbook-sweeps": [sweeps for _, sweeps in reached],
        "versions": versions(*PACKAGES),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    lines = [
        "| net | weights | threads | here, s | textbook, s | ratio | cosine before | here "
        "| textbook: mean (most) | its sweeps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs = row["textbook-after"]
        lines.append(
            f"| {row['net']} | {row['weights']} | {row['threads']} "
            f"| {statistics.median(row['ours']):.3f} | {statistics.median(row['textbook']):.2f} "
            f"| **{row['ratio']:.1f}** | {row['before']:.4f} | {row['after']:.5f} "
            f"| {statistics.mean(theirs):.5f} ({max(theirs):.5f}) "
            f"| {statistics.median(row['textbook-sweeps']):.0f} |"
        )
    used = {json.dumps(row["versions"], sort_keys=True) for row in rows}
    notes = [
        ", ".join(f"{name} {value}" for name, value in json.loads(each).items()) for each in used
    ]
    return "\n".join(
        [
            "# Weight matching of two models",
            "",
            "Medians; each row's runs took turns in one process. Made by `python",
            "benchmarks/matching.py`. What `trained` nets have seen is in `nets.py`.",
            "",
            *lines,
            "",
            *sorted(notes),
            "",
        ]
    )


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=list(NETS), metavar="NETS")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="T")
    parser.add_argument("--repeats", type=int, default=5, metavar="R")
    parser.add_argument("--data-dir", type=Path, default=None, metavar="DIR")
    options = parser.parse_args()
    if unknown := [name for name in options.nets if name not in NETS]:
        parser.error(f"unknown net {unknown[0]!r}: use some of {', '.join(map(repr, NETS))}")
    if options.data_dir is not None:
        options.nets = [name for name in options.nets if NETS[name].data]
    path = Path(__file__).parent / "results" / "matching.json"
    rows = {(r["net"], r["weights"], r["threads"]): r
            for r in (json.loads(path.read_text()) if path.exists() else [])}  # fmt: skip
    for name in options.nets:
        for threads in options.threads:
            row = measure(name, options.data_dir, threads, options.repeats)
            rows[row["net"], row["weights"], row["threads"]] = row
            order = sorted(rows.values(), key=lambda r: (list(NETS).index(r["net"]), r["weights"],
                                                         r["threads"]))  # fmt: skip
            path.write_text(json.dumps(order, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(order))
            print(table([row]).splitlines()[-3])


if __name__ == "__main__":
    main()
