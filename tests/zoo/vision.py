"""Convolutional nets: channels are units, positions keep their order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from zoo.entry import Entry, features, image


def conv(enter: int, leave: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(enter, leave, kernel, stride, kernel // 2, groups=groups, bias=False)


def normed(enter: int, leave: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(enter, leave, kernel, groups), nn.BatchNorm2d(leave), nn.ReLU())


class Unet(nn.Module):
    """U-Net: downsampling and upsampling with concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = normed(3, 4), normed(4, 6), normed(6, 8)
        self.up2 = nn.ConvTranspose2d(8, 7, 2, stride=2)
        self.join2 = normed(7 + 6, 9)
        self.up1 = nn.ConvTranspose2d(9, 5, 2, stride=2)
        self.join1 = normed(5 + 4, 10)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(F.max_pool2d(first, 2))
        hidden = self.middle(F.max_pool2d(second, 2))
        hidden = self.join2(torch.cat([self.up2(hidden), second], dim=1))
        return self.head(self.join1(torch.cat([first, self.up1(hidden)], dim=1)))


class Mixer(nn.Module):
    """An MLP across the patches, and one across the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.patches = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4))
        self.channels = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images).flatten(2).transpose(1, 2)
        hidden = hidden + self.patches(self.norm1(hidden).transpose(1, 2)).transpose(1, 2)
        hidden = hidden + self.channels(self.norm2(hidden))
        return self.head(hidden.mean(dim=1))


class Squeezed(nn.Module):
    """Squeeze and excitation: channels are weighted by a function of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = normed(3, 8)
        self.reduce, self.restore = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        weight = F.adaptive_avg_pool2d(hidden, 1)
        weight = F.hardsigmoid(self.restore(F.silu(self.reduce(weight))))
        return self.head((hidden * weight).mean((-2, -1)))


class Inverted(nn.Module):
    """MobileNet's block: a wide depthwise convolution and a linear bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 5), nn.BatchNorm2d(5), nn.ReLU6())
        self.block = nn.Sequential(
            conv(5, 9, 1),
            nn.BatchNorm2d(9),
            nn.Hardswish(),
            conv(9, 9, 3, groups=9),
            nn.BatchNorm2d(9),
            nn.Hardswish(),
            conv(9, 5, 1),
            nn.BatchNorm2d(5),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        return self.head(hidden + self.block(hidden))


class Next(nn.Module):
    """ResNeXt's block: a grouped convolution between two 1 x 1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = normed(3, 7)
        self.block = nn.Sequential(
            *normed(7, 12, 1), *normed(12, 15, 3, groups=3), conv(15, 7, 1), nn.BatchNorm2d(7)
        )
        self.head = nn.Linear(7, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        return self.head(torch.relu(hidden + self.block(hidden)).mean((2, 3)))


class ConvNext(nn.Module):
    """ConvNeXt's block: channels last inside, and one scale per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6, eps=1e-6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.scale = nn.Parameter(torch.full((6,), 0.1))
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        inside = self.norm(self.depthwise(hidden).permute(0, 2, 3, 1))
        inside = self.scale * self.down(F.gelu(self.up(inside)))
        return self.head((hidden + inside.permute(0, 3, 1, 2)).mean((2, 3)))


class Shuffled(nn.Module):
    """ShuffleNet: a hand-written channel shuffle between two grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.first = nn.Conv2d(6, 8, 1, groups=2)
        self.second = nn.Conv2d(8, 20, 3, groups=4)
        self.head = nn.Conv2d(20, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.first(torch.relu(self.stem(images))))
        batch, _, height, width = hidden.shape
        hidden = hidden.view(batch, 2, 4, height, width).transpose(1, 2).contiguous()
        return self.head(torch.relu(self.second(hidden.view(batch, -1, height, width))))


class Pyramid(nn.Module):
    """Spatial pyramid pooling: channels pooled to several sizes, flattened and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = normed(3, 6)
        self.inside = nn.Linear(6 * (1 + 4 + 9), 7)
        self.head = nn.Linear(7, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        pools = [F.adaptive_max_pool2d(hidden, size).flatten(1) for size in (1, 2, 3)]
        return self.head(F.softplus(self.inside(torch.cat(pools, dim=1))))


class Generator(nn.Module):
    """DCGAN: a linear layer reshaped to an image, then transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6 * 2 * 2)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        hidden = self.stem(noise).view(-1, 6, 2, 2)
        return self.up(torch.relu(self.norm(hidden)))


class Random(nn.Module):
    """Stochastic depth, at the rate of a module that tests set to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Dropout(0.2)
        self.stem = conv(3, 6)
        self.block = nn.Sequential(*normed(6, 8), conv(8, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        inside = stochastic_depth(self.block(hidden), self.rate.p, "row", self.training)
        return self.head((hidden + inside).mean((2, 3)))


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(7, 12) / 3)
        self.second = nn.Parameter(torch.randn(5, 7) / 3)
        self.inner = nn.Parameter(torch.zeros(7))
        self.outer = nn.Parameter(torch.zeros(12))

    def forward(self, images: Tensor) -> Tensor:
        code = F.linear(torch.sigmoid(F.linear(images.flatten(1), self.first)), self.second)
        inside = torch.sigmoid(F.linear(code, self.second.t(), self.inner))
        return F.linear(inside, self.first.t(), self.outer).view_as(images)


class Auxiliary(nn.Module):
    """A second head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deeper = normed(3, 6), normed(6, 8)
        self.aux = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 2))
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.stem(images)
        outputs = self.head(self.deeper(hidden).mean((2, 3)))
        if self.training:
            return outputs, self.aux(hidden.mean((2, 3)))
        return outputs


class FeaturePyramid(nn.Module):
    """Feature pyramid: levels of a backbone are projected to one width, upsampled and added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = normed(3, 4), normed(4, 6), normed(6, 8)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 7, 1) for width in (4, 6, 8))
        self.smooth = nn.ModuleList(nn.Conv2d(7, 9, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(9, 2, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.first(images)
        second = self.second(F.max_pool2d(first, 2))
        third = self.third(F.max_pool2d(second, 2))
        levels = [
            lateral(x) for lateral, x in zip(self.lateral, (first, second, third), strict=True)
        ]
        levels[1] = levels[1] + F.interpolate(levels[2], scale_factor=2.0, mode="nearest")
        levels[0] = levels[0] + F.interpolate(
            levels[1], size=levels[0].shape[-2:], mode="bilinear", align_corners=False
        )
        return [self.head(F.relu(smooth(x))) for smooth, x in zip(self.smooth, levels, strict=True)]


class Branches(nn.Module):
    """Inception: branches of several kinds, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = normed(3, 6)
        self.one = normed(6, 4, 1)
        self.three = nn.Sequential(*normed(6, 7, 1), *normed(7, 5))
        self.pool = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), *normed(6, 8, 1))
        self.norm = nn.BatchNorm2d(17)
        self.head = nn.Linear(17, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        joined = torch.cat([self.one(hidden), self.three(hidden), self.pool(hidden)], dim=1)
        return self.head(self.norm(joined).amax((2, 3)))


class HalfPassed(nn.Module):
    """ShuffleNet v2 and CSP: one half of the channels bypasses the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = normed(3, 9)
        self.block = nn.Sequential(*normed(5, 7), *normed(7, 6))
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        passed, inside = torch.split(self.stem(images), [4, 5], dim=1)
        return self.head(torch.cat((self.block(inside), passed), dim=1))


class NonLocal(nn.Module):
    """Attention over the positions of an image, added with a learned weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.query, self.key = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)
        self.value, self.out = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.share = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.avg_pool2d(self.stem(images), 2)
        query, key, value = (x(hidden).flatten(2) for x in (self.query, self.key, self.value))
        weights = torch.bmm(query.transpose(1, 2), key).softmax(-1)
        found = torch.bmm(value, weights.transpose(1, 2)).unflatten(2, hidden.shape[2:])
        return self.head((hidden + self.share * self.out(found)).mean((2, 3)))


class Modulated(nn.Module):
    """FiLM and adaptive instance norm: a condition scales and shifts the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.norm = nn.InstanceNorm2d(6)
        self.condition = nn.Sequential(nn.Linear(4, 7), nn.SiLU(), nn.Linear(7, 12))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        return self.head(torch.relu(self.norm(self.stem(images)) * (1 + scale) + shift))


VISION = {
    "unet": Entry(Unet, image(), (4, 5, 6, 7, 8, 9, 10)),
    "mlp-mixer": Entry(Mixer, image(), (6, 9, 10)),
    "squeeze-excitation": Entry(Squeezed, image(), (5, 8)),
    "inverted-residual": Entry(Inverted, image(), (5, 9)),
    "resnext": Entry(Next, image(), (3, 4, 5, 7)),
    "convnext": Entry(ConvNext, image(), (6, 10)),
    "pixel-shuffle": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 20, 3, padding=1),
            nn.PixelShuffle(2),
            nn.PReLU(5),
            nn.Conv2d(5, 2, 1),
        ),
        image(),
        (5, 6),
    ),
    "pixel-unshuffle": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.PixelUnshuffle(2),
            nn.Conv2d(24, 5, 1),
            nn.ReLU(),
            nn.Conv2d(5, 2, 1),
        ),
        image(),
        (5, 6),
    ),
    "conv-1d": Entry(
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 3),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(6, 5, 3, dilation=2),
            nn.AdaptiveMaxPool1d(2),
            nn.Flatten(),
            nn.Linear(10, 2),
        ),
        features(2, 3, 14),
        (5, 6),
    ),
    "conv-3d": Entry(
        lambda: nn.Sequential(
            nn.Conv3d(2, 6, 3),
            nn.BatchNorm3d(6),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(6, 5, 2),
            nn.ELU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(5, 2),
        ),
        features(2, 2, 6, 6, 6),
        (5, 6),
    ),
    "conv-transposed-1d": Entry(
        lambda: nn.Sequential(
            nn.ConvTranspose1d(3, 6, 3),
            nn.GroupNorm(1, 6),
            nn.Mish(),
            nn.ConvTranspose1d(6, 5, 2, stride=2, output_padding=1),
            nn.Tanh(),
            nn.Conv1d(5, 2, 1),
        ),
        features(2, 3, 7),
        (5, 6),
    ),
    "conv-transposed-3d-grouped": Entry(
        lambda: nn.Sequential(
            nn.ConvTranspose3d(3, 8, 2),
            nn.ReLU(),
            nn.ConvTranspose3d(8, 10, 2, groups=2),
            nn.BatchNorm3d(10),
            nn.ReLU(),
            nn.Conv3d(10, 2, 1),
        ),
        features(2, 3, 3, 3, 3),
        (2, 4, 5),
    ),
    "group-norm": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3),
            nn.GroupNorm(3, 12),
            nn.ReLU(),
            nn.Conv2d(12, 5, 3),
            nn.GroupNorm(1, 5),
            nn.ReLU(),
            nn.Conv2d(5, 2, 1),
        ),
        image(),
        (3, 4, 5),
    ),
    "group-norm-nested": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 30, 3),
            nn.GroupNorm(2, 30),
            nn.ReLU(),
            nn.GroupNorm(6, 30),
            nn.ReLU(),
            nn.Conv2d(30, 2, 1),
        ),
        image(),
        (2, 3, 5),
    ),
    "group-norm-crossed": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3),
            nn.GroupNorm(2, 12),
            nn.ReLU(),
            nn.GroupNorm(3, 12),
            nn.ReLU(),
            nn.Conv2d(12, 2, 1),
        ),
        image(),
        (2, 2, 4, 4),
    ),
    "group-norm-without-affine": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3),
            nn.GroupNorm(3, 12, affine=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 36, 2),
        ),
        image(),
        (3, 4),
    ),
    "instance-norm": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            nn.LeakyReLU(0.1),
            nn.Conv2d(6, 5, 3),
            nn.InstanceNorm2d(5, affine=True),
            nn.Conv2d(5, 2, 1),
        ),
        image(),
        (5, 6),
    ),
    "prelu": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.Conv2d(6, 5, 3), nn.PReLU(), nn.Conv2d(5, 2, 1)
        ),
        image(),
        (5, 6),
    ),
    "glu-channels": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 14, 3),
            nn.BatchNorm2d(14),
            nn.GLU(dim=1),
            nn.Conv2d(7, 10, 3),
            nn.GLU(dim=1),
            nn.Conv2d(5, 2, 1),
        ),
        image(),
        (5, 7),
    ),
    "channel-shuffle": Entry(Shuffled, image(), (2, 3, 4, 5)),
    "channel-shuffle-module": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 10, 1),
            nn.ReLU(),
            nn.Conv2d(10, 8, 3, groups=2),
            nn.ChannelShuffle(2),
            nn.ReLU(),
            nn.Conv2d(8, 2, 1),
        ),
        image(),
        (2, 4, 5),
    ),
    "pyramid-pooling": Entry(Pyramid, image(), (6, 7)),
    "dcgan-generator": Entry(Generator, features(2, 5), (4, 6)),
    "vgg": Entry(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 9),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(9, 7),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(7, 2),
        ),
        image(),
        (6, 7, 8, 9),
    ),
    "stochastic-depth": Entry(Random, image(), (6, 8)),
    "autoencoder-tied": Entry(TiedAutoencoder, lambda: torch.zeros(2, 3, 2, 2), (5, 7)),
    "auxiliary-head": Entry(Auxiliary, image(), (5, 6, 8)),
    "feature-pyramid": Entry(FeaturePyramid, image(), (4, 6, 7, 8, 9)),
    "inception": Entry(Branches, image(), (4, 5, 6, 7, 8)),
    "split-passed-by": Entry(HalfPassed, image(), (4, 5, 6, 7)),
    "non-local": Entry(NonLocal, image(), (5, 6, 8)),
    "modulated": Entry(
        Modulated,
        lambda: {"images": torch.zeros(2, 3, 8, 8), "condition": torch.zeros(2, 4)},
        (6, 7),
    ),
}
