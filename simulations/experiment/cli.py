"""The command line of the scripts: shared options, checks and exit codes."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from experiment.errors import FederationError, UserError
from experiment.methods import METHODS


class Parser(argparse.ArgumentParser):
    """A parser that reports an invalid option in one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`; `run_program` prints it."""
        raise UserError(f"{message} (see --help)")


def add_shared_options(parser: Parser, *, data: str, out: str, methods: str) -> None:
    """Add the options that all scripts have.

    Args:
        parser: Changed in place.
        data: Folder that --data-dir must contain.
        out: Default of --out.
        methods: Default of --methods: "all" or "none".
    """
    add = parser.add_argument
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help=f"folder that contains {data}; downloaded if missing (default: data)",
    )
    add(
        "--out",
        type=Path,
        default=Path(out),
        metavar="DIR",
        help=f"folder for the results and Flower's log (default: {out})",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        metavar="S",
        help="seeds, one repetition each (default: 0)",
    )
    add(
        "--methods",
        nargs="+",
        default=[] if methods == "none" else [methods],
        metavar="M",
        help="methods to compare in addition to naive averaging and rebasin: all, or any of "
        f"{', '.join(METHODS)} (default: {methods})",
    )


def check_seeds(seeds: list[int]) -> None:
    """Raise `UserError` for a negative or repeated seed."""
    if negative := [seed for seed in seeds if seed < 0]:
        raise UserError(f"--seeds {negative[0]} is negative: a seed must be at least 0")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {seeds} repeats a seed: list each seed once")


def check_writable(out: Path) -> None:
    """Create the output folder; raise `UserError` if files cannot be written to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}): choose another folder"
        ) from error


def run_program(run: Callable[[list[str]], None]) -> None:
    """Run a script with the command-line arguments and turn its errors into exit codes.

    The exit code is 2 for invalid input, 1 for a failed client and 130 for Ctrl-C.
    """
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FederationError as error:
        print(f"error: {error}; see Flower's log in the --out folder", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: no results were written", file=sys.stderr)
        sys.exit(130)
