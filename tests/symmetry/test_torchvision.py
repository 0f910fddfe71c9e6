"""All classification models of torchvision, unmodified: their specs are free, and they hold."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from fl_rebasin import derive_spec

NAMES = torchvision.models.list_models(module=torchvision.models)
SIZES = {"inception_v3": 299}
"""Minimum image size, where it is not 64."""
OPTIONS = {name: {"init_weights": False} for name in ("googlenet", "inception_v3")}
"""These two warn that their initial weights will change."""
SMALL = 30_000_000
"""For models with more parameters, the self-check of the derivation suffices."""


def image_size(name: str) -> int:
    return 224 if name.startswith(("vit", "maxvit")) else SIZES.get(name, 64)


def build(name: str) -> nn.Module:
    """Build a model, if possible on the meta device, where weights need no initialisation."""
    options = OPTIONS.get(name, {})
    try:
        with torch.device("meta"):
            return torchvision.models.get_model(name, **options)
    except (RuntimeError, NotImplementedError):  # The constructor reads values of its tensors.
        return torchvision.models.get_model(name, **options)


def test_the_list_of_models_is_complete() -> None:
    assert len(NAMES) >= 80


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_spec_is_free_and_holds(name: str) -> None:
    model = build(name)
    inputs = torch.zeros(1, 3, image_size(name), image_size(name))
    # If the self-check pins a group it warns, which is an error in tests.
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
            # Fresh biases and norms have equal values.
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
