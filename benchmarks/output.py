"""What the scripts share: the command line, and results as JSON and Markdown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option --out."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="folder for the results (default: benchmarks/results)",
    )
    return parser


def read_json(path: Path, default: Any) -> Any:
    """Return the content of a file, or the default if there is no file."""
    return json.loads(path.read_text()) if path.exists() else default


def write_json(path: Path, results: Any) -> None:
    """Write results to a file in a folder that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a table."""
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def versions_line(used: dict[str, str]) -> str:
    """Return the versions in one line."""
    return ", ".join(f"{name} {value}" for name, value in used.items())


def report(title: str, explanation: str, lines: Iterable[str], notes: Iterable[str]) -> str:
    """Return a page: a title, an explanation, a table and notes on the versions."""
    return "\n".join([f"# {title}", "", explanation, "", *lines, "", *notes, ""])
