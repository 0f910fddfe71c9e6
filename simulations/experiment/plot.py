"""Results as a picture: loss and accuracy on the line between two clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"naive": "tab:red", "rebasin": "tab:blue"}
LABELS = {"naive": "naive", "rebasin": "aligned"}


def draw_interpolation(path: Path, results: dict[str, Any]) -> None:
    """Draw loss and accuracy from client 0 to client 1: mean and range over the seeds."""
    runs, config = results["runs"], results["config"]
    names = list(runs[0]["curves"])
    if config["norm"] != "batch":
        names = [name for name in names if not name.endswith("+bn")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name in names:
        style = "-" if name.endswith("+bn") or config["norm"] != "batch" else ":"
        curves = [run["curves"][name] for run in runs]
        _draw(left, name, style, curves, "losses", 1)
        _draw(right, name, style, curves, "accuracies", 100)
    for panel, title in ((left, "loss"), (right, "joint accuracy in %")):
        panel.set(xlabel="λ: from client 0 to client 1", title=title)
        panel.grid(alpha=0.3)
    handles, texts = left.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=len(names), fontsize="small")
    images = runs[0]["curves"]["naive"]["images"]
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


def _draw(
    panel: Axes, name: str, style: str, curves: list[dict[str, Any]], key: str, scale: float
) -> None:
    """Draw one quantity of one method."""
    method, _, recalibrated = name.partition("+")
    values = torch.tensor([curve[key] for curve in curves]) * scale
    lambdas, colour = curves[0]["lambdas"], COLOURS[method]
    label = LABELS[method] + (", BatchNorm re-estimated" if recalibrated else "")
    panel.plot(lambdas, values.mean(0), style, color=colour, label=label)
    if len(curves) > 1:
        low, high = values.amin(0), values.amax(0)
        panel.fill_between(lambdas, low, high, color=colour, alpha=0.12, linewidth=0)
