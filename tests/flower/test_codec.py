"""Every value that a checkpoint accepts comes back the same; every other one is refused."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from torch import nn

from fl_rebasin.flower.checkpoint import Checkpoint, load_checkpoint
from fl_rebasin.flower.checkpoint.codec import UnstorableError, decode, encode, fingerprint
from fl_rebasin.flower.checkpoint.files import save_checkpoint

ARRAY_DTYPES = ["?", "i1", "u8", "f2", "f4", "f8", "c8", "c16", "g", ">f4", "<M8[s]", "U3", "S2"]
TENSOR_DTYPES = (
    torch.bool,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
)
BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")

VALUES: dict[str, Any] = {
    "plain": [None, True, 0, -(2**200), 1.5, -0.0, "a\udc80é", b"\0"],
    "not finite": [math.nan, math.inf, -math.inf],
    "containers": ([1, (2.0, [])], {}, {1: "int", "1": "str"}, OrderedDict(b=1, a=2), ()),
    "arrays": [
        *(np.arange(6).reshape(2, 3).astype(dtype) for dtype in ARRAY_DTYPES),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(12.0)[::2],
        np.array(3, dtype=np.int64),
        np.zeros((0, 3), np.float32),
        np.array([np.nan, -0.0]),
    ],
    "scalars": [np.float32(0.1), np.int8(3), np.bool_(True), np.float64("nan")],
    "tensors": [
        *(torch.arange(6).reshape(2, 3).to(dtype) for dtype in TENSOR_DTYPES),
        torch.tensor(2.0),
        torch.zeros(0, 3),
        torch.arange(6.0).reshape(2, 3).T,
    ],
    "records": [
        ArrayRecord({"b": Array(np.ones(2)), "a": Array(np.array(1))}),
        ArrayRecord({"odd": Array("float32", (2,), "other", b"12345678")}),
        MetricRecord({"b": [1, 2], "a": 1.0}),
        ConfigRecord({"b": b"12", "a": True, "c": ["x"]}),
        ArrayRecord(),
    ],
    "generators": [
        random.Random(1),
        *(np.random.Generator(getattr(np.random, bits)(1)) for bits in BIT_GENERATORS),
        np.random.RandomState(1),
        torch.Generator().manual_seed(1),
    ],
}


class Ledger:
    """Has a type that no checkpoint can hold."""

    def __init__(self) -> None:
        self.entries = [0]


def drawn(generator: Any) -> Any:
    match generator:
        case random.Random():
            return [generator.random(), generator.gauss()]
        case torch.Generator():
            return torch.rand(3, generator=generator).tolist()
    return generator.normal(size=3).tolist()


def assert_equal(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.tobytes() == right.tobytes()
        assert np.isfortran(left) == np.isfortran(right)
        assert left.flags.writeable
    elif isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.tolist() == right.tolist()
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_equal(*pair)
    elif isinstance(left, dict):
        assert_equal(list(left.items()), list(right.items()))
    elif isinstance(
        left, (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
    ):
        assert drawn(left) == drawn(right)
    else:
        assert repr(left) == repr(right)


@pytest.mark.parametrize("name", VALUES)
def test_values_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(1, ArrayRecord(), state={"value": VALUES[name]})
    found = load_checkpoint(save_checkpoint(tmp_path, checkpoint, keep=1))
    assert_equal(found.state["value"], VALUES[name])


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        object(),
        [Ledger()],
        {1.5: 1},
        lambda: 1,
        np.array([None]),
        nn.Linear(1, 1),
        nn.Parameter(torch.ones(1)),
        torch.ones(1, requires_grad=True),
        np.ma.masked_array([1]),
        np.zeros(1, [("a", "f4")]),
        type("Sub", (int,), {})(1),
        torch.ones(1).to_sparse(),
        random.SystemRandom(),
        nn.Parameter(torch.ones(1), requires_grad=False),
    ],
)
def test_values_of_other_types_cannot_be_stored(value: Any) -> None:
    with pytest.raises(UnstorableError):
        encode([value], {}, "")


def test_a_fingerprint_changes_with_values_that_cannot_be_stored() -> None:
    ledger = Ledger()
    held: list[Any] = [
        ledger,
        nn.Linear(2, 2),
        {1, 2},
        lambda: 1,
        torch.ones(2).to_sparse(),
        np.zeros(1, [("a", "f4")]),
        np.array([None]),
        np.ma.masked_array([1]),
        Path("here"),
    ]
    held.append(held)
    before = fingerprint(held)
    assert fingerprint(held) == before
    ledger.entries[0] = 5
    after = fingerprint(held)
    assert after != before
    with torch.no_grad():
        held[1].bias[0] += 1
    last = fingerprint(held)
    assert last != after
    held[5]["a"] += 1
    assert fingerprint(held) != last


def test_decoded_arrays_are_copies() -> None:
    arrays: dict[str, Any] = {}
    value = np.arange(3.0)
    node = encode(value, arrays, "a")
    first, second = decode(node, arrays), decode(node, arrays)
    first += 1
    np.testing.assert_array_equal(second, [0, 1, 2])
    np.testing.assert_array_equal(value, [0, 1, 2])
