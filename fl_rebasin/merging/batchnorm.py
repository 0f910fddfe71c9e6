"""Re-estimating the BatchNorm statistics of a merged model, and pooling them exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fl_rebasin.forward import evaluating
from fl_rebasin.state_dicts import like

MIN_VARIANCE = 1e-12
"""A unit that varies less than this is constant."""


@dataclass(frozen=True)
class LayerStatistics:
    """What a BatchNorm layer saw: enough to pool statistics exactly.

    Attributes:
        count: number of values a channel.
        mean: mean of each channel, float64, shape `(channels,)`.
        variance: population variance of each channel, float64, shape `(channels,)`.
    """

    count: int
    mean: Tensor
    variance: Tensor


def batchnorm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers that keep running statistics; one of two names comes twice."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


@contextmanager
def _observing(model: nn.Module, frozen: bool) -> Iterator[None]:
    """In evaluation mode, BatchNorm layers in training mode unless frozen; as before afterwards."""
    layers = batchnorm_layers(model)
    buffers = {name: copy.deepcopy(dict(layer.named_buffers())) for name, layer in layers.items()}
    with evaluating(model):
        for layer in layers.values():
            layer.train(not frozen)
        try:
            yield
        finally:
            for name, layer in layers.items():
                for key, value in buffers[name].items():
                    layer.get_buffer(key).copy_(value)


def batchnorm_statistics(
    model: nn.Module, batches: Iterable[Any], *, frozen: bool = False
) -> dict[str, LayerStatistics]:
    """Return what each BatchNorm layer of a model sees on some batches.

    Each batch is normalised by its own statistics, as in training; one pass, no gradients, and
    nothing is stored but sums. A batch of one sample that has no variance is left out. The model
    is as before afterwards.

    Args:
        model: the model, on the device of the batches.
        batches: inputs, or tuples and lists whose first item is the input.
        frozen: normalise by the running statistics instead, as in evaluation.

    Raises:
        ValueError: there is no batch, or a batch gives a non-finite activation.
    """
    layers = batchnorm_layers(model)
    sums: dict[nn.Module, tuple[int, Tensor, Tensor]] = {}

    def record(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        values = args[0].detach().transpose(0, 1).flatten(1).double()
        if not values.numel():
            return
        count, mean = values.shape[1], values.mean(1)
        squares = (values - mean[:, None]).square().sum(1)
        if layer in sums:
            # Chan, Golub, LeVeque (1979): pairwise update, exact and stable.
            old_count, old_mean, old_squares = sums[layer]
            total, step = old_count + count, mean - old_mean
            squares = old_squares + squares + step.square() * (old_count * count / total)
            mean, count = old_mean + step * (count / total), total
        sums[layer] = (count, mean, squares)

    hooks = [layer.register_forward_hook(record) for layer in set(layers.values())]
    try:
        with torch.no_grad(), _observing(model, frozen):
            for batch in batches:
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                try:
                    model(inputs)
                except ValueError:
                    if len(inputs) > 1:
                        raise
    finally:
        for handle in hooks:
            handle.remove()
    if layers and not sums:
        raise ValueError(
            "no batch of two or more samples to re-estimate the BatchNorm statistics from"
        )
    statistics = {}
    for name, layer in layers.items():
        if layer not in sums:
            continue  # not used in this forward pass
        count, mean, squares = sums[layer]
        if not bool(torch.isfinite(mean).all() and torch.isfinite(squares).all()):
            raise ValueError(f"{name}: the activations hold NaN or infinite values")
        statistics[name] = LayerStatistics(count, mean.cpu(), (squares / count).cpu())
    return statistics


def pool_statistics(
    statistics: Sequence[Mapping[str, LayerStatistics]],
) -> dict[str, LayerStatistics]:
    """Return the statistics of all data together, by the law of total variance.

    Args:
        statistics: one mapping a data set; layers that one of them lacks are pooled from the rest.
    """
    pooled = {}
    for name in dict.fromkeys(name for each in statistics for name in each):
        layers = [each[name] for each in statistics if name in each]
        count = sum(layer.count for layer in layers)
        shares = [layer.count / count for layer in layers]
        mean = torch.stack([s * layer.mean for s, layer in zip(shares, layers, strict=True)]).sum(0)
        variance = torch.stack(
            [
                s * (layer.variance + (layer.mean - mean).square())
                for s, layer in zip(shares, layers, strict=True)
            ]
        ).sum(0)
        pooled[name] = LayerStatistics(count, mean, variance)
    return pooled


def with_statistics(
    state_dict: Mapping[str, Tensor], statistics: Mapping[str, LayerStatistics]
) -> dict[str, Tensor]:
    """Return a new state dict with the running statistics replaced.

    As PyTorch does, the running variance is the unbiased one.
    """
    new = dict(state_dict)
    for name, layer in statistics.items():
        prefix = f"{name}." if name else ""
        unbiased = layer.variance * (layer.count / max(layer.count - 1, 1))
        for key, value in (("running_mean", layer.mean), ("running_var", unbiased)):
            old = state_dict[prefix + key]
            new[prefix + key] = value.to(old.device, old.dtype)
    return new


def recentred(model: nn.Module, statistics: Mapping[str, LayerStatistics]) -> dict[str, Tensor]:
    """Return a state dict of the same function whose BatchNorm layers have other statistics.

    Scale and shift take up the difference, so that training can go on from it: there the layers
    normalise by their batches, which the new statistics describe.

    Args:
        model: the model; not changed.
        statistics: what its layers see in evaluation mode; layers without stay as they are, and
            so do units that never vary.
    """
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    new = dict(state)
    for name, norm in batchnorm_layers(model).items():
        if name not in statistics or not norm.affine:
            continue
        prefix = f"{name}." if name else ""
        old = {
            key: state[prefix + key] for key in ("weight", "bias", "running_mean", "running_var")
        }
        seen = statistics[name]
        unbiased = seen.variance * (seen.count / max(seen.count - 1, 1))
        mean, variance = seen.mean.to(old["weight"].device), unbiased.to(old["weight"].device)
        scale = old["weight"].double() / (old["running_var"].double() + norm.eps).sqrt()
        values = {
            "weight": scale * (variance + norm.eps).sqrt(),
            "bias": old["bias"].double() + scale * (mean - old["running_mean"].double()),
            "running_mean": mean,
            "running_var": variance,
        }
        for key, value in values.items():
            kept = torch.where(variance > MIN_VARIANCE, value, old[key].double())
            new[prefix + key] = kept.to(old[key].dtype)
    return like(model.state_dict(), new)


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the model's state dict with its BatchNorm statistics re-estimated on data.

    A merged model's averaged statistics do not fit its weights: the mean of two models has less
    variance than either. A model without BatchNorm is returned as it is.

    Args:
        model: the merged model; not changed.
        batches: unlabelled inputs, or tuples and lists whose first item is the input.

    Raises:
        ValueError: the model has BatchNorm layers and there is no batch, or an activation is not
            finite.

    Source: Izmailov et al. (2018), section 3; Jordan et al., REPAIR (2023), section 4.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> float(recalibrate_batchnorm(net, [torch.tensor([[1.0], [3.0]])])["0.running_mean"])
        2.0
    """
    current = {key: value.detach().clone() for key, value in model.state_dict().items()}
    if not batchnorm_layers(model):
        return current
    return with_statistics(current, batchnorm_statistics(model, batches))
