"""The MNIST script as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import one_shot_mnist
import pytest

SCRIPT = Path(__file__).parents[2] / "simulations" / "one_shot_mnist.py"
PACKED = Path(__file__).parents[3] / "shared" / "data" / "unpack.py"


@pytest.mark.slow
@pytest.mark.skipif(not PACKED.is_file(), reason="the packed MNIST is not beside this checkout")
def test_least_squares_merges_small_clients_where_the_average_fails(tmp_path: Path) -> None:
    command = [sys.executable, str(PACKED), str(tmp_path), "--only", "mnist"]
    subprocess.run(command, check=True, capture_output=True)
    out = tmp_path / "out"
    arguments = ["--data-dir", str(tmp_path), "--out", str(out), "--settings", "dirichlet-0.5",
                 "--methods", "rebasin+lsq"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    (only,) = results["runs"]
    assert (only["setting"], only["seed"]) == ("dirichlet-0.5", 0)
    accuracy = {name: row["joint_accuracy"] for name, row in only["methods"].items()}
    assert accuracy["naive"] < 0.6
    assert accuracy["rebasin+lsq"] > 0.82
    assert results["summary"]["dirichlet-0.5"]["naive"]["joint_accuracy"][0] == accuracy["naive"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--settings", "all"], "'all' (choose from"),
        (["--methods", "best"], "--methods best is unknown: use all, or some of"),
        (["--seeds", "-1"], "--seeds -1 is negative"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["one_shot_mnist.py", "--out", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        one_shot_mnist.main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "out").exists()


def test_mnist_that_cannot_be_had_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("experiment.data.MNIST", no_network)
    command = [
        "one_shot_mnist.py",
        "--data-dir",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "o"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        one_shot_mnist.main()
    assert stopped.value.code == 2
    assert "MNIST is neither in" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
