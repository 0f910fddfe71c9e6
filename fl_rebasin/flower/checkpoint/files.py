"""Checkpoints as files: one safetensors file a round, written whole or not at all."""

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


@dataclass(frozen=True)
class Checkpoint:
    """A run after one of its rounds.

    Attributes:
        round: the last round that is done.
        arrays: the global model.
        aggregated: whether any round so far has aggregated a model.
        train_metrics_clientapp: aggregated training metrics by round, as in Flower's `Result`.
        evaluate_metrics_clientapp: the clients' aggregated evaluation metrics by round.
        evaluate_metrics_serverapp: what `evaluate_fn` returned, by round.
        memory: what else the run needs to go on: state of the strategies, random state.
    """

    round: int
    arrays: ArrayRecord
    aggregated: bool = True
    train_metrics_clientapp: dict[int, MetricRecord] = field(default_factory=dict)
    evaluate_metrics_clientapp: dict[int, MetricRecord] = field(default_factory=dict)
    evaluate_metrics_serverapp: dict[int, MetricRecord] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into a folder; remove older ones but for the newest `keep`.

    The file appears under its name only when all of it is on the disk.

    Raises:
        OSError: it could not be written; those before it are as they were.
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
            f"({error.strerror or error}): earlier checkpoints are as they were; mend the cause, "
            "then go on with resume=True",
        ) from error
    # A damaged file of a later round is no reason to remove a good one.
    done = [each for each in checkpoints_in(folder) if _round_of(each) <= checkpoint.round]
    for old in done[:-keep]:
        _remove(old)
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint that `ReBasinStrategy` has written.

    Args:
        path: the file, `round-NUMBER.safetensors`.

    Raises:
        ValueError: the file is no checkpoint, damaged, or of another version.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile, numpy as np
        >>> from flwr.app import Array
        >>> folder = Path(tempfile.mkdtemp())
        >>> done = Checkpoint(7, ArrayRecord({"weight": Array(np.ones(2, np.float32))}))
        >>> path = save_checkpoint(folder, done, keep=3)
        >>> path.name, load_checkpoint(path).arrays["weight"].numpy()
        ('round-000007.safetensors', array([1., 1.], dtype=float32))
    """
    path = Path(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}, this version reads {FORMAT}")
        if metadata["digest"] != digest_of(metadata["content"], arrays):
            raise ValueError("its content does not fit its digest")
        return _unpacked(json.loads(metadata["content"]), arrays)
    except FileNotFoundError:
        raise
    except Exception as error:  # Whatever a damaged file leads to.
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a folder that can be read, or None if there is no file.

    Raises:
        ValueError: there are files, and none can be read.
    """
    paths = checkpoints_in(folder)
    for path in reversed(paths):
        try:
            checkpoint = load_checkpoint(path)
            if checkpoint.round != _round_of(path):
                raise ValueError(f"{path} holds round {checkpoint.round}")
        except (OSError, ValueError) as error:
            log(WARNING, "checkpoint passed over: %s", error)
        else:
            return checkpoint
    if paths:
        raise ValueError(
            f"none of the {len(paths)} checkpoints in {folder} can be read: move them away to "
            "start at round 1, or use another checkpoint_dir"
        )
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, damaged ones too, by round."""
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=_round_of)


def remove_unfinished(folder: Path) -> None:
    """Remove what a run that was killed has left half written."""
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
    for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp",
                 "evaluate_metrics_serverapp", "memory"):  # fmt: skip
        content[name] = encode(getattr(checkpoint, name), arrays, name)
    text = json.dumps(content)
    metadata = {"format": FORMAT, "content": text, "digest": digest_of(text, arrays)}
    return save(arrays, metadata)


def _unpacked(content: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Checkpoint:
    values = {name: decode(node, arrays) for name, node in content.items()}
    return Checkpoint(arrays=values.pop("model"), **values)


def _sync_folder(folder: Path) -> None:
    """Bring a folder's new names to the disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some network mounts refuse.
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log(WARNING, "%s could not be removed: %s", path, error.strerror)
