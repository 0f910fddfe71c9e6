"""The networks of the simulations: a small conv net, ResNet-20 and a multilayer perceptron."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiment.errors import UserError

DEFAULT_WIDTHS = {"conv": 32, "resnet20": 1, "mlp": 512, "mlp2": 128}
HIDDEN_LAYERS = {"mlp": 3, "mlp2": 2}
NORMS = ("batch", "layer", "group", "none")
MAX_NORM_GROUPS = 8


def default_width(name: str) -> int:
    """Return the default width of a model.

    Raises:
        UserError: The model is unknown.
    """
    if name not in DEFAULT_WIDTHS:
        raise UserError(f"unknown model {name!r}: use one of {', '.join(DEFAULT_WIDTHS)}")
    return DEFAULT_WIDTHS[name]


def build_model(
    name: str,
    *,
    width: int,
    norm: str,
    in_channels: int,
    num_classes: int,
    image_size: int,
    seed: int,
) -> nn.Module:
    """Build a model with PyTorch's default initialisation, drawn from a seed.

    Args:
        name: "conv", "resnet20", "mlp" (three hidden layers) or "mlp2" (two).
        width: Channels of the first stage (conv), multiplier of the channels 16, 32 and 64
            (resnet20), or units per hidden layer (mlp, mlp2).
        norm: "batch", "layer" (over the channels at each position), "group" (at most 8 groups)
            or "none".
        in_channels: Channels of an image.
        num_classes: Number of logits.
        image_size: Height and width of an image in pixels.
        seed: Determines the parameters; global random state does not change.

    Returns:
        A module in training mode, on the CPU, that maps (N, in_channels, image_size, image_size)
        to logits (N, num_classes).

    Raises:
        UserError: The model or the norm is unknown, or `width` is below 1.
    """
    default = default_width(name)
    if norm not in NORMS:
        raise UserError(f"unknown norm {norm!r}: use one of {', '.join(NORMS)}")
    if width < 1:
        raise UserError(
            f"width {width} is below 1: it must be positive; the default of {name} is {default}"
        )
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs, and fork_rng would not restore them.
        torch.default_generator.manual_seed(seed)
        if name == "conv":
            return SmallConvNet(width, norm, in_channels, num_classes, image_size)
        if name == "resnet20":
            return ResNet20(width, norm, in_channels, num_classes)
        return MLP([width] * HIDDEN_LAYERS[name], norm, in_channels * image_size**2, num_classes)


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels at each position of (N, C, H, W), as in Git Re-Basin."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise (N, C, H, W) over C."""
        normalised: Tensor = self.norm(images.permute(0, 2, 3, 1))
        return normalised.permute(0, 3, 1, 2)


class SmallConvNet(nn.Module):
    """Four convolutions (1, 2, 2 and 4 times `width` channels), global mean pool, linear head."""

    def __init__(
        self, width: int, norm: str, in_channels: int, num_classes: int, image_size: int
    ) -> None:
        super().__init__()
        first_kernel, first_stride = (5, 2) if image_size >= 32 else (3, 1)
        plan = [
            # channels, kernel, stride, 2x2 max pooling
            (width, first_kernel, first_stride, False),
            (2 * width, 3, 1, True),
            (2 * width, 3, 1, True),
            (4 * width, 3, 1, False),
        ]
        layers: list[nn.Module] = []
        channels_before = in_channels
        for channels, kernel, stride, pool in plan:
            layers.append(_conv(channels_before, channels, kernel, stride, norm))
            if pool:
                layers.append(nn.MaxPool2d(2))
            layers += [_image_norm(norm, channels), nn.ReLU()]
            channels_before = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels_before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, with a projection if the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride, norm)
        self.norm1 = _image_norm(norm, channels)
        self.conv2 = _conv(channels, channels, 3, 1, norm)
        self.norm2 = _image_norm(norm, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                _conv(in_channels, channels, 1, stride, norm), _image_norm(norm, channels)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        hidden = functional.relu(self.norm1(self.conv1(images)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR (He et al., 2016, section 4.2) with projected shortcuts (option B)."""

    def __init__(self, width: int, norm: str, in_channels: int, num_classes: int) -> None:
        super().__init__()
        plan = [
            # channels, strides of the three blocks
            (16 * width, (1, 1, 1)),
            (32 * width, (2, 1, 1)),
            (64 * width, (2, 1, 1)),
        ]
        channels_before = 16 * width
        self.conv = _conv(in_channels, channels_before, 3, 1, norm)
        self.norm = _image_norm(norm, channels_before)
        blocks = []
        for channels, strides in plan:
            for stride in strides:
                blocks.append(BasicBlock(channels_before, channels, stride, norm))
                channels_before = channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels_before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to logits (N, num_classes)."""
        hidden = self.blocks(functional.relu(self.norm(self.conv(images))))
        logits: Tensor = self.classifier(hidden.mean(dim=(2, 3)))
        return logits


class MLP(nn.Module):
    """A multilayer perceptron on the flattened image."""

    def __init__(self, widths: list[int], norm: str, in_features: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise([in_features, *widths]):
            linear = nn.Linear(before, after, bias=norm != "batch")
            layers += [linear, _unit_norm(norm, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) to logits (N, num_classes)."""
        logits: Tensor = self.layers(images)
        return logits


def _conv(in_channels: int, channels: int, kernel: int, stride: int, norm: str) -> nn.Conv2d:
    # BatchNorm subtracts the mean, which cancels a bias.
    bias = norm != "batch"
    return nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=bias)


def _image_norm(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "layer":
        return ChannelLayerNorm(channels)
    return _group_norm(channels) if norm == "group" else nn.Identity()


def _unit_norm(norm: str, units: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm1d(units)
    if norm == "layer":
        return nn.LayerNorm(units)
    return _group_norm(units) if norm == "group" else nn.Identity()


def _group_norm(channels: int) -> nn.GroupNorm:
    groups = next(n for n in range(MAX_NORM_GROUPS, 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels)
