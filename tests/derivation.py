"""A small model, and deriving a spec while checking that nothing else changes."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fl_rebasin import PermutationSpec, SpecError, derive_spec

FREE = {"first": 6}
"""The groups of `TwoLayers` if its hidden units may move."""


class TwoLayers(nn.Module):
    """Two linear layers and a function between them."""

    def __init__(self, between: Any = torch.relu) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)
        self.between = between

    def forward(self, inputs: Tensor) -> Any:
        return self.second(self.between(self.first(inputs)))


INPUT = torch.ones(2, 4)


def bits(tensor: Tensor) -> Any:
    """Shape, dtype and values of a tensor in a form that `==` compares."""
    dense = tensor.detach()
    if dense.is_meta:
        return tuple(dense.shape), dense.dtype
    if dense.is_quantized:
        dense = dense.dequantize()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    if dense.itemsize == 1:
        dense = dense.float()
    if dense.dtype == torch.bfloat16:
        dense = dense.double()
    return tuple(dense.shape), tensor.dtype, dense.cpu().numpy().tobytes()


def snapshot(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Everything that a derivation must not change."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(name, tensor) for name, tensor in tensors if not nn.parameter.is_lazy(tensor)]
    state = np.random.get_state()
    return {
        "objects": [(name, id(tensor)) for name, tensor in tensors],
        "values": [(name, bits(tensor)) for name, tensor in tensors],
        "gradients": [
            (name, None if tensor.grad is None else bits(tensor.grad)) for name, tensor in tensors
        ],
        "frozen": [(name, tensor.requires_grad) for name, tensor in tensors],
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "torch": bits(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": (state[0], state[1].tobytes(), *state[2:]),
        "inputs": [bits(x) if isinstance(x, Tensor) else x for x in tree_leaves(inputs)],
        "gradient mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


@contextmanager
def unchanged(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Check that the model, the inputs and all random generators do not change."""
    for number, module in enumerate(model.modules()):
        module.training = bool(number % 2)
    before = snapshot(model, inputs)
    try:
        yield
    finally:
        after = snapshot(model, inputs)
        for part, value in before.items():
            assert after[part] == value, part


def spec_unchanged(model: nn.Module, inputs: Any = INPUT) -> PermutationSpec:
    """Derive a spec, and check that nothing else changes."""
    with unchanged(model, inputs):
        return derive_spec(model, inputs)


def assert_refused(model: nn.Module, inputs: Any, words: str) -> SpecError:
    """Check that there is no spec, that the error matches and is one line, and nothing changes."""
    with unchanged(model, inputs), pytest.raises(SpecError, match=words) as caught:
        derive_spec(model, inputs)
    assert "\n" not in str(caught.value)
    return caught.value


def with_forward(forward: Callable[[Any, Tensor], Any], **attributes: Any) -> nn.Module:
    """Return a `TwoLayers` with another forward pass."""
    model = type("Own", (TwoLayers,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model
