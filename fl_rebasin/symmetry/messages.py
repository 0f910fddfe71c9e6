"""Text for error messages, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def in_one_line(text: object, limit: int = 400) -> str:
    """Return a text without line breaks, truncated to `limit` characters."""
    flat = " ".join(str(text).split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def describe_error(error: BaseException) -> str:
    """Return the type and the message of an exception."""
    return f"{type(error).__name__}: {in_one_line(error)}".removesuffix(": ")


def describe_inputs(inputs: Any) -> str:
    """Return the shapes, dtypes and devices of example inputs."""

    def describe(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')} on {leaf.device}"

    nest = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return in_one_line(tree_map(describe, nest), 200)
