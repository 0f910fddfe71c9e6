"""The networks of the matching and merging benchmarks, and a few minutes of training for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]


def mlp() -> nn.Module:
    """Return the MNIST net of the paper: three hidden layers of 512 units."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (784, 512, 512):
        layers += [nn.Linear(inputs, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def vgg16_bn() -> nn.Module:
    """Return VGG-16 with BatchNorm for CIFAR images."""
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 100))


class Block(nn.Module):
    """A basic residual block with BatchNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output."""
        inner = F.relu(self.first_norm(self.first(images)))
        return F.relu(self.second_norm(self.second(inner)) + self.shortcut(images))


def resnet20(width: int) -> nn.Module:
    """Return ResNet-20 for CIFAR images, `width` times as wide."""
    channels = 16 * width
    stem = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(channels), nn.ReLU()]
    for stage in range(3):
        for place in range(3):
            outputs = 16 * width * 2**stage
            layers.append(Block(channels, outputs, 2 if stage and not place else 1))
            channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 100))


@dataclass(frozen=True)
class Net:
    """A network of the benchmarks.

    Attributes:
        build: Returns a model with random weights.
        shape: Shape of its inputs.
        data: Its training data: "mnist", "cifar100" or "" (never trained).
        images: Number of training images.
        epochs: Number of training epochs.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    data: str = ""
    images: int = 0
    epochs: int = 0


NETS = {
    "MLP 3x512": Net(mlp, (2, 1, 28, 28), "mnist", 60_000, 5),
    "ResNet-20 x4": Net(lambda: resnet20(4), (2, 3, 32, 32), "cifar100", 500, 1),
    "ResNet-20 x8": Net(lambda: resnet20(8), (2, 3, 32, 32), "cifar100", 250, 1),
    "VGG-16-BN": Net(vgg16_bn, (2, 3, 32, 32)),
    "ResNet-50": Net(torchvision.models.resnet50, (2, 3, 64, 64)),
    "ViT-B/16": Net(torchvision.models.vit_b_16, (2, 3, 224, 224)),
}


def images_of(name: str, folder: Path, count: int, *, train: bool = True) -> tuple[Tensor, Tensor]:
    """Return the first images and labels of a training or test set in torchvision's folder."""
    if name == "mnist":
        mnist = torchvision.datasets.MNIST(str(folder), train=train)
        return (mnist.data[:count, None].float() / 255 - 0.13) / 0.31, mnist.targets[:count]
    cifar = torchvision.datasets.CIFAR100(str(folder), train=train)
    images = torch.from_numpy(cifar.data[:count]).permute(0, 3, 1, 2).float()
    return images / 127.5 - 1, torch.tensor(cifar.targets[:count])


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batches: Iterable[Tensor],
) -> None:
    """Train a model in place, one step for each batch of indices."""
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


def state_of(name: str, seed: int, folder: Path | None) -> State:
    """Return the weights of a network: random, or trained on the data in a folder."""
    net = NETS[name]
    torch.manual_seed(seed)
    model = net.build()
    if folder is not None:
        images, labels = images_of(net.data, folder, net.images)
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        size = 500 if net.data == "mnist" else 100
        for _ in range(net.epochs):
            train_epoch(model, optimizer, images, labels, torch.randperm(len(images)).split(size))
    return {key: value.contiguous() for key, value in model.state_dict().items()}
