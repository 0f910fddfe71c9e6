"""Derive the specs of many models and write the results, with times, as a table.

    python benchmarks/spec_coverage.py [NAMES ...] [--out DIR]

Measures all classification models of torchvision, unmodified and at their own input sizes, and some
models of torch.nn. With NAMES only these are measured; the other rows of an earlier table remain.
Columns: groups; freedom (share of the parameters with a free axis); seconds of `derive_spec`; peak
memory relative to the model's; the largest relative error of an independent check (a random
permutation in float64, loaded with `load_state_dict`); and the reasons why axes are pinned, apart
from inputs, outputs and kernel positions. Each model runs in a separate process.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from machine import PeakMemory, timed, versions
from output import markdown_table, read_json, report, script_parser, versions_line, write_json
from torch import nn

from fl_rebasin import PermutationSpec, derive_spec

PLAIN_REASONS = {"model input", "model output", "kernel position", "position in an image"}
INPUT_SIDES = {"inception_v3": 299}
HEADINGS = (
    "model",
    "size",
    "groups",
    "freedom",
    "seconds",
    "memory / model",
    "error",
    "also pinned",
)


def torch_models() -> dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...]]]:
    """Return models of torch.nn with their example inputs."""
    layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
    sequence = torch.zeros(2, 32, 256)

    def transformer() -> nn.Module:
        return nn.Transformer(256, 8, 3, 3, 1024, batch_first=True)

    def encoder() -> nn.Module:
        return nn.Sequential(
            nn.Linear(256, 256),
            nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
            nn.Linear(256, 10),
        )

    return {
        "nn.Transformer": (transformer, (sequence, sequence)),
        "nn.TransformerEncoder": (encoder, (sequence,)),
        "nn.LSTM": (lambda: Recurrent(nn.LSTM), (sequence,)),
        "nn.GRU": (lambda: Recurrent(nn.GRU), (sequence,)),
    }


class Recurrent(nn.Module):
    """Two bidirectional layers, and a linear head on each step."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.body = kind(256, 512, num_layers=2, bidirectional=True)
        self.head = nn.Linear(1024, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the scores of each step."""
        result: torch.Tensor = self.head(self.body(inputs)[0])
        return result


def build(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return a model and its example inputs."""
    if name in torch_models():
        builder, inputs = torch_models()[name]
        return builder(), inputs
    side = INPUT_SIDES.get(name, 224)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torchvision.models.get_model(name), (torch.zeros(1, 3, side, side),)


def independent_error(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], spec: PermutationSpec
) -> float:
    """Return the relative error of the outputs under a random permutation, in float64."""
    generator = torch.Generator().manual_seed(7)
    double = copy.deepcopy(model).double().eval()
    images = tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs)
    with torch.no_grad():
        for parameter in double.parameters():
            if len(parameter.unique()) == 1:  # Norms, biases and some heads start constant.
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise)
        before = double(*images)
        double.load_state_dict(spec.apply(spec.random(generator), double.state_dict()))
        after = double(*images)
    first, second = (x[0] if isinstance(x, tuple) else x for x in (before, after))
    return float((first - second).abs().max() / first.abs().max())


def measure(name: str) -> dict[str, Any]:
    """Derive the spec of one model; return a row of the table."""
    derive_spec(nn.Linear(2, 2), torch.zeros(1, 2))  # Loads the libraries.
    model, inputs = build(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    with warnings.catch_warnings(record=True) as caught, PeakMemory() as memory:
        warnings.simplefilter("always")
        seconds, spec = timed(lambda: derive_spec(model, inputs))
    return {
        "model": name,
        "parameters": count,
        "groups": len(spec.groups),
        "freedom": spec.freedom,
        "seconds": seconds,
        # The model itself counts as one.
        "memory": 1 + (memory.peak - memory.start) / stored,
        "error": independent_error(model, inputs, spec),
        "warnings": [str(warning.message) for warning in caught],
        "reasons": sorted(set(spec.pinned.values()) - PLAIN_REASONS),
    }


def measure_apart(name: str) -> dict[str, Any] | None:
    """Measure a model in a separate process; return None, with the error printed, if it fails."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name], capture_output=True, text=True
    )
    if done.returncode:
        print(f"{name}: failed\n{done.stderr}", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{name}: {row['groups']} groups, {row['freedom']:.2%} free, {row['seconds']:.1f} s, "
        f"error {row['error']:.0e}",
        flush=True,
    )
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table as text."""
    return [
        row["model"],
        f"{row['parameters'] / 1e6:.1f} M",
        str(row["groups"]),
        f"{row['freedom']:.2%}",
        f"{row['seconds']:.1f}",
        f"{row['memory']:.1f}",
        f"{row['error']:.0e}",
        "; ".join(row["reasons"]),
    ]


def summary_of(rows: list[dict[str, Any]]) -> str:
    """Return the table in one sentence."""
    free = sum(row["freedom"] >= 0.95 for row in rows)
    return (
        f"{len(rows)} models, {free} with at least 95 % of the parameters free, "
        f"largest error {max((row['error'] for row in rows), default=0):.0e}, "
        f"{sum(row['seconds'] for row in rows):.0f} s in all"
    )


def parse() -> argparse.Namespace:
    """Parse the command line; `everything` lists all models in the order of the table."""
    parser = script_parser(__doc__)
    parser.add_argument("names", nargs="*", help="models to measure (default: all)")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.everything = [
        *torch_models(),
        *torchvision.models.list_models(module=torchvision.models),
    ]
    if unknown := sorted({*options.names} - {*options.everything}):
        known = ", ".join(options.everything)
        parser.error(f"unknown model {unknown[0]!r}: use any of {known}")
    return options


def main() -> int:
    """Measure all models, or the given ones; write the table."""
    options = parse()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    names = options.names or options.everything
    path = options.out / "spec_coverage.json"
    kept = read_json(path, []) if options.names else []
    measured = [measure_apart(name) for name in names]
    rows = [row for row in kept if row["model"] not in names]
    rows += [row for row in measured if row is not None]
    rows.sort(key=lambda row: options.everything.index(row["model"]))
    used = versions_line(versions("torch", "torchvision"))
    explanation = f"Made by `python benchmarks/spec_coverage.py`: {used}.\n\n{summary_of(rows)}."
    lines = markdown_table(HEADINGS, map(cells, rows))
    write_json(path, rows)
    path.with_suffix(".md").write_text(report("Coverage of `derive_spec`", explanation, lines, []))
    print(f"{summary_of(rows)}\n{path.with_suffix('.md')}")
    return 1 if None in measured else 0


if __name__ == "__main__":
    sys.exit(main())
