"""The main script as a user runs it: results, invalid input, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cifar100_split
import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "simulations" / "cifar100_split.py"
PACKED = Path(__file__).parents[3] / "shared" / "data" / "unpack.py"
WITH_BARRIER = {"naive", "naive+bn", "rebasin", "rebasin+bn"}
CONTINUED = {"naive+lsq", "rebasin+lsq", "naive+head", "rebasin+lsq+head", "rebasin+guard"}
CONTROLS = {"client-0", "client-1", "best-client-debiased", "ensemble-prob", "ensemble-logit"} | {
    "best-body+head",
    "untrained-body+head",
}
METHODS = WITH_BARRIER | CONTINUED | CONTROLS | {"oracle"}
OPTIONS = ["--epochs", "2", "--rounds", "2", "--init", "shared", "--methods", "all"]

Results = dict[str, Any]


@pytest.fixture(scope="module", params=["in-process", pytest.param("ray", marks=pytest.mark.slow)])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Results, Path]:
    """The results of two rounds of a BatchNorm model, and the folder that holds them.

    In this process the data are digits. On Ray they are CIFAR-100 if it is next to the checkout.
    """
    out = tmp_path_factory.mktemp("results")
    digits = ["--dataset", "digits", "--norm", "batch", "--width", "64"]
    if request.param == "in-process":
        with pytest.MonkeyPatch.context() as patch:
            simulate = request.getfixturevalue("simulate_in_process")
            patch.setattr(cifar100_split, "simulate", simulate)
            cifar100_split.run([*digits, *OPTIONS, "--out", str(out)])
    else:
        data = digits
        if PACKED.is_file():
            folder = str(request.getfixturevalue("cifar_dir"))
            data = ["--dataset", "cifar100", "--data-dir", folder, "--limit", "500", "--width", "8"]
        command = [sys.executable, str(SCRIPT), *data, *OPTIONS, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
        assert "rebasin+bn" in done.stdout
        assert "joint accuracy in % by round" in done.stdout
    return json.loads((out / "results.json").read_text()), out


def test_results_have_every_method_and_measure(finished: tuple[Results, Path]) -> None:
    results, out = finished
    assert {"python", "torch", "flwr", "hardware", "commit"} <= results["versions"].keys()
    (only,) = results["runs"]
    assert only["methods"].keys() == METHODS == results["summary"].keys()
    for name, row in only["methods"].items():
        assert 0 < row["joint_accuracy"] < 1, name
        assert row["joint_loss"] > 0
        assert 0 <= row["ece"] <= 1
        assert len(row["part_accuracy"]) == 2
        assert results["summary"][name]["joint_accuracy"] == [row["joint_accuracy"], None]
        assert ("loss_barrier" in row) == (name in WITH_BARRIER)
    for kind in ("naive", "rebasin"):
        assert only["barrier"][kind].keys() == {"loss", "accuracy"}
        assert len(only["curves"][kind]["losses"]) == 25
    assert (out / "interpolation.png").read_bytes().startswith(b"\x89PNG")
    assert not [path.name for path in out.iterdir() if "part" in path.name]


def test_each_round_reports_every_method_that_takes_part(finished: tuple[Results, Path]) -> None:
    (only,) = finished[0]["runs"]
    first, second = only["rounds"]
    assert [first["round"], second["round"]] == [1, 2]
    matched_otherwise = {"rebasin-activation+bn", "rebasin-ste+bn", "rebasin+head"}
    bodies = {"body-0+head", "body-1+head"}
    controls = bodies | {"untrained-body+head"}
    assert first.keys() - second.keys() == matched_otherwise | controls
    for name in {"naive+bn", "rebasin+bn", *CONTINUED}:
        # The table shows the models after the last round.
        assert only["methods"][name]["joint_accuracy"] == second[name]["joint_accuracy"]
    assert second["rebasin+bn"]["train"]["rebasin-units-moved"] >= 0
    assert "rebasin-units-moved" not in second["naive+bn"]["train"]
    assert first["rebasin+bn"]["train"]["batchnorm-clients"] == 2
    assert first["rebasin+lsq"]["train"]["least-squares-clients"] == 2
    assert second["naive+bn"]["train"]["batchnorm-clients"] == 2
    assert first["rebasin+lsq+head"]["train"]["joint-head-messages"] == 10
    best = max(first[name]["joint_accuracy"] for name in bodies)
    assert only["methods"]["best-body+head"]["joint_accuracy"] == best


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "mnist"], "'mnist' (choose from"),
        (["--init", "same"], "'same' (choose from"),
        (["--epochs", "three"], "'three'"),
        (["--unknown"], "--unknown"),
        (["--clients", "1"], "--clients 1 is too small: it must be at least 2"),
        (["--width", "0"], "--width 0 is too small: it must be at least 1"),
        (["--rounds", "0"], "--rounds 0 is too small"),
        (["--epochs", "0"], "--epochs 0 is too small"),
        (["--limit", "-1"], "--limit -1 is too small"),
        (["--seeds", "-1"], "--seeds -1 is negative"),
        (["--seeds", "1", "1"], "repeats a seed"),
        (["--methods", "fedavg"], "--methods fedavg is unknown: use all, or any of naive, "),
        (["--methods", "naive+lsq", "naive+lsq"], "repeats a name: list each name once"),
        (["--split", "30-80"], "'30-80' adds up to 110"),
        (["--split", "dirichlet:0"], "'dirichlet:0': ALPHA must be"),
        (["--split", "sorted"], "unknown split 'sorted'"),
        (["--split", "50-50", "--clients", "11"], "at most 10 clients"),
        (["--clients", "5000"], "5000 clients cannot share 1297 images"),
        (["--split", "dirichlet:0.01", "--clients", "40"], "without images: use fewer clients"),
    ],
)
def test_invalid_input_is_reported_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    options = ["--dataset", "digits", "--out", str(out), *arguments]
    assert words in error_of(cifar100_split.main, *options)
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_error_names_an_out_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(cifar100_split.UserError, match="cannot be written"):
        cifar100_split.check_writable(tmp_path / "out")


def test_error_names_an_out_that_is_a_file(tmp_path: Path, error_of: Callable[..., str]) -> None:
    file = tmp_path / "file"
    file.touch()
    error = error_of(cifar100_split.main, "--dataset", "digits", "--out", str(file))
    assert f"--out {file} cannot be written" in error
    assert file.read_bytes() == b""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder with a path that is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_ctrl_c_during_training_ends_soon_and_leaves_no_process(
    tmp_path: Path, short_folder: Path
) -> None:
    out = tmp_path / "out"
    options = ["--dataset", "digits", "--width", "8", "--epochs", "2000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(short_folder)},
    )
    for _ in range(1200):
        if list(short_folder.glob("fl-rebasin-*/*client*.json")):
            break
        assert process.poll() is None
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in started)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors.decode()
    assert errors.decode().splitlines()[-1] == "interrupted: no results were written"
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
    assert [path.name for path in out.iterdir()] == ["flower.log"]
    assert not list(short_folder.glob("fl-rebasin-*"))


def test_first_line_says_that_digits_replace_cifar100(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(folder: Path) -> None:
        raise OSError("[Errno -3] no network")

    def stop(*arguments: Any) -> None:
        raise cifar100_split.UserError("stopped before training")

    monkeypatch.setattr("experiment.data._download_cifar100", no_network)
    monkeypatch.setattr(cifar100_split, "simulate", stop)
    options = ["--data-dir", str(tmp_path / "empty"), "--out", str(tmp_path)]
    with pytest.raises(cifar100_split.UserError, match="stopped before training"):
        cifar100_split.run(options)
    first = capsys.readouterr().out.splitlines()[0]
    assert "could not be downloaded ([Errno -3] no network)" in first
    assert "handwritten digits instead" in first
    with pytest.raises(cifar100_split.UserError, match="could not be downloaded"):
        cifar100_split.run(["--dataset", "cifar100", *options])
