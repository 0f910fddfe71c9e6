"""Seeds for each use of randomness, and what is drawn from them on client and server alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from experiment.data import Dataset
from experiment.methods import GUARD
from experiment.settings import Settings
from experiment.splits import split_indices

HELD_BACK, MAX_HELD_BACK = 0.05, 1000
"""Share of a client's images that the guard judges models by, and the most."""


def derived_seed(seed: int, *use: int | str) -> int:
    """Return the seed of one use of randomness, independent of all other uses."""
    words = [word for part in use for word in (part.encode() if isinstance(part, str) else [part])]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])


def client_indices(settings: Settings, dataset: Dataset, seed: int) -> list[NDArray[np.int64]]:
    """Return the training images of each client, at most `settings.limit` each (0: all)."""
    rng = np.random.default_rng(derived_seed(seed, "split"))
    labels = dataset.train_labels.numpy()
    dealt = np.arange(len(labels))
    if settings.images:
        dealt = np.sort(rng.permutation(dealt)[: settings.images])
    parts = [
        dealt[part]
        for part in split_indices(
            labels[dealt], settings.split, settings.clients, dataset.num_classes, rng
        )
    ]
    if settings.limit:
        parts = [np.sort(rng.permutation(part)[: settings.limit]) for part in parts]
    return parts


def held_back(part: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a client's images to train on, and those to judge models by, which are left out."""
    count = min(MAX_HELD_BACK, int(HELD_BACK * len(part)))
    order = np.random.default_rng(seed).permutation(len(part))
    return np.sort(part[order[count:]]), np.sort(part[order[:count]])


def client_parts(
    settings: Settings, dataset: Dataset, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the images that each client trains on, and those that it holds back for the guard."""
    parts = client_indices(settings, dataset, seed)
    if GUARD not in settings.methods:
        return [(part, part[:0]) for part in parts]
    return [
        held_back(part, derived_seed(seed, "held back", client))
        for client, part in enumerate(parts)
    ]


def shared_model(settings: Settings, dataset: Dataset, seed: int) -> nn.Module:
    """Return the initial global model."""
    return settings.build(dataset, derived_seed(seed, "model"))


def client_model(settings: Settings, dataset: Dataset, seed: int, client: int) -> nn.Module:
    """Return the model that a client starts from if inits are different."""
    return settings.build(dataset, derived_seed(seed, "model", client))
