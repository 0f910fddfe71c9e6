"""Linear and convolutional layers, with the BatchNorm after them, as one matrix and its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fl_rebasin.forward import first_input, forward_hooks
from fl_rebasin.merging.batchnorm import write_norm
from fl_rebasin.state_dicts import StateDict

MAX_POSITIONS = 16
"""Number of positions of an image at which a convolution is fitted."""
CHUNK = 2**24
"""Entries of the matrix of a layer's inputs that are held at once."""
TINY = 1e-9
"""A unit whose weights would shrink below this share gets the scale 0 instead."""


class _ReachedError(Exception):
    """Ends a forward pass once the layer that matters has run."""


def run_until(model: nn.Module, name: str, inputs: Any) -> tuple[Tensor, Tensor]:
    """Run a model up to a layer, and return the layer's input and output.

    Raises:
        ValueError: the forward pass does not reach the layer.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        seen.append((first_input(args, kwargs), output))
        raise _ReachedError

    with forward_hooks([(model.get_submodule(name), stop)]):
        try:
            model(inputs)
        except _ReachedError:
            return seen[0]
    raise ValueError(f"{name} is not reached by the forward pass")


def single_precision(activations: Tensor) -> Tensor:
    """Return activations in single precision, or in double precision if they have it."""
    return activations if activations.dtype == torch.float64 else activations.float()


def by_unit(outputs: Tensor, module: nn.Module) -> Tensor:
    """Return the outputs of a layer as shape `(samples, units)`."""
    dim = -1 if isinstance(module, nn.Linear) else 1
    if isinstance(module, _ConvNd):
        dim = -1 - len(module.kernel_size)
    return outputs.movedim(dim, -1).reshape(-1, outputs.shape[dim])


def input_rows(module: nn.Module, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the units of a layer see, a part of the samples at a time.

    Of an image with many positions only `MAX_POSITIONS` or so count, spread evenly: neighbouring
    positions are much alike.

    Yields:
        Inputs of shape `(samples, features)` followed by a constant 1, and the row of each among
        the layer's outputs as `by_unit` returns them.
    """
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        yield _with_constant(rows), torch.arange(len(rows), device=rows.device)
        return
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    one_axis = isinstance(module, nn.Conv1d)
    if inputs.ndim == len(module.kernel_size) + 1:
        inputs = inputs.unsqueeze(0)
    images = inputs.unsqueeze(-2) if one_axis else inputs

    def on_images(option: Any, fill: int) -> tuple[int, ...]:
        return (fill, *option) if one_axis else tuple(option)

    kernel = on_images(module.kernel_size, 1)
    dilation, padding = on_images(module.dilation, 1), on_images(module.padding, 0)
    stride = on_images(module.stride, 1)
    entries = images.shape[1:].numel() * math.prod(kernel)
    done = 0
    for part in images.split(max(1, CHUNK // entries)):
        columns = F.unfold(part, kernel, dilation, padding, stride)
        count = columns.shape[2]
        step = position_step(count)
        numbers = torch.arange(len(part) * count, device=part.device).view(len(part), count)
        chosen = columns[:, :, ::step].transpose(1, 2).flatten(0, 1)
        yield _with_constant(chosen), done + numbers[:, ::step].flatten()
        done += numbers.numel()


def _with_constant(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 1), value=1.0)


def position_step(count: int) -> int:
    """Return the step that leaves about `MAX_POSITIONS` of `count` positions, in every column."""
    step = max(1, math.ceil(count / MAX_POSITIONS))
    while math.gcd(step, count) > 1:
        step += 1
    return step


def affine_of(norm: nn.Module | None, units: int) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm in evaluation mode, float64; the identity for None."""
    if norm is None:
        one = torch.ones(units, dtype=torch.float64)
        return one, one - 1
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def norm_of(model: nn.Module, norm: str | None) -> nn.Module | None:
    """Return the norm of a name, or None."""
    return None if norm is None else model.get_submodule(norm)


def folded(model: nn.Module, layer: str, norm: str | None) -> tuple[Tensor, Tensor]:
    """Return a layer and its norm as one matrix `(units, features)` and a bias, float64."""
    module = model.get_submodule(layer)
    weight = module.get_parameter("weight").detach().double().flatten(1)
    scale, shift = (each.to(weight) for each in affine_of(norm_of(model, norm), len(weight)))
    bias = module._parameters.get("bias")
    if bias is not None:
        shift = shift + bias.detach().double() * scale
    return weight * scale[:, None], shift


def write_folded(
    model: nn.Module, layer: str, norm: str | None, weight: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    """Return a model's state dict with a folded layer written into layer and norm.

    A norm becomes the identity but for sign, scale and shift. The layer's weight keeps its length,
    which decides how fast later training goes, and a max pooling between layer and norm sees the
    same sign as before.

    Args:
        model: the model; not changed.
        layer: name of the layer.
        norm: name of its norm, if it has one.
        weight: shape `(units, features)`.
        bias: shape `(units,)`.
    """
    state: StateDict = model.state_dict()
    prefix = f"{layer}." if layer else ""
    if norm is None:
        new = {f"{prefix}weight": weight}
        if f"{prefix}bias" in state:
            new[f"{prefix}bias"] = bias
        return {**state, **_like_old(state, new)}
    module = model.get_submodule(norm)
    assert isinstance(module, _BatchNorm)
    old = state[f"{prefix}weight"].double().flatten(1)
    before, length = old.norm(dim=1), weight.norm(dim=1)
    constant = length <= TINY * before
    size = torch.where(constant | (before == 0), 1.0, before / length)
    factor = torch.where(module.weight.detach() < 0, -1.0, 1.0) * size
    new = {f"{prefix}weight": torch.where(constant[:, None], old, weight * factor[:, None])}
    if f"{prefix}bias" in state:
        new[f"{prefix}bias"] = torch.zeros_like(bias)
    return write_norm(
        {**state, **_like_old(state, new)},
        norm,
        running_mean=torch.zeros_like(bias),
        running_var=torch.full_like(bias, 1 - module.eps),
        weight=torch.where(constant, 0.0, 1 / factor),
        bias=bias,
    )


def _like_old(state: StateDict, new: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.reshape(state[key].shape).to(state[key]) for key, value in new.items()}
