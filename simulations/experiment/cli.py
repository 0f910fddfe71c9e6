"""What the scripts' command lines have in common: errors in one line, exit codes, the folder."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from experiment.errors import UserError
from experiment.server import FederationError


class Parser(argparse.ArgumentParser):
    """Tells a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2; `--help` has the rest."""
        raise UserError(f"{message} (see --help)")


def check_seeds(seeds: list[int]) -> None:
    """Raise `UserError` for a negative or repeated seed."""
    if negative := [seed for seed in seeds if seed < 0]:
        raise UserError(f"--seeds {negative[0]} is negative: give seeds of 0 and more")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {seeds} repeats a seed: give each once")


def check_writable(out: Path) -> None:
    """Make the output folder, or raise `UserError`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}): give another folder"
        ) from error


def run_program(run: Callable[[list[str]], None]) -> None:
    """Run as a program: exit code 2 and one line for a wrong input, 130 for Ctrl-C."""
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FederationError as error:
        print(f"error: {error}; Flower's log is in the --out folder", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: no results were written", file=sys.stderr)
        sys.exit(130)
