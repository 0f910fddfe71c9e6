"""Results as a file, a table and a picture."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PACKAGES = ("fl-rebasin", "flwr", "torch", "torchvision", "ray", "numpy", "scipy")
COLUMNS = {
    "joint_accuracy": ("acc. %", 100),
    "joint_loss": ("loss", 1),
    "ece": ("ECE %", 100),
    "part_accuracy": ("", 100),
    "loss_barrier": ("loss barrier", 1),
    "accuracy_barrier": ("acc. barrier %", 100),
}


TABLE_WIDTH = 132


def wide(console: Console) -> Console:
    """Return a console with room for the table; a narrower screen wraps or scrolls it."""
    return Console(width=max(console.width, TABLE_WIDTH))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages, the hardware and the commit."""
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


def _spread(values: Iterable[float]) -> list[float | None]:
    """Return mean and sample standard deviation; None for the deviation of one value."""
    values = list(values)
    return [mean(values), stdev(values) if len(values) > 1 else None]


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each method and quantity `[mean, sd]` over the seeds."""
    summary: dict[str, dict[str, Any]] = {}
    for method, row in runs[0]["methods"].items():
        rows = [run["methods"][method] for run in runs]
        summary[method] = {
            key: {part: _spread(r[key][part] for r in rows) for part in value}
            if isinstance(value, dict)
            else _spread(r[key] for r in rows)
            for key, value in row.items()
        }
    return summary


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def _cell(value: list[float | None] | None, scale: float) -> str:
    if value is None:
        return ""
    centre, deviation = value
    assert centre is not None
    digits = 1 if scale == 100 else 3
    text = f"{scale * centre:.{digits}f}"
    return text if deviation is None else f"{text} ± {scale * deviation:.{digits}f}"


def print_table(console: Console, results: dict[str, Any]) -> None:
    """Print one row a method."""
    config, seeds = results["config"], results["config"]["seeds"]
    title = (
        f"{results['dataset']}, {config['split']}, {config['clients']} clients, "
        f"{config['init']} init, {config['rounds']} round(s), n = {len(seeds)}"
    )
    caption = (
        "Clients, ensembles and barriers: the models of round 1, trained apart. "
        "Barriers between client 0 and client 1. "
    )
    if config["rounds"] > 1:
        caption += f"Merged models: after round {config['rounds']}. "
    if config["norm"] != "batch":
        caption += "This model has no BatchNorm: rows with +bn repeat those without. "
    if len(seeds) > 1:
        caption += "Mean ± standard deviation over the seeds. "
    table = Table(
        title=title,
        caption=caption + escape(results["note"]),
        title_justify="left",
        caption_justify="left",
    )
    parts = next(iter(results["summary"].values()))["part_accuracy"]
    table.add_column("method", no_wrap=True)
    for key, (name, _) in COLUMNS.items():
        for heading in (
            [f"{part.removeprefix('classes ')} %" for part in parts]
            if key == "part_accuracy"
            else [name]
        ):
            table.add_column(heading, justify="right", no_wrap=True)
    for method, row in results["summary"].items():
        cells = []
        for key, (_, scale) in COLUMNS.items():
            if key == "part_accuracy":
                cells += [_cell(row[key][part], scale) for part in parts]
            else:
                cells.append(_cell(row.get(key), scale))
        table.add_row(method, *cells, style="bold" if method == "rebasin+bn" else None)
    console.print(table)


def print_rounds(console: Console, runs: list[dict[str, Any]]) -> None:
    """Print joint accuracy after each round, both arms with BatchNorm re-estimated."""
    table = Table(title="joint accuracy in % by round", title_justify="left")
    arms = [name for name in runs[0]["rounds"][-1] if name != "round"]
    for heading in ("round", *arms):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, entry in enumerate(runs[0]["rounds"]):
        cells = [
            _cell(_spread(run["rounds"][place][arm]["joint_accuracy"] for run in runs), 100)
            for arm in arms
        ]
        table.add_row(str(entry["round"]), *cells)
    console.print(table)


def draw_interpolation(path: Path, results: dict[str, Any]) -> None:
    """Draw loss and accuracy on the line from client 0 to client 1, mean and range over seeds."""
    runs = results["runs"]
    names = list(runs[0]["curves"])
    if results["config"]["norm"] != "batch":
        names = [name for name in names if not name.endswith("+bn")]
    labels = {"naive": "naive", "rebasin": "aligned"}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for panel, key, scale, title in (
        (panels[0], "losses", 1, "loss"),
        (panels[1], "accuracies", 100, "joint accuracy in %"),
    ):
        for name in names:
            base, _, recalibrated = name.partition("+")
            values = torch.tensor([run["curves"][name][key] for run in runs]) * scale
            lambdas = runs[0]["curves"][name]["lambdas"]
            colour = "tab:red" if base == "naive" else "tab:blue"
            label = labels[base] + (", BatchNorm re-estimated" if recalibrated else "")
            style = "-" if recalibrated or len(names) == 2 else ":"
            panel.plot(lambdas, values.mean(0), style, color=colour, label=label)
            if len(runs) > 1:
                low, high = values.amin(0), values.amax(0)
                panel.fill_between(lambdas, low, high, color=colour, alpha=0.12, linewidth=0)
        panel.set(xlabel="λ: from client 0 to client 1", title=title)
        panel.grid(alpha=0.3)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=len(names), fontsize="small")
    images = runs[0]["curves"]["naive"]["images"]
    config = results["config"]
    figure.suptitle(
        f"{results['dataset']}, split {config['split']}, {config['init']} init, "
        f"{images} test images, n = {len(runs)}"
        + (f"\n{results['note']}" if results["note"] else ""),
        fontsize="medium",
    )
    part = path.with_name(path.stem + ".part.png")
    figure.savefig(part, dpi=150)
    plt.close(figure)
    part.replace(path)
