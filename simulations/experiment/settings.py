"""The settings of one experiment, checked and complete."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from experiment.data import Dataset
from experiment.models import build_model
from experiment.training import Recipe


@dataclass(frozen=True)
class Settings:
    """One experiment, repeated over seeds.

    Attributes:
        dataset: "cifar100", "digits" or "mnist".
        data_dir: Folder of the data set.
        split: How the images are divided among the clients; see `splits.split_indices`.
        clients: Number of clients.
        init: "different" (each client starts from its own random weights) or "shared".
        rounds: 1 is one shot; later rounds start from the merged model.
        epochs: Local epochs of the first round.
        round_epochs: Local epochs of each later round.
        model: Name of the architecture.
        width: Width of the architecture.
        norm: Normalisation layers of the architecture.
        seeds: One repetition for each.
        images: Number of training images to divide, chosen at random; 0 for all.
        limit: Maximum number of training images per client; 0 for all.
        oracle: Whether to train one model on the data of all clients.
        methods: Merging methods to compare, in addition to naive averaging and `rebasin`.
        recipe: Optimiser and augmentation.
        curve_images: Number of test images for each point of the interpolation curves; 0 for all.
        statistics_images: Maximum number of training images per client used for activation
            matching, BatchNorm re-estimation and least squares.
    """

    dataset: str
    data_dir: Path
    split: str
    clients: int
    init: str
    rounds: int
    epochs: int
    round_epochs: int
    model: str
    width: int
    norm: str
    seeds: tuple[int, ...]
    images: int
    limit: int
    oracle: bool
    methods: tuple[str, ...]
    recipe: Recipe
    curve_images: int
    statistics_images: int = 6000

    def build(self, dataset: Dataset, seed: int) -> nn.Module:
        """Build the architecture for a data set, initialised from a seed."""
        return build_model(
            self.model,
            width=self.width,
            norm=self.norm,
            in_channels=dataset.train_images.shape[1],
            num_classes=dataset.num_classes,
            image_size=dataset.train_images.shape[2],
            seed=seed,
        )
