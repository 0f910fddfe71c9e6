"""A short soak benchmark: it drops faulty replies and completes all rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_with_faulty_replies_completes_all_rounds(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "soak.py"),
            "--rounds=12",
            "--clients=6",
            f"--out={tmp_path}",
        ],
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "soak.json").read_text())
    assert results["with faults"]["rounds"] == 12
    # About 10 % of the 72 replies are faulty; the draws are seeded.
    assert 3 <= sum(results["with faults"]["dropped"].values()) <= 15
    assert not results["without faults"]["dropped"]
    assert results["with faults"]["accuracy"][-1] > 0.5
