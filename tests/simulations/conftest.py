"""Fixtures for the script tests: the scripts without Ray, and their error messages."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from experiment.client import make_client_app
from experiment.comparison import compare
from experiment.data import Dataset
from experiment.settings import Settings
from federation import Federation
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

Simulate = Callable[[Settings, Dataset, object, Path], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def simulate_in_process() -> Iterator[Simulate]:
    """Replaces `experiment.simulate.simulate`: the clients run in this process, not on Ray."""

    def simulate(
        settings: Settings, dataset: Dataset, console: object, log_file: Path
    ) -> list[dict[str, Any]]:
        contexts = {
            node: Context(1, node, {"partition-id": node - 1}, RecordDict(), {})
            for node in range(1, settings.clients + 1)
        }
        with tempfile.TemporaryDirectory() as folder:
            app = make_client_app(settings, Path(folder), threads=1)
            grid = Federation(dict.fromkeys(contexts, app), contexts).grid
            return [compare(settings, dataset, grid, seed, Path(folder)) for seed in settings.seeds]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield simulate


@pytest.fixture
def error_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs a program with arguments that it rejects; returns the single line of its error."""

    def error(main: Callable[[], None], *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return error
