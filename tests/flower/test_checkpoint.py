"""A run that is interrupted and resumed ends like an uninterrupted one, bit for bit."""

from __future__ import annotations

import builtins
import errno
import json
import os
import random
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, prepare
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedYogi,
    MultiKrum,
    Strategy,
)
from interrupted import (
    NODES,
    aligned,
    client,
    everything,
    net,
    resumable,
    run,
    template,
)
from safetensors.numpy import load_file, save_file
from torch import nn

from fl_rebasin.flower import Checkpointed, WrappedStrategy, load_checkpoint
from fl_rebasin.flower.checkpoint import files

ROUNDS = 3
HALF = {"fraction_train": 0.5}
"""Two of four clients per round, drawn from Python's random state."""


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


class Restless(FedAvg):
    """Keeps state of many types, and sends its clients a config that depends on it."""

    def __init__(self, shared: np.random.Generator) -> None:
        super().__init__(**HALF)
        self.shared = shared
        self.python = random.Random(3)
        self.torch = torch.Generator().manual_seed(3)
        self.legacy = np.random.RandomState(3)
        self.seen: dict[int, list[float]] = {}
        self.half = torch.ones(2, dtype=torch.bfloat16)
        self.nested: Any = None
        self.scratch = 1
        self.offset = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        drawn = [
            self.shared.random(),
            self.python.random(),
            float(torch.rand((), generator=self.torch)),
            float(self.legacy.normal()),
        ]
        self.seen[server_round] = drawn
        self.half = self.half * 1.01
        self.nested = (OrderedDict(b=np.asarray(drawn, dtype=">f4")), {1: arrays, "1": -0.0})
        if server_round == 1:
            self.offset = drawn[0] / 100
        if server_round == 2:
            del self.scratch
        # As Flower's own examples change the learning rate.
        config["lr"] *= 0.5 + sum(sum(each) for each in self.seen.values()) / 100
        config["lr"] += float(self.half.sum()) / 1e4 + self.offset
        config["lr"] *= 2 if hasattr(self, "scratch") else 1
        return super().configure_train(server_round, arrays, config, grid)


class Counting(WrappedStrategy):
    """A wrapper with state, and a generator that it shares with the wrapped strategy."""

    def __init__(self, strategy: Strategy, shared: np.random.Generator) -> None:
        super().__init__(strategy)
        self.shared = shared
        self.total = 0.0

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        self.total += self.shared.random()
        arrays, metrics = super().aggregate_train(server_round, replies)
        return arrays, MetricRecord({**(metrics or {}), "total": self.total})


def restless() -> Strategy:
    shared = np.random.default_rng(3)
    return Counting(Restless(shared), shared)


INNER: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: FedAvg(**HALF),
    "FedAvgM": lambda: FedAvgM(**HALF, server_learning_rate=0.7, server_momentum=0.9),
    "FedAdagrad": lambda: FedAdagrad(**HALF, eta=0.01),
    "FedAdam": lambda: FedAdam(**HALF, eta=0.01),
    "FedYogi": lambda: FedYogi(**HALF, eta=0.01),
    "FedMedian": lambda: FedMedian(**HALF),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2),
    "fixed(FedAvg)": lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.05, 0.1, 4),
    "adaptive(FedAvgM)": lambda: DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvgM(server_momentum=0.9), 0.05, 4
    ),
    "client-adaptive(FedAdam)": lambda: DifferentialPrivacyClientSideAdaptiveClipping(
        FedAdam(), 0.05, 4
    ),
    "fixed(adaptive(FedAvg))": lambda: DifferentialPrivacyServerSideFixedClipping(
        DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.05, 4), 0.05, 0.1, 4
    ),
    "restless": restless,
}


class InterruptionError(Exception):
    """Interrupts the server."""


def failing_at(exchange: int) -> Federation:
    """A federation that interrupts the server in its n-th exchange, of two in each round."""
    world = Federation({node: client(node) for node in NODES})
    sent = 0

    def deliver(messages: Iterable[Message], *, timeout: float | None) -> list[Message]:
        nonlocal sent
        messages = list(messages)
        if sent == exchange:
            raise InterruptionError
        sent += 1
        return world.deliver(messages, timeout=timeout)

    world.grid.send_and_receive.side_effect = deliver
    return world


def interrupt(strategy: Strategy, exchange: int) -> None:
    with pytest.raises(InterruptionError):
        run(strategy, ROUNDS, failing_at(exchange))


def done(folder: Path, rounds: int = 2) -> Path:
    """Fill a folder with the checkpoints of a run."""
    run(aligned(FedAdam(), folder), rounds)
    return folder


def resumed(folder: Path, rounds: int = ROUNDS, inner: Strategy | None = None, **options: Any):
    return run(aligned(inner or FedAdam(), folder, resume=True, **options), rounds, seed=99)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def round_name(number: int) -> str:
    return f"round-{number:06d}.safetensors"


def check_interrupted(name: str, exchange: int, folder: Path, expected: list[Any]) -> None:
    """Interrupt a run, resume it and compare the result."""
    interrupt(aligned(INNER[name](), folder), exchange)
    assert len(names(folder)) == min(exchange // 2, 3)
    # Another seed where a checkpoint must restore the random state.
    seed = 99 if names(folder) else 7
    result = run(aligned(INNER[name](), folder, resume=True), ROUNDS, seed=seed)
    assert everything(result) == expected, f"interrupted in exchange {exchange}"


@pytest.mark.parametrize("name", INNER)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = everything(run(aligned(INNER[name]()), ROUNDS))
    assert everything(run(aligned(INNER[name](), tmp_path / "whole"), ROUNDS)) == expected
    check_interrupted(name, 3, tmp_path / "interrupted", expected)
    assert not [r for r in caplog.records if "checkpoint cannot hold" in r.getMessage()]


@pytest.mark.parametrize(
    "name",
    [name if name == "restless" else pytest.param(name, marks=pytest.mark.slow) for name in INNER],
)
def test_a_run_may_be_interrupted_in_any_exchange(name: str, tmp_path: Path) -> None:
    expected = everything(run(aligned(INNER[name]()), ROUNDS))
    for exchange in range(2 * ROUNDS):
        check_interrupted(name, exchange, tmp_path / str(exchange), expected)


def test_a_run_may_be_interrupted_again_and_again(tmp_path: Path) -> None:
    expected = everything(run(aligned(restless()), 6))
    for number in range(1, 6):
        strategy = aligned(restless(), tmp_path, resume=True, keep=1)
        with pytest.raises(InterruptionError):
            run(strategy, 6, failing_at(3), seed=7 if number == 1 else number)
        assert names(tmp_path) == [round_name(number)]
    result = resumed(tmp_path, 6, restless())
    assert everything(result) == expected


def test_the_same_object_can_resume(tmp_path: Path) -> None:
    expected = everything(run(aligned(restless()), 4))
    strategy = aligned(restless(), tmp_path, resume=True)
    run(strategy, 2)
    run(strategy, 3, seed=99)
    # The last file also holds what did not change after the second start.
    assert everything(resumed(tmp_path, 4, restless())) == expected


@pytest.mark.parametrize(
    ("rounds", "calls", "random_deaths"),
    [(9, 1, 4), pytest.param(45, 3, 20, marks=pytest.mark.slow)],
)
def test_a_killed_run_ends_like_an_uninterrupted_one(
    rounds: int, calls: int, random_deaths: int, tmp_path: Path
) -> None:
    expected = everything(resumable(tmp_path / "whole", rounds))
    folder = tmp_path / "killed"
    folder.mkdir()
    here = Path(__file__).parent
    numbers = map(str, (rounds, calls, random_deaths))
    script = subprocess.run(
        [sys.executable, str(here / "interrupted.py"), str(folder), *numbers],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{here.parents[1]}:{here.parent}:{here}"},
        timeout=500,
    )
    assert script.returncode == 0, script.stderr[-3000:]
    deaths = json.loads(script.stdout.splitlines()[-1])
    assert len(deaths) == 7 * calls + random_deaths, "a run survived"
    assert any("unfinished" in death for death in deaths)
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(expected))
    assert names(folder) == ["result.json", round_name(rounds - 1), round_name(rounds)]


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(aligned(FedAdam(), tmp_path, keep=2), 5)
    assert names(tmp_path) == [round_name(4), round_name(5)]


def test_the_wrapped_strategy_gets_the_numbers_of_the_whole_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    class Observed(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            seen.append(("train", server_round))
            return super().aggregate_train(server_round, replies)

        def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
            seen.append(("evaluate", server_round))
            return super().aggregate_evaluate(server_round, replies)

    strategy = aligned(Observed(), tmp_path)
    run(strategy, 2)
    seen.clear()
    caplog.clear()
    world = Federation({node: client(node) for node in NODES})
    result = run(aligned(Observed(), tmp_path, resume=True), 4, world)
    assert seen == [("train", 3), ("evaluate", 3), ("train", 4), ("evaluate", 4)]
    configs = [message.content.config_records["config"] for message in world.sent]
    assert {config["server-round"] for config in configs[: 2 * len(NODES)]} <= {3, 4}
    assert "this is round 3 of 4" in caplog.messages
    assert f"2 of 4 rounds are done: resumed from the checkpoints in {tmp_path}" in caplog.messages
    assert list(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert list(result.evaluate_metrics_clientapp) == [1, 2, 3, 4]
    assert list(result.evaluate_metrics_serverapp) == [0, 1, 3, 4]


@pytest.mark.parametrize("rounds", [1, 2])
def test_nothing_runs_once_all_rounds_are_done(
    rounds: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = everything(run(aligned(FedAdam(), tmp_path), 2))
    world = failing_at(0)
    strategy = aligned(FedAdam(), tmp_path, resume=True)
    caplog.clear()
    assert everything(run(strategy, rounds, world)) == expected
    (line,) = caplog.messages
    assert f"2 of {rounds} rounds are done" in line


def test_a_run_of_no_rounds_evaluates_the_initial_model(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        result = run(aligned(FedAdam(), folder), 0)
        assert list(result.evaluate_metrics_serverapp) == [0]
        assert len(result.arrays) == 0


def test_rounds_without_an_aggregate_return_no_model(tmp_path: Path) -> None:
    def idle() -> Strategy:
        return FedAvg(fraction_train=0.0)

    assert len(run(aligned(idle(), tmp_path), 1).arrays) == 0
    result = resumed(tmp_path, 2, idle())
    assert len(result.arrays) == 0
    assert load_checkpoint(tmp_path / round_name(2)).aggregated is False


def test_evaluate_fn_is_optional(tmp_path: Path) -> None:
    world = Federation({node: client(node) for node in NODES})
    initial = ArrayRecord(template().model.state_dict())
    result = aligned(FedAvg(), tmp_path).start(world.grid, initial, 1)
    assert result.evaluate_metrics_serverapp == {}
    result = aligned(FedAvg(), tmp_path, resume=True).start(world.grid, initial, 2)
    assert result.evaluate_metrics_serverapp == {}
    assert list(result.train_metrics_clientapp) == [1, 2]


def test_a_resumed_run_uses_its_own_arguments(tmp_path: Path) -> None:
    done(tmp_path)
    inner = FedAdam(eta=0.5, fraction_train=0.5)
    resumed(tmp_path, inner=inner)
    assert (inner.eta, inner.fraction_train) == (0.5, 0.5)
    assert inner.m_t is not None


def test_a_checkpoint_holds_the_model_and_the_metrics(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    result = run(aligned(FedAdam(), folder), 2)
    found = load_checkpoint(folder / round_name(2))
    assert found.round == 2
    assert list(found.arrays) == list(template().model.state_dict())
    for key, array in result.arrays.items():
        assert found.arrays[key] == array, key
    assert found.arrays["1.num_batches_tracked"].shape == ()
    assert repr(found.train_metrics_clientapp) == repr(result.train_metrics_clientapp)
    assert repr(found.evaluate_metrics_serverapp) == repr(result.evaluate_metrics_serverapp)
    stored = load_file(folder / round_name(2))
    for key, array in result.arrays.items():
        np.testing.assert_array_equal(stored[f"model/{key}"], array.numpy())
        assert stored[f"model/{key}"].dtype == np.dtype(array.dtype)


# Values that cannot be stored.


class Ledger:
    """Counts, and has a type that no checkpoint can hold."""

    def __init__(self) -> None:
        self.entries = [0]


class WithLedger(FedAvg):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.untouched = Ledger()
        self.function: Callable[[], int] = lambda: 1

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        self.ledger.entries[0] += 1
        if server_round > 1:
            self.function = lambda: 2
        return super().aggregate_train(server_round, replies)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_what_cannot_be_stored_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [
        "a checkpoint cannot hold WithLedger.ledger (Ledger): a resumed run starts without it",
        "a checkpoint cannot hold WithLedger.function (function): a resumed run starts without it",
    ]
    run(aligned(WithLedger(), tmp_path), 3)
    assert warnings_of(caplog) == expected
    caplog.clear()
    inner = WithLedger()
    resumed(tmp_path, 5, inner)
    assert sorted(warnings_of(caplog)) == sorted(expected)
    assert inner.ledger.entries == [2]


# Folders with missing, damaged or foreign checkpoints.


def test_existing_checkpoints_are_not_ignored(tmp_path: Path) -> None:
    done(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(ValueError, match=r"newest is round-000002.*resume=True.*another") as error:
        run(aligned(FedAdam(), tmp_path), 3, failing_at(0))
    assert str(tmp_path) in str(error.value)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_resume_without_a_checkpoint_starts_at_round_1(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = everything(run(aligned(FedAdam()), 2))
    result = run(aligned(FedAdam(), tmp_path / "new", resume=True), 2)
    assert everything(result) == expected
    assert f"no checkpoint in {tmp_path / 'new'}: starting at round 1" in caplog.messages


def test_a_half_written_file_is_removed(tmp_path: Path) -> None:
    left = tmp_path / (round_name(9) + ".unfinished")
    other = tmp_path / "notes.unfinished"
    for path in (left, other):
        path.write_bytes(b"half")
    run(aligned(FedAdam(), tmp_path), 1)
    assert names(tmp_path) == [other.name, round_name(1)]


def _with_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the content of a file, and give it a digest that matches."""
    with files.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    text = json.dumps(change(json.loads(metadata["content"])))
    digest = files.digest_of(text, arrays)
    save_file(arrays, path, {**metadata, "content": text, "digest": digest})


def _with_metadata(path: Path, **changes: str) -> None:
    with files.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, **changes})


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 100), "cannot be read"),
    "truncated header": (lambda path: os.truncate(path, 500), "cannot be read"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cannot be read"),
    "garbage": (lambda path: path.write_bytes(random.Random(1).randbytes(9999)), "cannot be read"),
    "a bit": (_flipped, "does not match its digest"),
    "no metadata": (lambda path: save_file(load_file(path), path), "format is None"),
    "version": (lambda path: _with_metadata(path, format="fl_rebasin.checkpoint/9"), "reads 'fl_"),
    "content": (lambda path: _with_metadata(path, content="{}"), "does not match its digest"),
    "no JSON": (
        lambda path: _with_metadata(
            path, content="{", digest=files.digest_of("{", load_file(path))
        ),
        "double quotes",
    ),
    "other JSON": (lambda path: _with_json(path, lambda content: []), "cannot be read"),
    "missing field": (
        lambda path: _with_json(
            path, lambda content: {k: v for k, v in content.items() if k != "model"}
        ),
        "model",
    ),
    "unknown node": (
        lambda path: _with_json(path, lambda content: {**content, "state": {"surprise": 1}}),
        "surprise",
    ),
    "other round": (
        lambda path: _with_json(path, lambda content: {**content, "round": 7}),
        "holds round 7",
    ),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_skipped_for_the_one_before_it(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = everything(run(aligned(FedAdam()), ROUNDS))
    done(tmp_path, 3)
    harm, words = DAMAGES[damage]
    harm(tmp_path / round_name(3))
    if damage == "folder":
        strategy = aligned(FedAdam(), tmp_path, resume=True)
        with pytest.raises(OSError, match="round 3 could not be written"):
            run(strategy, ROUNDS)
        (tmp_path / round_name(3)).rmdir()
    assert everything(resumed(tmp_path)) == expected
    if damage != "folder":
        (warning,) = warnings_of(caplog)
        assert "skipped" in warning
        assert round_name(3) in warning
        assert words in warning
    assert load_checkpoint(tmp_path / round_name(3)).round == 3


def test_a_folder_of_damaged_files_is_an_error(tmp_path: Path) -> None:
    done(tmp_path)
    for name in names(tmp_path):
        os.truncate(tmp_path / name, 100)
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints.*move them away"):
        resumed(tmp_path)


def test_damaged_files_of_later_rounds_do_not_displace_good_ones(tmp_path: Path) -> None:
    done(tmp_path, 3)
    for number in (2, 3):
        os.truncate(tmp_path / round_name(number), 100)
    strategy = aligned(FedAdam(), tmp_path, resume=True, keep=1)
    with pytest.raises(InterruptionError):
        run(strategy, ROUNDS, failing_at(2))
    assert load_checkpoint(tmp_path / round_name(2)).round == 2
    assert everything(resumed(tmp_path)) == everything(run(aligned(FedAdam()), ROUNDS))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: nn.Linear(3, 6), r" weight is missing in the checkpoint, float32 \(6, 3\) in"),
        (lambda: net()[:3], r"3\.weight is float32 \(2, 6\) in the checkpoint, missing in"),
        (
            lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
            r"0\.weight is float32 \(6, 3\) in the checkpoint, float32 \(8, 3\) in",
        ),
        (
            lambda: net().double(),
            r"0\.weight is float32 \(6, 3\) in the checkpoint, float64 \(6, 3\) in",
        ),
        (
            lambda: nn.Sequential(*net(), nn.Linear(2, 2)),
            r"4\.weight is missing in the checkpoint, float32",
        ),
    ],
)
def test_another_architecture_is_refused(
    other: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    done(tmp_path)
    strategy = aligned(FedAdam(), tmp_path, resume=True)
    with pytest.raises(ValueError, match=words + r".*use the model.*another folder"):
        strategy.start(failing_at(0).grid, ArrayRecord(other().state_dict()), 3)


def test_another_order_of_keys_is_refused(tmp_path: Path) -> None:
    done(tmp_path)
    state = dict(reversed(net().state_dict().items()))
    strategy = aligned(FedAdam(), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"0\.weight where the initial model has 3\.bias; use"):
        strategy.start(failing_at(0).grid, ArrayRecord(state), 3)


def test_other_strategies_are_refused(tmp_path: Path) -> None:
    done(tmp_path)
    words = r"ReBasinStrategy\(FedAdam\), this run uses ReBasinStrategy\(FedYogi\): use the same"
    with pytest.raises(ValueError, match=words):
        resumed(tmp_path, inner=FedYogi())


@pytest.mark.parametrize("keep", [0, -1, 2.0, True, None])
def test_keep_must_be_a_positive_int(keep: Any) -> None:
    with pytest.raises(ValueError, match=f"keep must be an int of at least 1, got {keep}"):
        Checkpointed(FedAvg(), "here", keep=keep)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"file is a file: give a folder"):
        Checkpointed(FedAvg(), file)


@pytest.mark.parametrize("strategy_type", [FedAvg, FedAdam, FedMedian])
def test_any_flower_strategy_can_be_wrapped(strategy_type: type[FedAvg], tmp_path: Path) -> None:
    """Plain `FedAvg` turns integers, and `FedAdam` all arrays, into float64."""
    expected = everything(run(strategy_type(**HALF), ROUNDS))
    interrupt(Checkpointed(strategy_type(**HALF), tmp_path), 3)
    strategy = Checkpointed(strategy_type(**HALF), tmp_path, resume=True)
    assert everything(run(strategy, ROUNDS, seed=99)) == expected


def test_the_folder_may_be_a_string(tmp_path: Path) -> None:
    run(Checkpointed(FedAvg(), str(tmp_path / "new"), keep=1), 2)
    assert names(tmp_path / "new") == [round_name(2)]


def test_checkpointed_must_be_the_outermost_strategy(tmp_path: Path) -> None:
    outer = DifferentialPrivacyServerSideFixedClipping(aligned(FedAvg(), tmp_path), 0.1, 1.0, 4)
    with pytest.raises(ValueError, match="make it the outermost strategy"):
        run(outer, 1)
    assert names(tmp_path) == []


# Errors while writing.


def _fails(code: int) -> Callable[..., None]:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the disk full when half of the file is written."""
    true_open = builtins.open

    def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = true_open(path, mode, *args, **options)
        if "unfinished" not in str(path):
            return file

        class Half:
            def __enter__(self) -> Half:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def write(self, data: bytes) -> None:
                file.write(data[: len(data) // 2])
                _fails(errno.ENOSPC)()

        return Half()

    monkeypatch.setattr(builtins, "open", opened)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_full_disk, "No space left"),
        (lambda patch: patch.setattr(os, "replace", _fails(errno.EACCES)), "Permission denied"),
        (lambda patch: patch.setattr(os, "fsync", _fails(errno.EIO)), "Input/output error"),
    ],
)
def test_an_error_while_writing_leaves_earlier_checkpoints_unchanged(
    fault: Callable[[pytest.MonkeyPatch], None],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with monkeypatch.context() as patch:
        fault(patch)
        expected = rf"checkpoint of round 3 could not be written .*{words}.*unchanged.*resume"
        with pytest.raises(OSError, match=expected):
            resumed(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert everything(resumed(tmp_path)) == everything(run(aligned(FedAdam()), ROUNDS))
