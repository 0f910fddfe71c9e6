"""Checkpoint files: one safetensors file per round, written completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.supercore import log
from safetensors import safe_open
from safetensors.numpy import save

from fl_rebasin.flower.checkpoint.codec import Arrays, decode, digest_of, encode

FORMAT = "fl_rebasin.checkpoint/1"
_NAME = re.compile(r"round-(\d{6,})\.safetensors")
_UNFINISHED = ".unfinished"
_ENCODED = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
    "state",
)


@dataclass(frozen=True)
class Checkpoint:
    """A run after one of its rounds.

    Attributes:
        round: number of rounds that are done.
        arrays: the global model.
        aggregated: whether any round so far has aggregated a model.
        train_metrics_clientapp: aggregated training metrics by round, as in Flower's `Result`.
        evaluate_metrics_clientapp: the clients' aggregated evaluation metrics by round.
        evaluate_metrics_serverapp: metrics that `evaluate_fn` returned, by round.
        state: what else a resumed run needs: the state of the strategies, the random state and
            the layout of the initial model.
    """

    round: int
    arrays: ArrayRecord
    aggregated: bool = True
    train_metrics_clientapp: dict[int, MetricRecord] = field(default_factory=dict)
    evaluate_metrics_clientapp: dict[int, MetricRecord] = field(default_factory=dict)
    evaluate_metrics_serverapp: dict[int, MetricRecord] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint to a folder, and keep only the newest `keep` of them.

    The file appears under its own name only once all of it is on the disk.

    Raises:
        OSError: the file could not be written; earlier checkpoints are unchanged.
    """
    path = folder / f"round-{checkpoint.round:06d}.safetensors"
    unfinished = path.with_name(path.name + _UNFINISHED)
    data = _packed(checkpoint)
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(folder)
    except OSError as error:
        _remove(unfinished)
        raise OSError(
            error.errno,
            f"the checkpoint of round {checkpoint.round} could not be written to {folder} "
            f"({error.strerror or error}); earlier checkpoints are unchanged: fix the cause, then "
            "continue with Checkpointed(..., resume=True)",
        ) from error
    # Files of later rounds do not count: they are damaged, or this run would have resumed there.
    done = [each for each in checkpoints_in(folder) if _round_of(each) <= checkpoint.round]
    for old in done[:-keep]:
        _remove(old)
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint that `Checkpointed` has written.

    Args:
        path: the file, `round-NUMBER.safetensors`.

    Raises:
        ValueError: the file is not a checkpoint, is damaged, or has another version's format.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile, numpy as np
        >>> from flwr.app import Array
        >>> folder = Path(tempfile.mkdtemp())
        >>> model = ArrayRecord({"weight": Array(np.ones(2, np.float32))})
        >>> path = save_checkpoint(folder, Checkpoint(7, model), keep=3)
        >>> path.name, load_checkpoint(path).arrays["weight"].numpy()
        ('round-000007.safetensors', array([1., 1.], dtype=float32))
    """
    path = Path(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"its format is {metadata.get('format')!r}, this version reads {FORMAT!r}"
            )
        if metadata["digest"] != digest_of(metadata["content"], arrays):
            raise ValueError("its content does not match its digest")
        return _unpacked(json.loads(metadata["content"]), arrays)
    except FileNotFoundError:
        raise
    except Exception as error:  # A damaged file may raise anything.
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest readable checkpoint of a folder, or None if the folder has no checkpoint.

    Raises:
        ValueError: the folder has checkpoints, but none can be read.
    """
    paths = checkpoints_in(folder)
    for path in reversed(paths):
        try:
            checkpoint = load_checkpoint(path)
            if checkpoint.round != _round_of(path):
                raise ValueError(f"{path} holds round {checkpoint.round}")
        except (OSError, ValueError) as error:
            log(WARNING, "checkpoint skipped: %s", error)
        else:
            return checkpoint
    if paths:
        raise ValueError(
            f"none of the {len(paths)} checkpoints in {folder} can be read: move them away to "
            "start at round 1, or use another folder"
        )
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoint files of a folder in the order of their rounds, damaged ones too."""
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=_round_of)


def remove_unfinished(folder: Path) -> None:
    """Remove the half-written file of a run that was killed."""
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name.removesuffix(_UNFINISHED)) and path.suffix == _UNFINISHED:
            _remove(path)


def _round_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _packed(checkpoint: Checkpoint) -> bytes:
    arrays: Arrays = {}
    content: dict[str, Any] = {
        "round": checkpoint.round,
        "model": encode(checkpoint.arrays, arrays, "model"),
        "aggregated": checkpoint.aggregated,
    }
    for name in _ENCODED:
        content[name] = encode(getattr(checkpoint, name), arrays, name)
    text = json.dumps(content)
    metadata = {"format": FORMAT, "content": text, "digest": digest_of(text, arrays)}
    return save(arrays, metadata)


def _unpacked(content: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Checkpoint:
    values = {name: decode(node, arrays) for name, node in content.items()}
    return Checkpoint(arrays=values.pop("model"), **values)


def _sync_folder(folder: Path) -> None:
    """Write a folder's new file names to the disk, where the system supports it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # Some network mounts do not support it.
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log(WARNING, "%s could not be removed: %s", path, error.strerror)
