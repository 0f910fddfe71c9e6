"""Reads arrays from untrusted messages: checks what their bytes claim before it loads them."""

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
"""Flower's name for its only serialization format: NumPy's file format."""
KINDS = "biufc"
"""Kinds of dtypes that hold numbers. Objects, which NumPy would have to unpickle, are excluded."""
MAX_NAME, MAX_AXES = 40, 64
"""Longest name of a dtype, and largest number of axes, that an array may declare."""
MAX_HEADER = 10_000
"""Longest header of a payload in bytes; NumPy's own limit."""


@dataclass(frozen=True)
class Header:
    """What the bytes of an array say about it.

    Attributes:
        dtype: dtype of the values.
        shape: shape of the array.
        fortran: whether the values are in Fortran order: the first axis varies fastest.
        offset: position of the first value in the bytes.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int


def read_header(array: Array) -> Header:
    """Return the dtype and shape of an array without loading its values.

    Raises:
        ValueError: the payload is not exactly one array of numbers in NumPy's format, or its
            dtype or shape differs from what `array` declares.
    """
    if array.stype != NPY:
        raise ValueError(f"unknown serialization type {str(array.stype)[:40]!r}, expected {NPY!r}")
    data = array.data
    # Nearly all arrays have format version 1.0, where bytes 8 and 9 hold the header's length.
    first = data[:8] == np.lib.format.magic(1, 0)
    end = 10 + int.from_bytes(data[8:10], "little") if first else MAX_HEADER
    header = _parsed(bytes(data[: min(end, MAX_HEADER)]))
    dtype, shape = header.dtype, header.shape
    claimed = math.prod(shape) * dtype.itemsize
    present = len(data) - header.offset
    if claimed != present:
        raise ValueError(
            f"its payload claims {dtype} of shape {shape}, {claimed} bytes, but holds {present}"
        )
    if len(array.dtype) > MAX_NAME or len(array.shape) > MAX_AXES:
        raise ValueError(
            f"it declares a dtype of {len(array.dtype)} characters and {len(array.shape)} axes, "
            f"at most {MAX_NAME} and {MAX_AXES} are allowed"
        )
    if (array.dtype and np.dtype(array.dtype) != dtype) or (
        array.shape and tuple(array.shape) != shape
    ):
        raise ValueError(
            f"it declares {array.dtype[:40]} of shape {tuple(array.shape)}, but its payload is "
            f"{dtype} of shape {shape}"
        )
    return header


@lru_cache(maxsize=1024)
def _parsed(header: bytes) -> Header:
    """Parse the header of a payload. It is cached: all clients of one architecture send the same.

    Raises:
        ValueError: the bytes are not the header of an array of numbers.
    """
    file = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file, max_header_size=MAX_HEADER)
    except Exception as error:  # NumPy's parser raises errors of many types.
        raise ValueError("its payload is not an array in NumPy's format") from error
    if dtype.kind not in KINDS or dtype.itemsize > 16:
        raise ValueError(f"its payload has dtype {str(dtype)[:40]}, which is not a number type")
    if any(size < 0 for size in shape):
        raise ValueError(f"its payload claims the shape {shape}")
    return Header(dtype, shape, bool(fortran), file.tell())


def read_array(array: Array, header: Header, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
    """Return the values of an array as a copy in C order.

    Args:
        array: the array.
        header: its header, from `read_header`.
        dtype: dtype of the result; values that it cannot represent become infinite. By default
            the array's own.
    """
    flat = np.frombuffer(array.data, header.dtype, offset=header.offset)
    values = flat.reshape(header.shape, order="F" if header.fortran else "C")
    with np.errstate(over="ignore"):
        return values.astype(header.dtype if dtype is None else dtype, order="C")


def read_tensor(array: Array, header: Header, dtype: np.dtype[Any] | None = None) -> Tensor:
    """Return the values of an array as a tensor, without a copy where possible.

    Do not write to the tensor: it may share the memory of the array's bytes.

    Args:
        array: the array.
        header: its header, from `read_header`.
        dtype: dtype of the result; values that it cannot represent become infinite. By default
            the array's own.
    """
    wanted = header.dtype if dtype is None else dtype
    flat = np.frombuffer(array.data, header.dtype, offset=header.offset)
    if header.fortran or header.dtype != wanted or not flat.flags.aligned or not flat.size:
        return torch.from_numpy(read_array(array, header, wanted))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(flat.reshape(header.shape))
