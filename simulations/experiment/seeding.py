"""Seeds for each use of randomness, and what client and server both draw from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from experiment.data import Dataset
from experiment.methods import GUARD
from experiment.settings import Settings
from experiment.splits import split_indices

HELD_OUT_SHARE = 0.05
"""Share of a client's images that it holds out, so that the guard can compare models on them."""
MAX_HELD_OUT = 1000


def derived_seed(seed: int, *use: int | str) -> int:
    """Return the seed for one use of randomness, independent of all other uses."""
    words = [word for part in use for word in (part.encode() if isinstance(part, str) else [part])]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])


def client_indices(settings: Settings, dataset: Dataset, seed: int) -> list[NDArray[np.int64]]:
    """Return the training images of each client, at most `settings.limit` each (0: all)."""
    rng = np.random.default_rng(derived_seed(seed, "split"))
    labels = dataset.train_labels.numpy()
    available = np.arange(len(labels))
    if settings.images:
        available = np.sort(rng.permutation(available)[: settings.images])
    parts = [
        available[part]
        for part in split_indices(
            labels[available], settings.split, settings.clients, dataset.num_classes, rng
        )
    ]
    if settings.limit:
        parts = [np.sort(rng.permutation(part)[: settings.limit]) for part in parts]
    return parts


def hold_out(part: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split a client's images into those to train on and those to hold out."""
    count = min(MAX_HELD_OUT, int(HELD_OUT_SHARE * len(part)))
    order = np.random.default_rng(seed).permutation(len(part))
    return np.sort(part[order[count:]]), np.sort(part[order[:count]])


def client_parts(
    settings: Settings, dataset: Dataset, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return for each client its training images and its held-out images (only for the guard)."""
    parts = client_indices(settings, dataset, seed)
    if GUARD not in settings.methods:
        return [(part, part[:0]) for part in parts]
    return [
        hold_out(part, derived_seed(seed, "held back", client)) for client, part in enumerate(parts)
    ]


def shared_model(settings: Settings, dataset: Dataset, seed: int) -> nn.Module:
    """Return the initial global model."""
    return settings.build(dataset, derived_seed(seed, "model"))


def client_model(settings: Settings, dataset: Dataset, seed: int, client: int) -> nn.Module:
    """Return the initial model of a client if each client has its own."""
    return settings.build(dataset, derived_seed(seed, "model", client))
