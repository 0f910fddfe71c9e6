"""Converts Python values to JSON and arrays, and back: the contents of a checkpoint file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

Arrays: TypeAlias = dict[str, np.ndarray]

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NATIVE = ("bool", *_INTEGERS, "float16", "float32", "float64")
"""Dtypes that safetensors can store. Arrays of other dtypes are stored as bytes."""
_DICTS: dict[str, type] = {"dict": dict, "ordered": OrderedDict}
_RECORDS: dict[str, type] = {"metrics": MetricRecord, "config": ConfigRecord}
_NUMPY_BITS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


class UnstorableError(TypeError):
    """A checkpoint cannot hold values of this type."""


def encode(value: Any, arrays: Arrays, path: str) -> Any:
    """Return a value in a form that JSON can hold, and add its arrays to `arrays`.

    Args:
        value: None, a bool, number, string, bytes, NumPy array, tensor, Flower record, random
            generator, or a list, tuple or dict (with keys of type str or int) of these.
        arrays: receives C-contiguous arrays of dtypes that safetensors can store.
        path: the prefix of the arrays' names.

    Raises:
        UnstorableError: the value, or a part of it, has another type.
    """
    # The type must match exactly: whatever a subclass adds would be lost.
    kind: Any = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is bytes:
        return {"bytes": _text(value)}
    if isinstance(value, np.generic):
        array = np.asarray(value)
        return {"scalar": _text(array.tobytes()), "dtype": _dtype(array)}
    if kind is np.ndarray:
        return _encode_array(value, arrays, path)
    if kind is Tensor:
        return _encode_tensor(value, arrays, path)
    if kind is Array:
        return _encode_flower(value, arrays, path)
    if kind is ArrayRecord:
        entries = [[key, _encode_flower(value[key], arrays, f"{path}/{key}")] for key in value]
        return {"arrays": entries}
    if kind is list or kind is tuple:
        items = [encode(item, arrays, f"{path}/{index}") for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    for name, known in (_DICTS | _RECORDS).items():
        if kind is known:
            if any(type(key) not in (str, int) for key in value):
                raise UnstorableError(
                    "a checkpoint cannot hold a dict with keys other than str and int"
                )
            return {
                name: [[key, encode(each, arrays, f"{path}/{key}")] for key, each in value.items()]
            }
    for name, generator in _GENERATORS.items():
        if kind is generator.type and (state := generator.read(value)) is not None:
            return {"generator": name, "state": encode(state, arrays, path)}
    raise UnstorableError(f"a checkpoint cannot hold a value of type {kind.__qualname__}")


def decode(node: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return the value from which `encode` made a node."""
    if isinstance(node, list):
        return [decode(item, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    if "array" in node:
        return _decode_array(node, arrays)
    if "scalar" in node:
        return np.frombuffer(base64.b64decode(node["scalar"]), np.dtype(node["dtype"]))[0]
    if "tensor" in node:
        return _decode_tensor(node, arrays)
    if "generator" in node:
        return _GENERATORS[node["generator"]].make(decode(node["state"], arrays))
    if "flower" in node:
        return _decode_flower(node, arrays)
    ((name, content),) = node.items()
    if name == "float":
        return float(content)
    if name == "bytes":
        return base64.b64decode(content)
    if name == "arrays":
        return ArrayRecord({key: _decode_flower(each, arrays) for key, each in content})
    if name == "tuple":
        return tuple(decode(item, arrays) for item in content)
    return (_DICTS | _RECORDS)[name]({key: decode(each, arrays) for key, each in content})


def replaced(old: Any, new: Any) -> Any:
    """Return the new value. A random generator stays the same object, which others may share."""
    for generator in _GENERATORS.values():
        same_type = type(old) is type(new) is generator.type
        if same_type and generator.write(old, generator.read(new)):
            return old
    return new


def fingerprint(value: Any) -> str:
    """Return a digest that changes when the value changes, even if it cannot be stored."""
    return _fingerprint(value, ())


def digest_of(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Return a digest of a text and some C-contiguous arrays."""
    digest = hashlib.blake2b(text.encode(), digest_size=20)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _fingerprint(value: Any, parents: tuple[int, ...]) -> str:
    """Return the digest of a value; `parents` are the addresses of the objects that contain it."""
    arrays: Arrays = {}
    if id(value) in parents:
        return "itself"
    try:
        return digest_of(json.dumps(encode(value, arrays, "")), arrays)
    except (UnstorableError, RecursionError, ValueError):
        pass
    parents = (*parents, id(value))
    parts = [type(value).__qualname__]
    try:
        parts += [_fingerprint(part, parents) for part in _parts(value)]
    except Exception:  # An object of an unknown type may raise anything here.
        parts = []
    if isinstance(value, (set, frozenset)):
        parts.sort()
    # The address stands for an object that reveals no parts: only another object is a change.
    return digest_of(" ".join(parts if len(parts) > 1 else [str(id(value))]), {})


def _parts(value: Any) -> Iterable[Any]:
    """Return the values that a value consists of."""
    if isinstance(value, Tensor):
        plain = value.detach().as_subclass(Tensor)
        return [plain if plain.layout == torch.strided else plain.to_dense()]
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return [value.tolist()]
        return [str(value.dtype), list(value.shape), value.tobytes()]
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, os.PathLike):
        return [os.fspath(value)]
    if isinstance(value, type):
        return []
    state = object.__getstate__(value)
    return [] if not state else [state]


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _dtype(array: np.ndarray) -> str:
    if array.dtype.hasobject or array.dtype.names is not None or array.dtype.subdtype is not None:
        raise UnstorableError(f"a checkpoint cannot hold an array of dtype {array.dtype}")
    return array.dtype.str


def _add(array: np.ndarray, arrays: Arrays, path: str) -> str:
    """Add an array under its path, made unique where necessary; return its name."""
    while path in arrays:
        path += "'"
    native = array.dtype.isnative and array.dtype.name in _NATIVE
    if not native:
        array = np.frombuffer(array.tobytes(), np.uint8)
    arrays[path] = np.asarray(array, order="C")
    return path


def _encode_array(array: np.ndarray, arrays: Arrays, path: str) -> dict[str, Any]:
    dtype = _dtype(array)
    flags = array.flags
    order = "F" if flags.f_contiguous and not flags.c_contiguous else "C"
    name = _add(array, arrays, path)
    return {"array": name, "dtype": dtype, "shape": list(array.shape), "order": order}


def _decode_array(node: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    array, dtype = arrays[node["array"]], np.dtype(node["dtype"])
    if array.dtype != dtype:
        array = np.frombuffer(array.tobytes(), dtype)
    # A copy: writable, and independent of the stored array.
    return np.array(array.reshape(node["shape"]), order=node["order"])


def _encode_tensor(tensor: Tensor, arrays: Arrays, path: str) -> dict[str, Any]:
    if tensor.requires_grad or tensor.layout != torch.strided or tensor.is_quantized:
        raise UnstorableError(
            "a checkpoint cannot hold a tensor that requires a gradient, is sparse or is quantized"
        )
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    # As bytes, because NumPy has no bfloat16.
    name = _add(plain.reshape(-1).view(torch.uint8).numpy(), arrays, path)
    return {
        "tensor": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "device": str(tensor.device),
    }


def _decode_tensor(node: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Tensor:
    dtype = getattr(torch, node["dtype"])
    tensor = torch.empty(node["shape"], dtype=dtype)
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = arrays[node["tensor"]]
    return tensor.to(node["device"])


def _encode_flower(array: Array, arrays: Arrays, path: str) -> dict[str, Any]:
    """Encode a Flower array: as a NumPy array if its bytes are one, else as its bytes."""
    try:
        values = array.numpy()
        plain = values.shape == tuple(array.shape) and str(values.dtype) == array.dtype
    except Exception:
        plain = False
    if plain:
        return {"flower": _encode_array(values, arrays, path)}
    payload = _add(np.frombuffer(array.data, np.uint8), arrays, path)
    header = {"dtype": array.dtype, "shape": list(array.shape), "stype": array.stype}
    return {"flower": {"payload": payload, **header}}


def _decode_flower(node: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Array:
    content = node["flower"]
    if "array" in content:
        return Array(_decode_array(content, arrays))
    return Array(
        dtype=content["dtype"],
        shape=tuple(content["shape"]),
        stype=content["stype"],
        data=arrays[content["payload"]].tobytes(),
    )


class _Generator:
    """A type of random generator, with functions for its state.

    Args:
        kind: the type.
        read: returns a generator's state, or None if it cannot be stored.
        write: sets a generator's state.
        blank: returns a new generator that can have a given state.
    """

    def __init__(
        self,
        kind: type,
        read: Callable[[Any], Any],
        write: Callable[[Any, Any], Any],
        blank: Callable[[Any], Any],
    ) -> None:
        self.type = kind
        self.read = read
        self._write = write
        self._blank = blank

    def write(self, generator: Any, state: Any) -> bool:
        """Set a generator's state; return whether the generator accepts such a state."""
        try:
            self._write(generator, state)
        except (TypeError, ValueError, RuntimeError):
            return False
        return True

    def make(self, state: Any) -> Any:
        """Return a new generator with a given state."""
        generator = self._blank(state)
        self._write(generator, state)
        return generator


def _numpy_bits(name: str) -> Any:
    if name not in _NUMPY_BITS:
        raise ValueError(f"unknown bit generator {name!r}")
    return getattr(np.random, name)()


def _read_numpy(generator: np.random.Generator) -> Any:
    state = generator.bit_generator.state
    return state if state["bit_generator"] in _NUMPY_BITS else None


def _write_numpy(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


def _read_legacy(generator: np.random.RandomState) -> Any:
    state: Any = generator.get_state(legacy=False)
    return state if state["bit_generator"] in _NUMPY_BITS else None


_GENERATORS = {
    "python": _Generator(
        random.Random,
        lambda generator: generator.getstate(),
        lambda generator, state: generator.setstate(state),
        lambda state: random.Random(0),
    ),
    "numpy": _Generator(
        np.random.Generator,
        _read_numpy,
        _write_numpy,
        lambda state: np.random.Generator(_numpy_bits(state["bit_generator"])),
    ),
    "numpy-legacy": _Generator(
        np.random.RandomState,
        _read_legacy,
        lambda generator, state: generator.set_state(state),
        lambda state: np.random.RandomState(_numpy_bits(state["bit_generator"])),
    ),
    "torch": _Generator(
        torch.Generator,
        lambda generator: {"device": str(generator.device), "state": generator.get_state()},
        lambda generator, state: generator.set_state(state["state"]),
        lambda state: torch.Generator(state["device"]),
    ),
}
