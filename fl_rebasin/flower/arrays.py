"""Arrays from strangers: what their bytes claim is checked before anything is made of them."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray
from torch import Tensor

NPY = "numpy.ndarray"
"""Flower's name of its only serialisation of arrays: NumPy's file format."""
KINDS = "biufc"
"""Kinds of dtypes that are numbers: never objects, which would have to be unpickled."""
MAX_NAME, MAX_AXES = 40, 64
"""Length of a dtype's name, and axes of an array, beyond which neither is looked at."""
MAX_HEADER = 10_000
"""Bytes of the head of a payload; NumPy's own limit."""


@dataclass(frozen=True)
class Head:
    """What the bytes of an array say of themselves.

    Attributes:
        dtype: dtype of the numbers.
        shape: shape of the array.
        fortran: whether the first axis is the fastest.
        offset: where the numbers begin.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int


def read_head(array: Array) -> Head:
    """Return dtype and shape of an array without loading it.

    Raises:
        ValueError: the payload is not exactly one array of numbers in NumPy's format, or another
            one than `array` says.
    """
    if array.stype != NPY:
        raise ValueError(f"unknown serialization type {str(array.stype)[:40]!r}")
    data = array.data
    # In the first version, which nearly all arrays are of, bytes 8 and 9 tell how long the head is.
    first = data[:8] == np.lib.format.magic(1, 0)
    end = 10 + int.from_bytes(data[8:10], "little") if first else MAX_HEADER
    head = _parsed(bytes(data[: min(end, MAX_HEADER)]))
    dtype, shape = head.dtype, head.shape
    bytes_claimed = math.prod(shape) * dtype.itemsize
    bytes_there = len(data) - head.offset
    if bytes_claimed != bytes_there:
        raise ValueError(
            f"its payload claims {dtype} of shape {shape}, {bytes_claimed} bytes, and holds "
            f"{bytes_there}"
        )
    if len(array.dtype) > MAX_NAME or len(array.shape) > MAX_AXES:
        raise ValueError("it is said to be of an odd dtype or shape")
    if (array.dtype and np.dtype(array.dtype) != dtype) or (
        array.shape and tuple(array.shape) != shape
    ):
        raise ValueError(
            f"it is said to be {array.dtype[:40]} of shape {tuple(array.shape)}, its payload is "
            f"{dtype} of shape {shape}"
        )
    return head


@lru_cache(maxsize=1024)
def _parsed(head: bytes) -> Head:
    """Return what the head of a payload says; clients of one architecture all say the same.

    Raises:
        ValueError: it is none, or not of an array of numbers.
    """
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file, max_header_size=MAX_HEADER)
    except Exception as error:  # Its parser fails in many ways.
        raise ValueError("its payload is no array in NumPy's format") from error
    if dtype.kind not in KINDS or dtype.itemsize > 16:
        raise ValueError(f"its payload is of dtype {str(dtype)[:40]}, which is no number")
    if any(size < 0 for size in shape):
        raise ValueError(f"its payload claims the shape {shape}")
    return Head(dtype, shape, bool(fortran), file.tell())


def read_array(array: Array, head: Head, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
    """Return the numbers of an array whose head has been read.

    Args:
        array: what came.
        head: its head.
        dtype: what to turn them into; what it cannot hold becomes infinite.
    """
    flat = np.frombuffer(array.data, head.dtype, offset=head.offset)
    values = flat.reshape(head.shape, order="F" if head.fortran else "C")
    with np.errstate(over="ignore"):
        return values.astype(head.dtype if dtype is None else dtype, order="C")


def read_tensor(array: Array, head: Head, dtype: np.dtype[Any] | None = None) -> Tensor:
    """Return the numbers of an array whose head has been read; no copy where none is needed.

    The tensor is not to be written to: its memory may be that of the array's bytes.

    Args:
        array: what came.
        head: its head.
        dtype: what to turn them into; what it cannot hold becomes infinite.
    """
    wanted = head.dtype if dtype is None else dtype
    flat = np.frombuffer(array.data, head.dtype, offset=head.offset)
    if head.fortran or head.dtype != wanted or not flat.flags.aligned or not flat.size:
        return torch.from_numpy(read_array(array, head, wanted))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(flat.reshape(head.shape))
