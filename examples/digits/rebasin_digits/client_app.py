"""The ClientApp: local training, and one call that adds the handlers of the strategy."""

from __future__ import annotations

from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_rebasin.flower import add_rebasin_handlers
from rebasin_digits.task import Examples, build_model, train, train_part

STATISTICS_BATCH = 256

app = ClientApp()


def _local_examples(context: Context) -> Examples:
    node = cast(dict[str, int], context.node_config)
    return train_part(
        node["partition-id"], node["num-partitions"], cast(int, context.run_config["seed"])
    )


def _model(context: Context) -> nn.Module:
    return build_model(cast(int, context.run_config["hidden-units"]))


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train the global model on the local images."""
    config: dict[str, Any] = dict(context.run_config)
    model = _model(context)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    examples = _local_examples(context)
    loss = train(
        model,
        examples,
        epochs=config["local-epochs"],
        learning_rate=config["learning-rate"],
        batch_size=config["batch-size"],
        seed=config["seed"],
    )
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(examples[1]), "train-loss": loss}),
        }
    )
    return Message(content, reply_to=message)


def _load(context: Context) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a model of the architecture and batches of the local images."""
    parts = (torch.split(tensor, STATISTICS_BATCH) for tensor in _local_examples(context))
    return _model(context), list(zip(*parts, strict=True))


add_rebasin_handlers(app, _load)
