"""What several tests need: models with no two units alike, and their outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from zoo import ZOO, Entry

from fl_rebasin import Permutation, PermutationSpec, derive_spec

State = dict[str, Tensor]


def generic(entry: Entry, seed: int) -> nn.Module:
    """A float64 model in which no parameter or buffer is constant, and without dropout."""
    generator = torch.Generator().manual_seed(seed)
    model = entry.build().double()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 2)
        for tensor in model.buffers():
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(drawn + 0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def state_of(model: nn.Module) -> State:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def random_state(entry: Entry, seed: int) -> State:
    """A float32 state dict of a generic model."""
    return {
        key: value.float() if value.is_floating_point() else value
        for key, value in state_of(generic(entry, seed)).items()
    }


def spec_of(entry: Entry) -> PermutationSpec:
    return derive_spec(entry.build(), entry.inputs())


def random_order(spec: PermutationSpec, seed: int) -> Permutation:
    return spec.random(torch.Generator().manual_seed(seed))


def shuffled(spec: PermutationSpec, state: State, seed: int) -> State:
    """The state dict after a random permutation."""
    return spec.apply(random_order(spec, seed), state)


def random_inputs(entry: Entry, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        return leaf

    return tree_map(draw, entry.inputs())


def run(model: nn.Module, state: Mapping[str, Tensor], inputs: Any, training: bool) -> Any:
    """Outputs of a model with some weights, and its state dict afterwards."""
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    model.train(training)
    with torch.no_grad():
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return outputs, state_of(model)


def assert_same(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], **tolerance: float
) -> None:
    assert list(left) == list(right)
    for key in left:
        torch.testing.assert_close(
            left[key], right[key], **tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def nearby(state: State, seed: int, scale: float = 1e-3) -> State:
    """A state dict close by, as after a little training; integers count on."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + scale * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value + 3 * seed + seed**2
        for key, value in state.items()
    }


@cache
def named_spec(name: str) -> PermutationSpec:
    return spec_of(ZOO[name])
