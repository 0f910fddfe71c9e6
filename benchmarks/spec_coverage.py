"""Derive the spec of many models and write what came out, with times, as a table.

    python benchmarks/spec_coverage.py [NAMES ...] [--out DIR]

Every classification model of torchvision at its own input size, unmodified, and some of torch.nn.
With NAMES only these are measured; the other rows of an earlier table stay.
Columns: groups, freedom (share of the parameters with a free axis), seconds of `derive_spec`,
peak memory over that of the model, the largest relative error of an independent check (a random
permutation in float64, by `load_state_dict` on a plain copy), and why axes are pinned, other than
as inputs, outputs or kernel positions. Each model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torchvision
from torch import nn

from fl_rebasin import PermutationSpec, derive_spec

PLAIN_REASONS = {"model input", "model output", "kernel position", "position in an image"}
INPUT_SIDES = {"inception_v3": 299}


def torch_models() -> dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...]]]:
    """Return models of torch.nn with their example inputs."""
    layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
    sequence = torch.zeros(2, 32, 256)

    def encoder() -> nn.Module:
        return nn.Sequential(
            nn.Linear(256, 256),
            nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
            nn.Linear(256, 10),
        )

    return {
        "nn.Transformer": (lambda: nn.Transformer(256, 8, 3, 3, 1024, batch_first=True),
                           (sequence, sequence)),
        "nn.TransformerEncoder": (encoder, (sequence,)),
        "nn.LSTM": (lambda: Recurrent(nn.LSTM), (sequence,)),
        "nn.GRU": (lambda: Recurrent(nn.GRU), (sequence,)),
    }  # fmt: skip


class Recurrent(nn.Module):
    """Two layers in both directions, and a linear head on each step."""

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


class PeakMemory:
    """Watches the resident memory of this process, in bytes."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self.start = self.peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


def independent_error(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], spec: PermutationSpec
) -> float:
    """Return the relative error of the outputs under a random permutation, in float64."""
    generator = torch.Generator().manual_seed(7)
    double = copy.deepcopy(model).double().eval()
    images = tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs)
    with torch.no_grad():
        for parameter in double.parameters():
            if len(parameter.unique()) == 1:  # Norms, biases and some heads start alike.
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise)
        before = double(*images)
        moved = spec.apply(spec.random(generator), double.state_dict())
        double.load_state_dict(moved)
        after = double(*images)
    first, second = (x[0] if isinstance(x, tuple) else x for x in (before, after))
    return float((first - second).abs().max() / first.abs().max())


def measure(name: str) -> dict[str, Any]:
    """Derive the spec of one model; return a row of the table."""
    derive_spec(nn.Linear(2, 2), torch.zeros(1, 2))  # What is loaded on first use.
    model, inputs = build(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    with warnings.catch_warnings(record=True) as caught, PeakMemory() as memory:
        warnings.simplefilter("always")
        start = time.perf_counter()
        spec = derive_spec(model, inputs)
        seconds = time.perf_counter() - start
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


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| model | size | groups | freedom | seconds | memory / model | error | pinned also |",
        "| --- | --: | --: | --: | --: | --: | --: | --- |",
    ]
    lines += [
        f"| {row['model']} | {row['parameters'] / 1e6:.1f} M | {row['groups']} | "
        f"{row['freedom']:.2%} | {row['seconds']:.1f} | {row['memory']:.1f} | "
        f"{row['error']:.0e} | {'; '.join(row['reasons'])} |"
        for row in rows
    ]
    return "\n".join(lines)


def commit() -> str:
    """Return the commit of this checkout, with a plus sign if files differ from it."""
    here = Path(__file__).parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True
    )
    return result.stdout.strip() or "unknown"


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    """Measure all models, or those named; write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; all of them by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    everything = [*torch_models(), *torchvision.models.list_models(module=torchvision.models)]
    if unknown := sorted({*options.names} - {*everything}):
        print(f"error: no model named {unknown[0]!r}; known are {everything}", file=sys.stderr)
        return 2
    names = options.names or everything
    stored = options.out / "spec_coverage.json"
    kept = json.loads(stored.read_text()) if options.names and stored.exists() else []
    rows, failed = [row for row in kept if row["model"] not in names], []
    for number, name in enumerate(names, start=1):
        done = subprocess.run(
            [sys.executable, __file__, "--measure", name], capture_output=True, text=True
        )
        if done.returncode:
            failed.append(name)
            print(f"[{number}/{len(names)}] {name}: failed\n{done.stderr}", file=sys.stderr)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"[{number}/{len(names)}] {name}: {row['groups']} groups, {row['freedom']:.2%} free, "
            f"{row['seconds']:.1f} s, error {row['error']:.0e}",
            flush=True,
        )
    rows.sort(key=lambda row: everything.index(row["model"]))
    free = sum(row["freedom"] >= 0.95 for row in rows)
    summary = (
        f"{len(rows)} models, {free} with at least 95 % of the parameters free, "
        f"largest error {max((row['error'] for row in rows), default=0):.0e}, "
        f"{sum(row['seconds'] for row in rows):.0f} s in all"
    )
    text = "\n".join([
        "# Coverage of `derive_spec`", "",
        f"`{' '.join(['python', *map(os.path.relpath, sys.argv[:1]), *sys.argv[1:]])}`, commit "
        f"{commit()}, {processor()} ({os.cpu_count()} cores), Python "
        f"{platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}.", "", summary + ".", "", table(rows), "",
    ])  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "spec_coverage.md").write_text(text)
    stored.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{summary}\n{options.out / 'spec_coverage.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
