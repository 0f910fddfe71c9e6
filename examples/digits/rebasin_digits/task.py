"""The task without Flower: data, partitions, model, training and evaluation."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

PIXELS = 64
CLASSES = 10
TEST_IMAGES = 397
"""Out of 1,797; the server evaluates on these images, and no client trains on them."""

Examples = tuple[Tensor, Tensor]
"""Images (float32 in [0, 1], shape (N, 64)) and labels (int64, shape (N,))."""


def build_model(hidden_units: int) -> nn.Module:
    """Return an MLP with random weights."""
    return nn.Sequential(
        nn.Linear(PIXELS, hidden_units),
        nn.BatchNorm1d(hidden_units),
        nn.ReLU(),
        nn.Linear(hidden_units, hidden_units),
        nn.BatchNorm1d(hidden_units),
        nn.ReLU(),
        nn.Linear(hidden_units, CLASSES),
    )


def _shuffled(seed: int) -> Examples:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels).long()[order]


def test_part(seed: int) -> Examples:
    """Return the test images, which no client has."""
    images, labels = _shuffled(seed)
    return images[:TEST_IMAGES], labels[:TEST_IMAGES]


def train_part(partition: int, partitions: int, seed: int) -> Examples:
    """Return a client's images: every n-th of the shuffled images, which makes the parts IID.

    Raises:
        ValueError: The partition does not exist.
    """
    if not 0 <= partition < partitions:
        raise ValueError(f"partition-id must be 0 to {partitions - 1}, got {partition}")
    images, labels = _shuffled(seed)
    chosen = slice(TEST_IMAGES + partition, None, partitions)
    return images[chosen], labels[chosen]


def train(
    model: nn.Module,
    examples: Examples,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> float:
    """Train a model in place with Adam; return the mean loss of the last epoch, in nats."""
    images, labels = examples
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    mean = 0.0
    for _ in range(epochs):
        losses = []
        for chosen in torch.randperm(len(labels), generator=generator).split(batch_size):
            if len(chosen) == 1:  # BatchNorm cannot train on one image.
                continue
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        mean = sum(losses) / max(1, len(losses))
    return mean


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples) -> dict[str, float]:
    """Return the loss in nats and the accuracy."""
    images, labels = examples
    logits = model.eval()(images)
    return {
        "loss": float(functional.cross_entropy(logits, labels)),
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
    }
