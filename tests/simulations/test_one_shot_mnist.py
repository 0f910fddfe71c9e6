"""The MNIST script as a user runs it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import one_shot_mnist
import pytest
from experiment.data import Dataset, load_dataset

SCRIPT = Path(__file__).parents[2] / "simulations" / "one_shot_mnist.py"
PACKED = Path(__file__).parents[3] / "shared" / "data" / "unpack.py"


@pytest.mark.slow
@pytest.mark.skipif(not PACKED.is_file(), reason="the packed MNIST is not next to this checkout")
def test_least_squares_merges_small_clients_where_the_average_fails(tmp_path: Path) -> None:
    command = [sys.executable, str(PACKED), str(tmp_path), "--only", "mnist"]
    subprocess.run(command, check=True, capture_output=True)
    out = tmp_path / "out"
    options = ["--settings", "dirichlet-0.5", "--methods", "rebasin+lsq"]
    command = [sys.executable, str(SCRIPT), "--data-dir", str(tmp_path), "--out", str(out)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    (only,) = results["runs"]
    assert (only["setting"], only["seed"]) == ("dirichlet-0.5", 0)
    accuracy = {name: row["joint_accuracy"] for name, row in only["methods"].items()}
    assert accuracy["naive"] < 0.6
    assert accuracy["rebasin+lsq"] > 0.82
    assert results["summary"]["dirichlet-0.5"]["naive"]["joint_accuracy"][0] == accuracy["naive"]


def test_results_have_every_setting_and_seed(
    tmp_path: Path, simulate_in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digits(data_dir: Path) -> Dataset:
        return load_dataset("digits", data_dir)

    monkeypatch.setattr(one_shot_mnist, "EPOCHS", 2)
    monkeypatch.setattr(one_shot_mnist, "load_mnist", digits)
    monkeypatch.setattr("experiment.client.load_mnist", digits)
    monkeypatch.setattr(one_shot_mnist, "simulate", simulate_in_process)
    options = ["--settings", "iid", "dirichlet-0.5", "--seeds", "3", "--methods", "naive+lsq"]
    one_shot_mnist.run([*options, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    found = [(run["setting"], run["seed"]) for run in results["runs"]]
    assert found == [("iid", 3), ("dirichlet-0.5", 3)]
    assert results["summary"].keys() == {"iid", "dirichlet-0.5"}
    for run in results["runs"]:
        assert {"naive", "rebasin+bn", "naive+lsq"} < run["methods"].keys()
        assert sum(run["images"]) == 1297


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--settings", "all"], "'all' (choose from"),
        (["--methods", "best"], "--methods best is unknown: use all, or any of"),
        (["--seeds", "-1"], "--seeds -1 is negative"),
    ],
)
def test_invalid_input_is_reported_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    assert words in error_of(one_shot_mnist.main, "--out", str(out), *arguments)
    assert not out.exists()


def test_error_says_that_mnist_is_missing(
    tmp_path: Path, error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("experiment.data.MNIST", no_network)
    out = tmp_path / "out"
    options = ["--data-dir", str(tmp_path / "none"), "--out", str(out)]
    error = error_of(one_shot_mnist.main, *options)
    assert "MNIST is not in" in error
    assert "could not be downloaded (no network)" in error
    assert not out.exists()
