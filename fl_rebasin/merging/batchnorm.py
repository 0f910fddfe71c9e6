"""BatchNorm statistics of a merged model, re-estimated on data and pooled exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fl_rebasin.forward import Moments, evaluating, first_input, forward_hooks, inputs_of
from fl_rebasin.merging.clients import Answers, Clients, Question, Request, Tensors
from fl_rebasin.merging.finishing_step import Finish, Finished
from fl_rebasin.state_dicts import StateDict, like

MIN_VARIANCE = 1e-12
"""A unit that varies less than this is constant."""
MAX_COUNT = 10**15
"""More values per channel than any client can have seen: an answer above it is invalid."""
MAX_MEAN, MAX_VARIANCE = 1e18, 1e36
"""Larger statistics could overflow when they are pooled into float32 buffers."""


def batchnorm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers that keep running statistics; a shared one under each name."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


@contextmanager
def _observing(model: nn.Module, frozen: bool) -> Iterator[None]:
    """Switch to evaluation mode, BatchNorm to training mode unless frozen; undo it afterwards."""
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
) -> dict[str, Moments]:
    """Return the moments of the inputs of each BatchNorm layer over some batches.

    Each batch is normalised by its own statistics, as in training. It takes one pass without
    gradients, and stores sums only. A batch of a single sample without variance is skipped. The
    model is unchanged afterwards.

    Args:
        model: the model, on the device of the batches.
        batches: inputs, or tuples and lists whose first item is the input.
        frozen: normalise by the running statistics instead, as in evaluation.

    Returns:
        For each layer that the forward pass uses its moments, float64, on the CPU.

    Raises:
        ValueError: there is no batch, or a batch gives a non-finite activation.
    """
    layers = batchnorm_layers(model)
    sums: dict[nn.Module, Moments] = {}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        values = first_input(args, kwargs).detach().transpose(0, 1).flatten(1).double()
        if values.numel():
            seen = Moments.of(values)
            sums[layer] = sums[layer] + seen if layer in sums else seen

    hooks = [(layer, record) for layer in set(layers.values())]
    with forward_hooks(hooks), torch.no_grad(), _observing(model, frozen):
        for batch in batches:
            inputs = inputs_of(batch)
            try:
                model(inputs)
            except ValueError:
                if len(inputs) > 1:
                    raise
    if layers and not sums:
        raise ValueError(
            "no batch of two or more samples to re-estimate the BatchNorm statistics from"
        )
    statistics = {}
    for name, layer in layers.items():
        if layer not in sums:
            continue
        seen = sums[layer]
        if not bool(torch.isfinite(seen.mean).all() and torch.isfinite(seen.squares).all()):
            raise ValueError(f"{name}: the activations hold NaN or infinite values")
        statistics[name] = Moments(seen.count, seen.mean.cpu(), seen.squares.cpu())
    return statistics


def pool_statistics(statistics: Iterable[Mapping[str, Moments]]) -> dict[str, Moments]:
    """Return the statistics of all data together, by the law of total variance.

    With shares s_i = n_i / n: mean = sum_i s_i mean_i and
    variance = sum_i s_i (variance_i + (mean_i - mean)^2).

    Args:
        statistics: one mapping for each data set; a layer that one of them lacks is pooled from
            the others.
    """
    pooled: dict[str, Moments] = {}
    for each in statistics:
        for name, moments in each.items():
            pooled[name] = pooled[name] + moments if name in pooled else moments
    return pooled


def unbiased_variance(moments: Moments) -> Tensor:
    """Return the variance as PyTorch stores it: divided by `count - 1`."""
    return moments.squares / max(moments.count - 1, 1)


def write_norm(state_dict: StateDict, layer: str, **values: Tensor) -> dict[str, Tensor]:
    """Return a state dict with new tensors in one normalisation layer.

    Args:
        state_dict: the state dict; not changed.
        layer: name of the layer; empty for the model itself.
        values: the new tensors (`running_mean`, `running_var`, `weight`, `bias`); they take the
            dtype, shape and device of the old ones.
    """
    prefix = f"{layer}." if layer else ""
    new = dict(state_dict)
    for key, value in values.items():
        old = state_dict[prefix + key]
        new[prefix + key] = value.reshape(old.shape).to(old)
    return new


def with_statistics(state_dict: StateDict, statistics: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Return a state dict with new running statistics, the variances divided by `count - 1`."""
    new = dict(state_dict)
    for name, moments in statistics.items():
        variance = unbiased_variance(moments)
        new = write_norm(new, name, running_mean=moments.mean, running_var=variance)
    return like(state_dict, new)


def recentred(model: nn.Module, statistics: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Return a state dict of the same function whose running statistics are those given.

    Scale and shift compensate for the change from mean m and variance v to m' and v':

        weight' = weight * sqrt((v' + eps) / (v + eps))
        bias' = bias + weight * (m' - m) / sqrt(v + eps)

    Training can go on from the result: there the layers normalise by their batches, which the new
    statistics describe. Layers without statistics, and units that never vary, are unchanged.

    Args:
        model: the model; not changed.
        statistics: the moments of the layers' inputs in evaluation mode.
    """
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    new = dict(state)
    for name, norm in batchnorm_layers(model).items():
        if name not in statistics or not norm.affine:
            continue
        prefix = f"{name}." if name else ""
        old = {
            key: state[prefix + key].double()
            for key in ("weight", "bias", "running_mean", "running_var")
        }
        device = old["weight"].device
        mean = statistics[name].mean.to(device)
        variance = unbiased_variance(statistics[name]).to(device)
        scale = old["weight"] / (old["running_var"] + norm.eps).sqrt()
        values = {
            "weight": scale * (variance + norm.eps).sqrt(),
            "bias": old["bias"] + scale * (mean - old["running_mean"]),
            "running_mean": mean,
            "running_var": variance,
        }
        varies = variance > MIN_VARIANCE
        kept = {key: torch.where(varies, value, old[key]) for key, value in values.items()}
        new = write_norm(new, name, **kept)
    return like(model.state_dict(), new)


def recalibrate_batchnorm(
    model: nn.Module, state_dict: StateDict, batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Return a state dict with its BatchNorm statistics re-estimated on data.

    The averaged statistics of a merged model do not fit its weights: the mean of two models has
    less variance than either. A model without BatchNorm is returned unchanged.

    Args:
        model: a module of the architecture, any weights; not changed.
        state_dict: the merged model.
        batches: unlabelled inputs, or tuples and lists whose first item is the input.

    Raises:
        ValueError: the model has BatchNorm layers and there is no batch, or an activation is not
            finite.

    Source: Izmailov et al. (2018), section 3; Jordan et al., REPAIR (2023), section 4.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> batches = [torch.tensor([[1.0], [3.0]])]
        >>> float(recalibrate_batchnorm(net, net.state_dict(), batches)["0.running_mean"])
        2.0
    """
    current = {key: value.detach().clone() for key, value in state_dict.items()}
    if not batchnorm_layers(model):
        return like(state_dict, current)
    runner = copy.deepcopy(model)
    runner.load_state_dict(current)
    return like(state_dict, with_statistics(current, batchnorm_statistics(runner, batches)))


def _answer(model: nn.Module, batches: Iterable[Any], request: Request) -> Tensors:
    """Return count, mean and variance of each layer of the merged model."""
    model.load_state_dict(request.states["merged"])
    frozen = bool(request.config["frozen"])
    tensors: Tensors = {}
    for name, moments in batchnorm_statistics(model, batches, frozen=frozen).items():
        tensors[f"{name}.count"] = torch.tensor([moments.count])
        tensors[f"{name}.mean"] = moments.mean
        tensors[f"{name}.variance"] = moments.variance
    return tensors


STATISTICS = Question("batchnorm", "BatchNorm statistics", _answer)


def _read(tensors: Tensors, channels: Mapping[str, int]) -> dict[str, Moments]:
    """Return the statistics of one client.

    Raises:
        ValueError: they are not what the question asks for.
    """
    statistics = {}
    for name, size in channels.items():
        keys = [f"{name}.{part}" for part in ("count", "mean", "variance")]
        if not tensors.keys() & {*keys}:
            continue  # The client's forward pass does not use this layer.
        count, mean, variance = (tensors[key] for key in keys)
        if [tuple(each.shape) for each in (count, mean, variance)] != [(1,), (size,), (size,)]:
            raise ValueError(f"{name}: expected {size} channels, got {tuple(mean.shape)}")
        floats = mean.is_floating_point() and variance.is_floating_point()
        if not floats or count.dtype != torch.int64:
            raise ValueError(
                f"{name}: mean and variance must be floats and the count int64, got {mean.dtype}, "
                f"{variance.dtype} and {count.dtype}"
            )
        if not 0 < int(count) <= MAX_COUNT:
            raise ValueError(f"{name}: {int(count)} is not a number of values")
        # Written so that NaN fails.
        in_range = (mean.abs() <= MAX_MEAN) & (variance >= 0) & (variance <= MAX_VARIANCE)
        if not bool(in_range.all()):
            raise ValueError(
                f"{name}: mean or variance is not finite or too large, or a variance is negative"
            )
        squares = variance.double() * int(count)
        statistics[name] = Moments(int(count), mean.double(), squares)
    if not statistics:
        raise ValueError("it holds statistics of no layer")
    return statistics


def ask_statistics(
    model: nn.Module,
    merged: StateDict,
    clients: Clients,
    ids: Iterable[int],
    *,
    frozen: bool = False,
) -> Answers[dict[str, Moments]]:
    """Ask clients for the BatchNorm statistics of a model.

    Args:
        model: a module of the architecture.
        merged: the model's state dict.
        clients: the clients of the round.
        ids: which of them to ask.
        frozen: normalise by the running statistics, as in evaluation.

    Returns:
        For each client the moments of each layer.
    """
    channels = {name: layer.num_features for name, layer in batchnorm_layers(model).items()}
    request = Request({"merged": merged}, {"frozen": frozen})
    requests = dict.fromkeys(ids, request)
    return clients.ask(STATISTICS, requests, lambda tensors: _read(tensors, channels))


@dataclass(frozen=True)
class BatchNorm:
    """Finishing step: re-estimates the BatchNorm statistics of the merged model on the clients.

    It sends one model to each client, and gets means and variances back. A model without BatchNorm
    skips it.

    Source: Izmailov et al. (2018), section 3; Jordan et al., REPAIR (2023), section 4.
    """

    name: ClassVar[str] = "batchnorm"
    needs_models: ClassVar[bool] = False

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish | None:
        """Return the step for a model, or None if the model has no BatchNorm layer."""
        if not batchnorm_layers(model):
            return None

        def finish(merged: StateDict, clients: Clients) -> Finished:
            answers = ask_statistics(model, merged, clients, clients.ids)
            costs = {self.name: answers.cost}
            count = len(answers.by_client)
            report = f"BatchNorm statistics pooled from {count} of {len(clients.ids)} clients"
            if not count:
                return Finished(merged, costs, report, applied=False)
            pooled = pool_statistics(answers.by_client.values())
            return Finished(with_statistics(merged, pooled), costs, report)

        return finish
