"""The main job as a user runs it: real data, real Flower, real mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cifar100_split
import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "simulations" / "cifar100_split.py"
PACKED = Path(__file__).parents[3] / "shared" / "data" / "unpack.py"
BARRIERS = {"naive", "naive+bn", "rebasin", "rebasin+bn"}
GOING_ON = {"naive+lsq", "rebasin+lsq", "rebasin+guard"}
METHODS = BARRIERS | GOING_ON | {
    "client-0", "client-1", "best-client-debiased", "ensemble-prob", "ensemble-logit", "oracle",
}  # fmt: skip


def run(*arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def real_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """Two rounds on real CIFAR-100, or on digits where the data do not lie beside the checkout."""
    out = tmp_path_factory.mktemp("results")
    if PACKED.is_file():
        folder = request.getfixturevalue("cifar_dir")
        data = [
            "--dataset",
            "cifar100",
            "--data-dir",
            str(folder),
            "--limit",
            "500",
            "--width",
            "8",
        ]
    else:
        data = ["--dataset", "digits"]
    options = ["--epochs", "2", "--rounds", "2", "--init", "shared", "--methods", "all"]
    done = run(*data, *options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "rebasin+bn" in done.stdout
    assert "joint accuracy in % by round" in done.stdout
    return json.loads((out / "results.json").read_text()), out


def test_results_have_every_method_and_measure(real_run: tuple[dict[str, Any], Path]) -> None:
    results, out = real_run
    assert results["dataset"] == ("cifar100" if PACKED.is_file() else "digits")
    assert {"python", "torch", "flwr", "hardware", "commit"} <= results["versions"].keys()
    (only,) = results["runs"]
    assert only["methods"].keys() == METHODS == results["summary"].keys()
    for name, row in only["methods"].items():
        assert 0 < row["joint_accuracy"] < 1, name
        assert row["joint_loss"] > 0
        assert 0 <= row["ece"] <= 1
        assert len(row["part_accuracy"]) == 2
        assert results["summary"][name]["joint_accuracy"] == [row["joint_accuracy"], None]
        assert ("loss_barrier" in row) == (name in BARRIERS)
    for kind in ("naive", "rebasin"):
        assert only["barrier"][kind].keys() == {"loss", "accuracy"}
        assert len(only["curves"][kind]["losses"]) == 25
    assert (out / "interpolation.png").read_bytes().startswith(b"\x89PNG")
    assert not [path.name for path in out.iterdir() if "part" in path.name]


def test_rounds_say_what_both_arms_did(real_run: tuple[dict[str, Any], Path]) -> None:
    (only,) = real_run[0]["runs"]
    first, second = only["rounds"]
    assert [first["round"], second["round"]] == [1, 2]
    assert first.keys() - second.keys() == {"rebasin-activation+bn", "rebasin-ste+bn"}
    for arm in {"naive+bn", "rebasin+bn", *GOING_ON}:
        # The rows are the models after the last round.
        assert only["methods"][arm]["joint_accuracy"] == second[arm]["joint_accuracy"]
    assert second["rebasin+bn"]["train"]["rebasin-units-moved"] >= 0
    assert "rebasin-units-moved" not in second["naive+bn"]["train"]
    if real_run[0]["config"]["norm"] == "batch":
        assert first["rebasin+bn"]["train"]["batchnorm-clients"] == 2
        assert first["rebasin+lsq"]["train"]["least-squares-clients"] == 2
        assert second["naive+bn"]["train"]["batchnorm-clients"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "mnist"], "'mnist' (choose from"),
        (["--init", "same"], "'same' (choose from"),
        (["--epochs", "three"], "'three'"),
        (["--unknown"], "--unknown"),
        (["--clients", "1"], "--clients 1 is too small: give at least 2"),
        (["--width", "0"], "--width 0 is too small: give at least 1"),
        (["--rounds", "0"], "--rounds 0 is too small"),
        (["--epochs", "0"], "--epochs 0 is too small"),
        (["--limit", "-1"], "--limit -1 is too small"),
        (["--seeds", "-1"], "--seeds -1 is negative"),
        (["--seeds", "1", "1"], "repeats a seed"),
        (["--methods", "fedavg"], "--methods fedavg is unknown: use all, or some of naive, "),
        (["--methods", "naive+lsq", "naive+lsq"], "repeats a name: give each once"),
        (["--split", "30-80"], "'30-80' adds up to 110"),
        (["--split", "dirichlet:0"], "'dirichlet:0': ALPHA must be"),
        (["--split", "sorted"], "unknown split 'sorted'"),
        (["--split", "50-50", "--clients", "11"], "at most 10 clients"),
        (["--clients", "5000"], "5000 clients are more than the 1297 images"),
        (["--split", "dirichlet:0.01", "--clients", "40"], "without images: use fewer clients"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    command = ["cifar100_split.py", "--dataset", "digits", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        cifar100_split.main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(cifar100_split.UserError, match="cannot be written"):
        cifar100_split.check_writable(tmp_path / "out")


def test_an_out_that_is_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = run("--dataset", "digits", "--out", str(file))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"--out {file} cannot be written" in done.stderr
    assert file.read_bytes() == b""


def test_ctrl_c_ends_soon_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--dataset", "digits", "--epochs", "2000",
               "--out", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / "flower.log"
    for _ in range(600):
        if log.exists() and "ActorPool with: 2" in log.read_text():
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
    assert [path.name for path in tmp_path.iterdir()] == ["flower.log"]


def test_digits_in_place_of_cifar100_are_told_on_the_first_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(folder: Path) -> None:
        raise OSError("[Errno -3] no network")

    def stop(*arguments: Any) -> None:
        raise cifar100_split.UserError("far enough")

    monkeypatch.setattr("experiment.data._download_cifar100", no_network)
    monkeypatch.setattr(cifar100_split, "simulate", stop)
    options = ["--data-dir", str(tmp_path / "empty"), "--out", str(tmp_path)]
    with pytest.raises(cifar100_split.UserError, match="far enough"):
        cifar100_split.run(options)
    first = capsys.readouterr().out.splitlines()[0]
    assert "nor can it be downloaded ([Errno -3] no network)" in first
    assert "handwritten digits instead" in first
    with pytest.raises(cifar100_split.UserError, match="nor can it be downloaded"):
        cifar100_split.run(["--dataset", "cifar100", *options])
