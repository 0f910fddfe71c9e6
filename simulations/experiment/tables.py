"""Results as tables on the screen."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiment.results import spread

COLUMNS = {
    "joint_accuracy": ("acc. %", 100),
    "joint_loss": ("loss", 1),
    "ece": ("ECE %", 100),
    "part_accuracy": ("", 100),
    "loss_barrier": ("loss barrier", 1),
    "accuracy_barrier": ("acc. barrier %", 100),
}
"""Heading and scale of each quantity; a part's column is named after its classes."""

MIN_WIDTH = 132


def wide(console: Console) -> Console:
    """Return a console that is wide enough for the table; a narrower screen wraps or scrolls."""
    return Console(width=max(console.width, MIN_WIDTH))


def print_table(console: Console, results: dict[str, Any]) -> None:
    """Print one row per method.

    Args:
        console: Wide enough for the table.
        results: `dataset`, `note`, `config` and `summary`, as in `results.json`.
    """
    config, summary = results["config"], results["summary"]
    table = Table(
        title=f"{results['dataset']}, {config['split']}, {config['clients']} clients, "
        f"{config['init']} init, {config['rounds']} round(s), n = {len(config['seeds'])}",
        caption=_caption(config) + escape(results["note"]),
        title_justify="left",
        caption_justify="left",
    )
    parts = list(next(iter(summary.values()))["part_accuracy"])
    table.add_column("method", no_wrap=True)
    for heading in _headings(parts):
        table.add_column(heading, justify="right", no_wrap=True)
    for method, row in summary.items():
        table.add_row(method, *_cells(row), style="bold" if method == "rebasin+bn" else None)
    console.print(table)


def print_rounds(console: Console, runs: list[dict[str, Any]]) -> None:
    """Print the joint accuracy of each method after each round."""
    table = Table(title="joint accuracy in % by round", title_justify="left")
    methods = [name for name in runs[0]["rounds"][-1] if name != "round"]
    for heading in ("round", *methods):
        table.add_column(heading, justify="right", no_wrap=True)
    for entries in zip(*(run["rounds"] for run in runs), strict=True):
        cells = [
            _cell(spread(entry[method]["joint_accuracy"] for entry in entries), 100)
            for method in methods
        ]
        table.add_row(str(entries[0]["round"]), *cells)
    console.print(table)


def _caption(config: dict[str, Any]) -> str:
    caption = (
        "Clients, ensembles and barriers: the models of round 1, trained apart. "
        "Barriers between client 0 and client 1. "
    )
    if config["rounds"] > 1:
        caption += f"Merged models: after round {config['rounds']}. "
    if config["norm"] != "batch":
        caption += "This model has no BatchNorm: rows with +bn repeat those without. "
    if len(config["seeds"]) > 1:
        caption += "Mean ± standard deviation over the seeds. "
    return caption


def _headings(parts: list[str]) -> list[str]:
    headings = []
    for key, (name, _) in COLUMNS.items():
        if key == "part_accuracy":
            headings += [f"{part.removeprefix('classes ')} %" for part in parts]
        else:
            headings.append(name)
    return headings


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for key, (_, scale) in COLUMNS.items():
        if key == "part_accuracy":
            cells += [_cell(value, scale) for value in row[key].values()]
        else:
            cells.append(_cell(row.get(key), scale))
    return cells


def _cell(value: list[float | None] | None, scale: float) -> str:
    if value is None:
        return ""
    centre, deviation = value
    assert centre is not None
    digits = 1 if scale == 100 else 3
    text = f"{scale * centre:.{digits}f}"
    return text if deviation is None else f"{text} ± {scale * deviation:.{digits}f}"
