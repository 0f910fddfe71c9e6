"""Training and evaluation of one model on one device."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiment.data import Dataset

EVALUATION_BATCH = 500
STATISTICS_BATCH = 250
SHORTEST_CYCLE = 8
"""In a shorter one-cycle schedule PyTorch divides by zero: warm-up has less than two steps."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: Adam with a one-cycle learning rate (Smith and Topin, 2019).

    Attributes:
        learning_rate: Peak of the cycle in the first round.
        round_learning_rate: Peak in each later round, which starts from a trained model.
        batch_size: Images per step; an epoch skips a smaller last batch unless it is the only one.
        flip: Whether to mirror images at random.
    """

    learning_rate: float
    round_learning_rate: float
    batch_size: int
    flip: bool


def pick_device() -> torch.device:
    """Return the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context of bfloat16 autocast if the hardware supports it, otherwise of float32.

    A processor without bfloat16 instructions emulates them many times slower.
    """
    native = device.type == "cuda" or any(
        torch.cpu.get_capabilities().get(name, False)
        for name in ("avx512_bf16", "amx_bf16", "bf16")
    )
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=native)


def train(
    model: nn.Module,
    dataset: Dataset,
    images: Tensor,
    labels: Tensor,
    *,
    recipe: Recipe,
    first_round: bool,
    epochs: int,
    seed: int,
    on_step: Callable[[int, int], None],
) -> float:
    """Train a model in place.

    Args:
        model: Changed; on return it is on the CPU in training mode.
        dataset: Normalises the images.
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        recipe: Optimiser and augmentation.
        first_round: Whether this is the first round, which has its own learning rate.
        epochs: Number of passes over the images.
        seed: Seeds the order of the images and the augmentation.
        on_step: Called after each step with the number of steps done and the total.

    Returns:
        Mean training loss of the last epoch, in nats.
    """
    device = pick_device()
    generator = torch.Generator().manual_seed(seed)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images, labels = images.to(device), labels.to(device)
    batch = min(recipe.batch_size, len(labels))
    per_epoch = len(labels) // batch
    total = epochs * per_epoch
    peak = recipe.learning_rate if first_round else recipe.round_learning_rate
    optimiser = torch.optim.Adam(model.parameters(), lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=peak, total_steps=max(total, SHORTEST_CYCLE), pct_start=0.25
    )
    losses: list[Tensor] = []
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator).to(device)
        losses.clear()
        for step in range(per_epoch):
            chosen = order[step * batch : (step + 1) * batch]
            inputs = dataset.normalise(images[chosen])
            if recipe.flip:
                mirrored = (torch.rand(batch, 1, 1, 1, generator=generator) < 0.5).to(device)
                inputs = torch.where(mirrored, inputs.flip(3), inputs)
            inputs = inputs.to(memory_format=torch.channels_last)
            with mixed_precision(device):
                loss = functional.cross_entropy(model(inputs), labels[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
            on_step(epoch * per_epoch + step + 1, total)
    model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return float(torch.stack(losses).mean())


def predict(model: nn.Module, dataset: Dataset, images: Tensor) -> Tensor:
    """Return the logits of a model in evaluation mode.

    Args:
        model: Moved to the GPU if there is one.
        dataset: Normalises the images.
        images: uint8, shape (N, C, H, W).

    Returns:
        float32, shape (N, num_classes), on the CPU.
    """
    device = pick_device()
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    with torch.no_grad(), mixed_precision(device):
        return torch.cat(
            [
                model(dataset.normalise(part.to(device)).to(memory_format=torch.channels_last))
                .float()
                .cpu()
                for part in images.split(EVALUATION_BATCH)
            ]
        )


def statistics_batches(
    dataset: Dataset, images: Tensor, labels: Tensor, limit: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of randomly chosen, normalised images with their labels.

    Args:
        dataset: Normalises the images.
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        limit: Maximum number of images.
        seed: Seeds the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:limit]
    for part in chosen.split(STATISTICS_BATCH):
        # BatchNorm cannot estimate a variance from one image with one pixel per channel.
        if len(part) > 1 or len(chosen) == 1:
            yield (
                dataset.normalise(images[part]).to(memory_format=torch.channels_last),
                labels[part],
            )
