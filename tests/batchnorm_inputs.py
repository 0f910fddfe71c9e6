"""What the BatchNorm layers of a model see, recorded directly: the tests' own reference."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batchnorm_inputs(
    model: nn.Module, batches: Iterable[Tensor], *, frozen: bool = False
) -> dict[str, Tensor]:
    """Return the inputs of each BatchNorm layer, float64, shape `(values, channels)`.

    Args:
        model: the model; not changed.
        batches: the model's inputs.
        frozen: normalise by the running statistics, as in evaluation, not by each batch.
    """
    model = copy.deepcopy(model).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.train(not frozen)
            layer.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].double())
            )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {
        name: torch.cat([part.movedim(1, -1).reshape(-1, part.shape[1]) for part in inputs])
        for name, inputs in seen.items()
    }
