"""Every classification model of torchvision, unmodified: what its spec opens, and that it holds."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from fl_rebasin import derive_spec

NAMES = torchvision.models.list_models(module=torchvision.models)
SIZES = {"inception_v3": 299}
"""The least side of an image that the model takes, where it is not 64."""
OPTIONS = {name: {"init_weights": False} for name in ("googlenet", "inception_v3")}
"""These two announce that their initial weights will change."""
SMALL = 30_000_000
"""Models with more parameters are only proved by the derivation's own check."""


def image_size(name: str) -> int:
    return 224 if name.startswith(("vit", "maxvit")) else SIZES.get(name, 64)


def build(name: str) -> nn.Module:
    """Build a model; on meta tensors where its constructor allows, which saves the time to fill."""
    options = OPTIONS.get(name, {})
    try:
        with torch.device("meta"):
            return torchvision.models.get_model(name, **options)
    except (RuntimeError, NotImplementedError):  # It reads numbers off its tensors.
        return torchvision.models.get_model(name, **options)


def test_all_are_listed() -> None:
    assert len(NAMES) >= 80


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_spec_of_a_model_is_free_and_holds(name: str) -> None:
    model = build(name)
    inputs = torch.zeros(1, 3, image_size(name), image_size(name))
    # A warning, as of a group that the self-check pins, is an error here.
    spec = derive_spec(model, inputs)
    assert spec.freedom >= 0.95, set(spec.pinned.values())
    assert not [reason for reason in spec.pinned.values() if "no rule" in reason]
    if sum(parameter.numel() for parameter in model.parameters()) > SMALL:
        return
    real = (
        torchvision.models.get_model(name, **OPTIONS.get(name, {}))
        if any(parameter.is_meta for parameter in model.parameters())
        else model
    )
    generator = torch.Generator().manual_seed(1)
    double = copy.deepcopy(real).double().eval()
    with torch.no_grad():
        for parameter in double.parameters():
            # Biases and norms start alike.
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=generator, dtype=torch.float64
                )
        images = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
        before = double(images)
        permutation = spec.random(generator)
        assert permutation.moved > 0
        double.load_state_dict(spec.apply(permutation, double.state_dict()))
        torch.testing.assert_close(double(images), before, rtol=1e-9, atol=1e-9)
