"""Invalid replies that a broken or hostile client may send, one function for each kind."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.random import Generator

Fault = Callable[[RecordDict, Generator], RecordDict]


def _first(content: RecordDict) -> tuple[ArrayRecord, str, Array]:
    """Return the record of arrays, and the key and value of its first array."""
    record = next(each for each in content.values() if isinstance(each, ArrayRecord))
    key = next(iter(record))
    return record, key, record[key]


def _values(change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def fault(content: RecordDict, rng: Generator) -> RecordDict:
        record, key, array = _first(content)
        record[key] = Array(change(array.numpy().copy()))
        return content

    return fault


def _payload(change: Callable[[bytes], bytes]) -> Fault:
    def fault(content: RecordDict, rng: Generator) -> RecordDict:
        record, key, array = _first(content)
        record[key] = Array(array.dtype, array.shape, array.stype, change(array.data))
        return content

    return fault


def _examples(value: float | list[int]) -> Fault:
    def fault(content: RecordDict, rng: Generator) -> RecordDict:
        for record in content.values():
            if isinstance(record, MetricRecord):
                record["num-examples"] = value
        return content

    return fault


def _random_bytes(content: RecordDict, rng: Generator) -> RecordDict:
    record, key, array = _first(content)
    data = bytearray(array.data)
    for index in rng.integers(len(data), size=8):
        data[index] = rng.integers(256)
    record[key] = Array(array.dtype, array.shape, array.stype, bytes(data))
    return content


def _without_key(content: RecordDict, rng: Generator) -> RecordDict:
    record, key, _ = _first(content)
    del record[key]
    return content


def _additional_key(content: RecordDict, rng: Generator) -> RecordDict:
    record, _, array = _first(content)
    record["spare"] = array
    return content


def _crash(content: RecordDict, rng: Generator) -> RecordDict:
    raise RuntimeError("this client has crashed")


HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117)
    + b"\n"
)

FAULTS: dict[str, Fault] = {
    "NaN": _values(lambda values: values * np.nan),
    "infinite": _values(lambda values: values + np.inf),
    "wrong shape": _values(lambda values: values[:-1]),
    "broadcastable shape": _values(lambda values: values[:1]),
    "integers": _values(lambda values: values.astype(np.int32)),
    "pickle": _payload(lambda data: pickle.dumps([1, 2, 3])),
    "truncated": _payload(lambda data: data[: len(data) // 2]),
    "oversized": _payload(lambda data: data + b"more"),
    "huge header": _payload(lambda data: HUGE),
    "garbage": _payload(lambda data: b"garbage"),
    "random bytes": _random_bytes,
    "negative examples": _examples(-5),
    "no examples": _examples(0),
    "absurd examples": _examples(10**400),
    "NaN examples": _examples(float("nan")),
    "list of examples": _examples([1, 2]),
    "missing key": _without_key,
    "additional key": _additional_key,
    "empty": lambda content, rng: RecordDict(),
    "no metrics": lambda content, rng: RecordDict({"arrays": _first(content)[0]}),
    "two models": lambda content, rng: RecordDict({**content, "again": _first(content)[0]}),
    "additional record": lambda content, rng: RecordDict({**content, "more": ConfigRecord()}),
    "crash": _crash,
}
"""The faults by name. A strategy may accept some: `random bytes` may still be a finite model of the
right shape, and additional records do no harm."""
