"""The ClientApp: ordinary local training, and one line that answers for BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from experiment.data import Dataset, load_dataset
from experiment.progress import progress_writer
from experiment.seeding import client_indices, client_model, derived_seed, shared_model
from experiment.settings import Settings
from experiment.training import statistics_batches, train
from fl_rebasin.flower import add_batchnorm_handler

STATISTICS_IMAGES = 2000
"""Images of each client that BatchNorm statistics are re-estimated on."""


@lru_cache(maxsize=1)
def _dataset(name: str, data_dir: Path) -> Dataset:
    """Load once a process, not once a message."""
    return load_dataset(name, data_dir)


def _local_data(settings: Settings, seed: int, client: int) -> tuple[Dataset, Tensor, Tensor]:
    dataset = _dataset(settings.dataset, settings.data_dir)
    index = torch.from_numpy(client_indices(settings, dataset, seed)[client])
    return dataset, dataset.train_images[index], dataset.train_labels[index]


def make_client_app(settings: Settings, progress: Path, threads: int) -> ClientApp:
    """Return the ClientApp of an experiment.

    A training message's config says: `seed`; `stage`, the number of the round; `epochs`;
    `from-own-init`, whether to start from the client's own initial weights instead of the arrays
    that came; `label`, for the progress bar.

    Args:
        settings: The experiment.
        progress: Folder for the state of the progress bars.
        threads: Threads that one client computes with.
    """
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        torch.set_num_threads(threads)
        config = message.content.config_records["config"]
        seed, client = cast(int, config["seed"]), cast(int, context.node_config["partition-id"])
        context.state["run"] = ConfigRecord({"seed": seed})
        dataset, images, labels = _local_data(settings, seed, client)
        if config["from-own-init"]:
            model = client_model(settings, dataset, seed, client)
        else:
            model = shared_model(settings, dataset, seed)
            model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        loss = train(
            model,
            dataset,
            images,
            labels,
            recipe=settings.recipe,
            first_round=config["stage"] == 1,
            epochs=cast(int, config["epochs"]),
            seed=derived_seed(seed, "train", cast(int, config["stage"]), client),
            on_step=progress_writer(progress, f"{cast(str, config['label'])} client {client}"),
        )
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": len(labels), "train-loss": loss}),
                "client": ConfigRecord({"number": client}),
            }
        )
        return Message(content, reply_to=message)

    def load(context: Context) -> tuple[nn.Module, Iterable[Tensor]]:
        torch.set_num_threads(threads)
        seed = cast(int, context.state.config_records["run"]["seed"])
        client = cast(int, context.node_config["partition-id"])
        dataset, images, _ = _local_data(settings, seed, client)
        chosen = derived_seed(seed, "statistics", client)
        batches = statistics_batches(dataset, images, STATISTICS_IMAGES, chosen)
        return shared_model(settings, dataset, seed), batches

    add_batchnorm_handler(app, load)
    return app
