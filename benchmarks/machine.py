"""The machine: its versions for the results, the time and the memory that code takes on it."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import psutil
import torch

Result = TypeVar("Result")


def versions(*packages: str) -> dict[str, str]:
    """Return the hardware, the commit, and the versions of Python and of some packages."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    name = str(torch.cpu.get_capabilities().get("cpu_name", "")) or platform.processor()
    return {
        "hardware": f"{name}, {os.cpu_count()} cores",
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Call a function; return the seconds that it takes and its result."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


class PeakMemory:
    """Measures the peak of this process's resident memory while it is entered.

    Attributes:
        start: Resident memory at the start, in bytes.
        peak: The largest resident memory since then, in bytes.
    """

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
