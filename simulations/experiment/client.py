"""The ClientApp: ordinary local training, and one call that adds the handlers of the strategy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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


def make_client_app(settings: Settings, progress: Path, threads: int) -> ClientApp:
    """Return the ClientApp of an experiment.

    The server sends these keys in the config of a training message: `seed`; `stage`, the number of
    the round; `epochs`; `from-own-init`, whether to start from the client's own initial weights
    instead of the arrays in the message; `label`, for the progress bar.

    Args:
        settings: The experiment.
        progress: Folder for the state of the progress bars.
        threads: Number of threads for each client.
    """
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        torch.set_num_threads(threads)
        config = message.content.config_records["config"]
        # The queries that follow carry no seed.
        context.state["run"] = ConfigRecord({"seed": config["seed"]})
        return Message(_train(_local(settings, context), message, progress), reply_to=message)

    def load(context: Context) -> tuple[nn.Module, Iterable[Any]]:
        """Return a model and a sample of the client's training images with their labels."""
        torch.set_num_threads(threads)
        return _local(settings, context).statistics()

    def load_held_out(context: Context) -> tuple[nn.Module, Iterable[Any]]:
        """Return a model and the images that training leaves out, with their labels."""
        torch.set_num_threads(threads)
        return _local(settings, context).held_out()

    def load_all(context: Context) -> tuple[nn.Module, Iterable[Any]]:
        """Return a model and all of the client's training images with their labels."""
        torch.set_num_threads(threads)
        return _local(settings, context).training()

    add_rebasin_handlers(app, load, load_held_out, load_all=load_all)
    return app


@dataclass(frozen=True)
class _LocalClient:
    """One client in one run: which seed, which partition, and the data set."""

    settings: Settings
    dataset: Dataset
    seed: int
    number: int

    def images(self, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Return the images and labels to train on, or those held out for the guard."""
        parts = client_parts(self.settings, self.dataset, self.seed)[self.number]
        index = torch.from_numpy(parts[1] if held_out else parts[0])
        return self.dataset.train_images[index], self.dataset.train_labels[index]

    def statistics(self) -> tuple[nn.Module, Iterable[Any]]:
        """Return a model of the architecture and batches of training images."""
        seed = derived_seed(self.seed, "statistics", self.number)
        limit = self.settings.statistics_images
        batches = statistics_batches(self.dataset, *self.images(), limit, seed)
        return shared_model(self.settings, self.dataset, self.seed), batches

    def training(self) -> tuple[nn.Module, Iterable[Any]]:
        """Return a model of the architecture and batches of all training images."""
        images, labels = self.images()
        seed = derived_seed(self.seed, "head", self.number)
        batches = statistics_batches(self.dataset, images, labels, len(labels), seed)
        return shared_model(self.settings, self.dataset, self.seed), batches

    def held_out(self) -> tuple[nn.Module, Iterable[Any]]:
        """Return a model of the architecture and batches of the held-out images."""
        images, labels = self.images(held_out=True)
        batches = statistics_batches(self.dataset, images, labels, len(labels), 0)
        return shared_model(self.settings, self.dataset, self.seed), batches


@lru_cache(maxsize=1)
def _dataset(name: str, data_dir: Path) -> Dataset:
    """Load the data set once per process instead of once per message."""
    return load_mnist(data_dir) if name == "mnist" else load_dataset(name, data_dir)


def _local(settings: Settings, context: Context) -> _LocalClient:
    """Return the client that a context belongs to."""
    seed = cast(int, context.state.config_records["run"]["seed"])
    number = cast(int, context.node_config["partition-id"])
    return _LocalClient(settings, _dataset(settings.dataset, settings.data_dir), seed, number)


def _train(client: _LocalClient, message: Message, progress: Path) -> RecordDict:
    """Train on the client's images as the message asks; return the content of the reply."""
    settings, dataset, seed = client.settings, client.dataset, client.seed
    config = message.content.config_records["config"]
    stage = cast(int, config["stage"])
    images, labels = client.images()
    if config["from-own-init"]:
        model = client_model(settings, dataset, seed, client.number)
    else:
        model = shared_model(settings, dataset, seed)
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    loss = train(
        model,
        dataset,
        images,
        labels,
        recipe=settings.recipe,
        first_round=stage == 1,
        epochs=cast(int, config["epochs"]),
        seed=derived_seed(seed, "train", stage, client.number),
        on_step=progress_writer(progress, f"{cast(str, config['label'])} client {client.number}"),
    )
    counts = torch.bincount(labels, minlength=dataset.num_classes).tolist()
    metrics = MetricRecord({"num-examples": len(labels), "train-loss": loss, LABEL_COUNTS: counts})
    return RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": metrics,
            "client": ConfigRecord({"number": client.number}),
        }
    )
