"""What one run of a simulation does: the checked form of its command line."""

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
        data_dir: Folder of CIFAR-100.
        split: Rule by which images are dealt out, as `splits.split_indices` reads it.
        clients: Number of clients.
        init: "different" (each client starts from weights of its own) or "shared".
        rounds: 1 is one shot; later rounds start from the merged model.
        epochs: Local epochs of the first round.
        round_epochs: Local epochs of each later round.
        model: Name of the architecture.
        width: Its width.
        norm: Its normalisation layers.
        seeds: One repetition each.
        images: Training images to deal out, taken at random; 0 for all.
        limit: At most so many training images a client; 0 for all.
        oracle: Whether one model is trained on all the data.
        methods: Merging methods to compare, beside naive averaging and `rebasin`.
        recipe: Optimiser and augmentation.
        curve_images: Test images for each point of the interpolation curves; 0 for all.
        statistics_images: Training images of each client that models are matched, re-estimated and
            fitted on, at most.
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
