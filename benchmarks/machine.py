"""What figures were measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def versions(*packages: str) -> dict[str, str]:
    """Return the hardware, the commit, and the versions of Python and of packages."""
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
