"""Results as a file: versions, summary over the seeds, JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from experiment.settings import Settings

PACKAGES = ("fl-rebasin", "flwr", "torch", "torchvision", "ray", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Return the hardware, the commit and the versions of Python and the packages."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in PACKAGES}
    name = str(torch.cpu.get_capabilities().get("cpu_name", "")) or platform.processor()
    found["hardware"] = f"{name}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        found["hardware"] += f", {torch.cuda.get_device_name()}"
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    found["commit"] = commit.stdout.strip() or "unknown"
    return found


def config_of(settings: Settings) -> dict[str, Any]:
    """Return the settings for `results.json`, without the user's data folder."""
    config = asdict(settings)
    del config["data_dir"]
    return config


def spread(values: Iterable[float]) -> list[float | None]:
    """Return the mean and the sample standard deviation, which is None for a single value."""
    values = list(values)
    return [mean(values), stdev(values) if len(values) > 1 else None]


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return `[mean, standard deviation]` over the seeds for each method and quantity."""
    summary: dict[str, dict[str, Any]] = {}
    for method, row in runs[0]["methods"].items():
        rows = [run["methods"][method] for run in runs]
        summary[method] = {
            key: {part: spread(r[key][part] for r in rows) for part in value}
            if isinstance(value, dict)
            else spread(r[key] for r in rows)
            for key, value in row.items()
        }
    return summary


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write a file completely or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
