"""Basic nets: dense, convolutional, residual, normalised, tied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.entry import Entry, image


class Residual(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 5, 3, padding=1)
        self.norm1 = norm(5)
        self.second = nn.Conv2d(5, 6, 3, padding=1)
        self.norm2 = norm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(images))
        inside = torch.relu(self.norm1(self.first(hidden)))
        hidden = hidden + self.norm2(self.second(inside))
        return self.head(hidden.mean((2, 3)))


class Dense(nn.Module):
    """Skip concatenations, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.second = nn.Conv2d(7, 5, 3, padding=1)
        self.head = nn.Linear(12 * 16, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.cat([images, self.first(images)], 1)
        hidden = torch.cat([self.second(F.relu(self.norm(hidden))), hidden], 1)
        return self.head(F.avg_pool2d(hidden, 2).flatten(1))


class Separable(nn.Module):
    """Depthwise, grouped and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.multiplier = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 12, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(12, 5, 2, stride=2)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu6(self.depthwise(self.stem(images)))
        return self.head(F.gelu(self.up(self.grouped(self.multiplier(hidden)))))


class Tied(nn.Module):
    """An embedding tied to the output layer, and a submodule that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6))
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) * self.scale
        hidden = hidden + self.block(hidden)
        hidden = hidden + self.block(hidden)
        return self.out(hidden)


class Chunked(nn.Module):
    """A gated unit: the outputs of one linear layer are cut into value and gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 10)
        self.down = nn.Linear(5, 3)

    def forward(self, inputs: Tensor, *, gain: Tensor) -> Tensor:
        value, gate = self.up(inputs * gain).chunk(2, dim=-1)
        return self.down(value * torch.sigmoid(gate))


def mlp(width: int = 7) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(12, width),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 4),
    )


def conv_flat() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 4),
    )


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.LeakyReLU(),
        nn.Conv2d(8, 6, 3),
        nn.GroupNorm(6, 6),
        nn.Flatten(),
        nn.LayerNorm(6 * 16),
        nn.Linear(6 * 16, 3),
    )


BASICS = {
    "mlp": Entry(mlp, lambda: torch.zeros(2, 3, 2, 2), (7, 7)),
    "conv-batchnorm-flatten": Entry(conv_flat, image(), (5, 6)),
    "group-and-layer-norm": Entry(norms, image(), (2, 4, 6)),
    "residual-batchnorm": Entry(lambda: Residual(nn.BatchNorm2d), image(), (5, 6)),
    "residual-no-norm": Entry(lambda: Residual(lambda n: nn.Identity()), image(), (5, 6)),
    "dense-concat": Entry(Dense, image(), (4, 5)),
    "depthwise-grouped-transposed": Entry(Separable, image(), (2, 2, 3, 4, 5)),
    "tied-shared": Entry(Tied, lambda: torch.arange(8).reshape(2, 4), (6, 9)),
    "chunk-keywords": Entry(
        Chunked, lambda: {"inputs": torch.zeros(3, 4), "gain": torch.zeros(4)}, (5,)
    ),
}
