"""Time weight matching of two models against the textbook's Algorithm 1, in one run.

    python benchmarks/matching.py [NETS ...] [--threads T ...] [--repeats R] [--data-dir DIR]
                                  [--out DIR]

Both match the same two models, in alternation. The table shows the median times, their ratio, and
the cosine of the two models before and after. With --data-dir the nets marked `trained` are first
trained on MNIST or CIFAR-100 from torchvision's files. Results are added to `matching.json`;
`matching.md` is generated from it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import textbook
import torch
from machine import timed, versions
from nets import NETS, State, state_of
from output import markdown_table, read_json, report, script_parser, versions_line, write_json

from fl_rebasin import PermutationSpec, derive_spec, match_weights

PACKAGES = ("torch", "torchvision", "lapx", "numpy", "scipy")
HEADINGS = (
    "net",
    "weights",
    "threads",
    "here, s",
    "textbook, s",
    "ratio",
    "cosine before",
    "here",
    "textbook: mean (max)",
    "its sweeps",
)


def cosine(spec: PermutationSpec, left: State, right: State) -> float:
    """Return the cosine of two models in float64, over all learnable parameters."""
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
    permutation = match_weights(spec, left, right).permutation  # Loads the libraries.
    ours, theirs, reached, sweeps = [], [], [], []
    for repeat in range(repeats):
        seconds, _ = timed(partial(match_weights, spec, left, right))
        ours.append(seconds)
        generator = torch.Generator().manual_seed(repeat)
        seconds, (found, used) = timed(partial(textbook.match, spec, one, other, generator))
        theirs.append(seconds)
        reached.append(cosine(spec, left, spec.apply(found, right)))
        sweeps.append(used)
        print(f"{name}: {ours[-1]:.3f} s, textbook {theirs[-1]:.3f} s", file=sys.stderr)
    return {
        "net": name,
        "weights": "random" if data is None else "trained",
        "threads": threads,
        "ours": ours,
        "textbook": theirs,
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "before": cosine(spec, left, right),
        "after": cosine(spec, left, spec.apply(permutation, right)),
        "textbook-after": reached,
        "textbook-sweeps": sweeps,
        "versions": versions(*PACKAGES),
    }


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table as text."""
    theirs = row["textbook-after"]
    return [
        row["net"],
        row["weights"],
        str(row["threads"]),
        f"{statistics.median(row['ours']):.3f}",
        f"{statistics.median(row['textbook']):.2f}",
        f"**{row['ratio']:.1f}**",
        f"{row['before']:.4f}",
        f"{row['after']:.5f}",
        f"{statistics.mean(theirs):.5f} ({max(theirs):.5f})",
        f"{statistics.median(row['textbook-sweeps']):.0f}",
    ]


def page(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown page."""
    explanation = (
        "Medians; the runs of each row alternated in one process. Made by\n"
        "`python benchmarks/matching.py`. `nets.py` lists the training data of the `trained` nets."
    )
    lines = markdown_table(HEADINGS, map(cells, rows))
    notes = sorted({versions_line(dict(sorted(row["versions"].items()))) for row in rows})
    return report("Weight matching of two models", explanation, lines, notes)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = script_parser(__doc__)
    parser.add_argument("nets", nargs="*", default=list(NETS), metavar="NETS")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="T")
    parser.add_argument("--repeats", type=int, default=5, metavar="R")
    parser.add_argument("--data-dir", type=Path, default=None, metavar="DIR")
    options = parser.parse_args()
    if unknown := [name for name in options.nets if name not in NETS]:
        parser.error(f"unknown net {unknown[0]!r}: use any of {', '.join(map(repr, NETS))}")
    if options.data_dir is not None:
        options.nets = [name for name in options.nets if NETS[name].data]
    return options


def main() -> None:
    """Run as a program."""
    options = parse()
    path = options.out / "matching.json"
    rows = {(row["net"], row["weights"], row["threads"]): row for row in read_json(path, [])}
    for name in options.nets:
        for threads in options.threads:
            row = measure(name, options.data_dir, threads, options.repeats)
            rows[row["net"], row["weights"], row["threads"]] = row
            in_order = [
                rows[key]
                for key in sorted(rows, key=lambda key: (list(NETS).index(key[0]), *key[1:]))
            ]
            # After each row, so that an interrupted run loses only one.
            write_json(path, in_order)
            path.with_suffix(".md").write_text(page(in_order))
            print(" | ".join(cells(row)))


if __name__ == "__main__":
    main()
