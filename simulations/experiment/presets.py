"""Presets: the values of the options that the user does not set."""

from __future__ import annotations

from dataclasses import dataclass

from experiment.training import Recipe

DEFAULT_NORMS = {"conv": "batch", "resnet20": "layer", "mlp": "none", "mlp2": "none"}


@dataclass(frozen=True)
class Preset:
    """The part of `Settings` that a preset provides, under the same names."""

    model: str
    norm: str
    width: int
    epochs: int
    round_epochs: int
    curve_images: int
    recipe: Recipe


LEARNING_RATES = {"batch": 3e-2, "layer": 3e-3, "group": 3e-3, "none": 1e-3}
"""Peak learning rate of Adam if the norm is not the preset's; BatchNorm tolerates the highest."""

_DIGITS = Recipe(1e-3, 1e-3, batch_size=50, flip=False)

PRESETS = {
    ("quick", "cifar100"): Preset(
        model="conv",
        norm="batch",
        width=32,
        epochs=5,
        round_epochs=1,
        curve_images=1000,
        recipe=Recipe(3e-2, 3e-3, batch_size=125, flip=True),
    ),
    ("quick", "digits"): Preset("mlp", "none", 512, 30, 3, 0, _DIGITS),
    # The CIFAR network of Git Re-Basin: a wide ResNet-20 with LayerNorm.
    ("paper", "cifar100"): Preset(
        model="resnet20",
        norm="layer",
        width=8,
        epochs=100,
        round_epochs=5,
        curve_images=0,
        recipe=Recipe(2e-3, 5e-4, batch_size=250, flip=True),
    ),
    ("paper", "digits"): Preset("mlp", "none", 512, 100, 10, 0, _DIGITS),
}
"""Keyed by preset and data set."""
