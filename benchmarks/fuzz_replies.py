"""Fuzz the strategy with raw bytes as a client's reply, guided by coverage.

    pip install atheris
    python benchmarks/fuzz_replies.py [-runs=N] [other options of libFuzzer]

Each round has two valid replies and one fuzzed reply; whatever the bytes are, the round must end
with a finite model of the right shapes. Bytes that Flower's own parser rejects never reach a
strategy and are skipped.
"""

from __future__ import annotations

import logging
import sys

import atheris

with atheris.instrument_imports(include=["fl_rebasin.flower", "flwr.common.serde"]):
    from fl_rebasin.flower import ReBasinStrategy, WeightMatching

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.serverapp.strategy import FedAvg
from replies import Nodes, allow_messages, reply_with
from torch import nn

MODEL = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
STATE = MODEL.state_dict()
VALID = RecordDict(
    {"arrays": ArrayRecord(STATE), "metrics": MetricRecord({"num-examples": 5, "loss": 0.5})}
)
SEED = recorddict_to_proto(VALID).SerializeToString()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Mutate a valid reply: random bytes are hardly ever a message."""
    return bytes(atheris.Mutate(data if len(data) > 100 else SEED, max(max_size, len(SEED))))


def check_round(strategy: ReBasinStrategy, data: bytes) -> None:
    """Aggregate a round with a fuzzed reply; raise if the result is not a valid model."""
    try:
        content = recorddict_from_proto(RecordDictProto.FromString(data))
    except Exception:
        return
    replies = [reply_with(VALID, 1), reply_with(content, 7), reply_with(VALID, 2)]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    for key, value in arrays.to_torch_state_dict().items():
        assert value.shape == STATE[key].shape, key
        assert value.dtype == STATE[key].dtype, key
        assert bool(torch.isfinite(value).all()), key


def main() -> None:
    """Run as a program."""
    allow_messages()
    # Each invalid reply is logged.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    strategy = ReBasinStrategy(
        FedAvg(),
        model=MODEL,
        example_inputs=torch.zeros(2, 3),
        align=WeightMatching(to="global"),
        finish=[],
    )
    nodes = Nodes([1, 2, 7])
    list(strategy.configure_train(1, ArrayRecord(STATE), ConfigRecord(), nodes))  # type: ignore[arg-type]
    atheris.Setup(
        [*sys.argv, "-max_len=4000"],
        lambda data: check_round(strategy, data),
        custom_mutator=mutate,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
