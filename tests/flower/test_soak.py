"""The soak benchmark in a short form: it runs, drops faults and completes its rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_rounds_with_faults_are_all_completed(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "soak.py")),
            *("--rounds", "12", "--clients", "6", "--out", str(tmp_path)),
        ],
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "soak.json").read_text())
    assert results["with faults"]["rounds"] == 12
    # 72 replies, 10 % of them faulty: the draws are seeded.
    assert 3 <= sum(results["with faults"]["dropped"].values()) <= 15
    assert not results["without faults"]["dropped"]
    assert results["with faults"]["accuracy"][-1] > 0.5
