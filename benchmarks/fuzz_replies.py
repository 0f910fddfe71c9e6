"""Feed raw bytes to the server as a client's reply, guided by coverage, until something breaks.

    pip install atheris
    python benchmarks/fuzz_replies.py [-runs=N] [other options of libFuzzer]

Two good replies go beside each; a round must end with a finite model of the right shapes, whatever
the bytes. Bytes that Flower's own parser refuses never reach a strategy and are skipped.
"""

from __future__ import annotations

import logging
import sys

import atheris

with atheris.instrument_imports(include=["fl_rebasin.flower", "flwr.common.serde"]):
    from fl_rebasin.flower import ReBasinStrategy

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

MODEL = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
STATE = MODEL.state_dict()
GOOD = RecordDict(
    {"arrays": ArrayRecord(STATE), "metrics": MetricRecord({"num-examples": 5, "loss": 0.5})}
)
SEED = recorddict_to_proto(GOOD).SerializeToString()


class NoNodes:
    """A grid for strategies that sample nodes."""

    def get_node_ids(self) -> list[int]:
        """Return the nodes."""
        return [1, 2, 7]


def reply(content: RecordDict, node_id: int) -> Message:
    """Return a reply."""
    return Message(
        content, reply_to=Message(RecordDict(), dst_node_id=node_id, message_type="train")
    )


def main() -> None:
    """Run as a program."""
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    strategy = ReBasinStrategy(
        FedAvg(), model=MODEL, example_inputs=torch.zeros(2, 3), align_to="global",
        recalibrate_batchnorm=False,
    )  # fmt: skip
    list(strategy.configure_train(1, ArrayRecord(STATE), ConfigRecord(), NoNodes()))  # type: ignore[arg-type]

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        # From a good reply, not from nothing: random bytes are hardly ever a message.
        return bytes(atheris.Mutate(data if len(data) > 100 else SEED, max(max_size, len(SEED))))

    def one(data: bytes) -> None:
        try:
            content = recorddict_from_proto(RecordDictProto.FromString(data))
        except Exception:
            return
        arrays, _ = strategy.aggregate_train(1, [reply(GOOD, 1), reply(content, 7), reply(GOOD, 2)])
        assert arrays is not None
        for key, value in arrays.to_torch_state_dict().items():
            assert value.shape == STATE[key].shape, key
            assert value.dtype == STATE[key].dtype, key
            assert bool(torch.isfinite(value).all()), key

    atheris.Setup([*sys.argv, "-max_len=4000"], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
