"""The ClientApp: ordinary local training, and one line that answers the strategy's questions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from experiment.data import Dataset, load_dataset, load_mnist
from experiment.methods import LABEL_COUNTS
from experiment.progress import progress_writer
from experiment.seeding import client_model, client_parts, derived_seed, shared_model
from experiment.settings import Settings
from experiment.training import statistics_batches, train
from fl_rebasin.flower import add_rebasin_handlers


@lru_cache(maxsize=1)
def _dataset(name: str, data_dir: Path) -> Dataset:
    """Load once a process, not once a message."""
    return load_mnist(data_dir) if name == "mnist" else load_dataset(name, data_dir)


def _local_data(
    settings: Settings, seed: int, client: int, *, held_back: bool = False
) -> tuple[Dataset, Tensor, Tensor]:
    """Return the data set and a client's images and labels, to train on or held back."""
    dataset = _dataset(settings.dataset, settings.data_dir)
    trained, left_out = map(torch.from_numpy, client_parts(settings, dataset, seed)[client])
    index = left_out if held_back else trained
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
                "metrics": MetricRecord(
                    {
                        "num-examples": len(labels),
                        "train-loss": loss,
                        LABEL_COUNTS: torch.bincount(
                            labels, minlength=dataset.num_classes
                        ).tolist(),
                    }
                ),
                "client": ConfigRecord({"number": client}),
            }
        )
        return Message(content, reply_to=message)

    def load(context: Context) -> tuple[nn.Module, Iterable[Any]]:
        """Return model and some training images with their labels."""
        torch.set_num_threads(threads)
        seed, client = _who(context)
        dataset, images, labels = _local_data(settings, seed, client)
        chosen = derived_seed(seed, "statistics", client)
        batches = statistics_batches(dataset, images, labels, settings.statistics_images, chosen)
        return shared_model(settings, dataset, seed), batches

    def load_held_back(context: Context) -> tuple[nn.Module, Iterable[Any]]:
        """Return model and the images that training leaves out, with their labels."""
        torch.set_num_threads(threads)
        seed, client = _who(context)
        dataset, images, labels = _local_data(settings, seed, client, held_back=True)
        batches = statistics_batches(dataset, images, labels, len(labels), 0)
        return shared_model(settings, dataset, seed), batches

    add_rebasin_handlers(app, load, load_held_back)
    return app


def _who(context: Context) -> tuple[int, int]:
    """Return the seed of the run and the number of the client."""
    seed = cast(int, context.state.config_records["run"]["seed"])
    return seed, cast(int, context.node_config["partition-id"])
