"""Seeds for each use of randomness, and what is drawn from them on client and server alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from experiment.data import Dataset
from experiment.settings import Settings
from experiment.splits import split_indices


def derived_seed(seed: int, *use: int | str) -> int:
    """Return the seed of one use of randomness, independent of all other uses."""
    words = [word for part in use for word in (part.encode() if isinstance(part, str) else [part])]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])


def client_indices(settings: Settings, dataset: Dataset, seed: int) -> list[NDArray[np.int64]]:
    """Return the training images of each client, at most `settings.limit` each (0: all)."""
    rng = np.random.default_rng(derived_seed(seed, "split"))
    parts = split_indices(
        dataset.train_labels.numpy(), settings.split, settings.clients, dataset.num_classes, rng
    )
    if settings.limit:
        parts = [np.sort(rng.permutation(part)[: settings.limit]) for part in parts]
    return parts


def shared_model(settings: Settings, dataset: Dataset, seed: int) -> nn.Module:
    """Return the initial global model."""
    return settings.build(dataset, derived_seed(seed, "model"))


def client_model(settings: Settings, dataset: Dataset, seed: int, client: int) -> nn.Module:
    """Return the model that a client starts from if inits are different."""
    return settings.build(dataset, derived_seed(seed, "model", client))
