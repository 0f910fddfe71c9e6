"""Layerwise least squares: give the merged model, layer by layer, what the models themselves see.

A merged layer is fitted so that, on each client's data, its result comes as close as possible to
that of the client's own (aligned) layer. A client contributes only sums over its samples, which
add up exactly over clients.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _MaxPoolNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fl_rebasin.forward import call, evaluating
from fl_rebasin.merging.batchnorm import (
    MIN_VARIANCE,
    batchnorm_statistics,
    pool_statistics,
    recentred,
)
from fl_rebasin.state_dicts import StateDict, like

MAX_FEATURES = 2500
"""Inputs of a layer above which it is rescaled instead of fitted: the statistics are square."""
RIDGE = 1e-2
"""Pull towards the averaged weights, as a share of the inputs' mean square."""
TINY = 1e-9
"""A unit whose weights are to shrink below this share gets the scale 0 instead."""
ROUNDING = 1e-13
"""Share of the squared mean below which a variance is rounding."""
MIN_EXPLAINED = 0.04
"""Share of a unit's variance that the fit must explain for the unit to be scaled up to it."""
MAX_POSITIONS = 16
"""Positions of an image at which a convolution is fitted."""
CHUNK = 2**24
"""Entries of the matrix of a layer's inputs that are held at once."""

Sums: TypeAlias = dict[str, Tensor]
"""Sums over samples, float64: they may be added up over clients."""


@dataclass(frozen=True)
class Step:
    """A layer of the merged model that is set in one go.

    Attributes:
        layer: name of a linear or convolutional layer; of the norm itself where it stands alone.
        norm: name of the BatchNorm that its result goes into, directly or after max pooling.
        fitted: whether by least squares; else each unit is rescaled to the models' own mean and
            deviation (REPAIR).
        last: whether nothing comes after it, so that its results may vary less than the models'
            own, as those of a fit do.
    """

    layer: str
    norm: str | None
    fitted: bool
    last: bool = field(default=False, compare=False)


class _Outside(TorchDispatchMode):
    """Counts what operators outside the watched layers take in, by the identity of tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[int] = Counter()
        self.depth = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self.depth:
            leaves = tree_leaves((args, kwargs))
            self.counts.update(id(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def plan(model: nn.Module, inputs: Any, max_features: int = MAX_FEATURES) -> list[Step]:
    """Return the steps of a model in the order of its forward pass.

    Layers that are called more than once, share a parameter, compute their weight
    (parametrisations) or are transposed convolutions are left out: they keep the average. A
    BatchNorm is set together with the layer before it if nobody else takes that layer's result;
    else by itself, if it has running statistics and a scale.

    Args:
        model: a module of the architecture; not changed.
        inputs: a batch, or a tuple of positional or a dict of keyword arguments.
        max_features: inputs of a unit (plus one) up to which a layer is fitted; 0 rescales all.
    """
    modules = dict(model.named_modules())
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    calls: Counter[str] = Counter()
    norms: dict[str, str] = {}
    # Whose result a tensor is, as it was when it came out; the tensors are kept, as are their ids.
    results: dict[int, tuple[str, int, Tensor]] = {}
    taken: Counter[int] = Counter()
    outside = _Outside()

    def enter(module: nn.Module, args: Any) -> None:
        outside.depth += 1

    def watch(name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outside.depth -= 1
            if not args or not isinstance(args[0], Tensor) or output is args[0]:
                return
            taken[id(args[0])] += 1
            source, version, _ = results.get(id(args[0]), (None, 0, None))
            if version != args[0]._version:
                source = None
            if isinstance(module, (nn.Linear, _ConvNd, _BatchNorm)):
                calls[name] += 1
                if isinstance(module, _BatchNorm):
                    if source is not None:
                        norms.setdefault(source, name)
                    return
                source = name
            if source is not None and isinstance(output, Tensor):
                results[id(output)] = (source, output._version, output)
                outside.counts.pop(id(output), None)
                taken.pop(id(output), None)

        return leave

    transparent = (nn.Linear, _ConvNd, _BatchNorm, _MaxPoolNd, nn.Identity, nn.Dropout)
    watched = {name: each for name, each in modules.items() if isinstance(each, transparent)}
    handles = [each.register_forward_pre_hook(enter) for each in watched.values()]
    handles += [each.register_forward_hook(watch(name)) for name, each in watched.items()]
    try:
        with evaluating(model), torch.no_grad(), outside:
            outputs = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    taken.update(id(leaf) for leaf in tree_leaves(outputs))

    def can_be_set(name: str) -> bool:
        """Whether what is written to a layer changes one step of the forward pass only."""
        module = modules[name]
        own = [p for p in module._parameters.values() if p is not None]
        alone = all(names[id(p)] == 1 and not outside.counts[id(p)] for p in own)
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return False
        if module._parameters.get("weight") is None or getattr(module, "transposed", False):
            return False
        return calls[name] == 1 and alone

    torn = {
        source for source, _, result in results.values()
        if taken[id(result)] + outside.counts[id(result)] != 1
    }  # fmt: skip
    pairs = {
        source: norm for source, norm in norms.items()
        if source not in torn and can_be_set(source) and can_be_set(norm)
    }  # fmt: skip
    steps = []
    for name in calls:
        module = modules[name]
        if not can_be_set(name) or name in pairs.values():
            continue
        if isinstance(module, _BatchNorm):
            steps.append(Step(name, name, fitted=False))
            continue
        features = module.get_parameter("weight")[0].numel() + 1
        fitted = _can_be_fitted(module) and features <= max_features
        steps.append(Step(name, pairs.get(name), fitted))
    return [replace(step, last=step is steps[-1]) for step in steps]


def _can_be_fitted(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d))
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


class _ReachedError(Exception):
    """The layer that was asked for has run: the rest of the forward pass is not needed."""


@contextmanager
def _stopping_at(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let a forward pass end after a module; collect its input and output."""
    seen: list[tuple[Tensor, Tensor]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((args[0], output))
        raise _ReachedError

    handle = module.register_forward_hook(stop)
    try:
        yield seen
    finally:
        handle.remove()


def _at(model: nn.Module, name: str, inputs: Any) -> tuple[Tensor, Tensor]:
    """Return input and output of a layer for a batch."""
    with _stopping_at(model.get_submodule(name)) as seen:
        try:
            model(inputs)
        except _ReachedError:
            return seen[0]
    raise ValueError(f"{name} is not reached by the forward pass")


def _rows(module: nn.Module, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what the units of a layer see, some samples at a time, and which results go with it.

    Of an image with many positions only some count, spread evenly: they are much alike.

    Yields:
        Inputs of shape `(samples, features)`, and for each its row among the layer's results.
    """
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        yield rows, torch.arange(len(rows), device=rows.device)
        return
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    line = isinstance(module, nn.Conv1d)
    if inputs.ndim == len(module.kernel_size) + 1:
        inputs = inputs.unsqueeze(0)
    images = inputs.unsqueeze(-2) if line else inputs

    def on_images(given: Any, fill: int) -> tuple[int, ...]:
        return (fill, *given) if line else tuple(given)

    kernel = on_images(module.kernel_size, 1)
    dilation, padding = on_images(module.dilation, 1), on_images(module.padding, 0)
    stride = on_images(module.stride, 1)
    entries = images.shape[1:].numel() * math.prod(kernel)
    done = 0
    for part in images.split(max(1, CHUNK // entries)):
        columns = F.unfold(part, kernel, dilation, padding, stride)
        count = columns.shape[2]
        step = _spread(count)
        numbers = torch.arange(len(part) * count, device=part.device).view(len(part), count)
        chosen = columns[:, :, ::step].transpose(1, 2).flatten(0, 1)
        yield chosen, done + numbers[:, ::step].flatten()
        done += numbers.numel()


def _spread(count: int) -> int:
    """Return a step that leaves about `MAX_POSITIONS` of so many positions, in all columns."""
    step = max(1, math.ceil(count / MAX_POSITIONS))
    while math.gcd(step, count) > 1:
        step += 1
    return step


def _by_unit(outputs: Tensor, module: nn.Module) -> Tensor:
    """Return outputs as shape `(samples, units)`."""
    dim = -1 if isinstance(module, nn.Linear) else 1
    if isinstance(module, _ConvNd):
        dim = -1 - len(module.kernel_size)
    return outputs.movedim(dim, -1).reshape(-1, outputs.shape[dim])


def _wide(activations: Tensor) -> Tensor:
    """Return activations in single precision at least."""
    return activations if activations.dtype == torch.float64 else activations.float()


def _affine(norm: nn.Module | None, units: int) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm in evaluation mode, float64; of none the identity."""
    if norm is None:
        one = torch.ones(units, dtype=torch.float64)
        return one, one - 1
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def _norm_of(model: nn.Module, step: Step) -> nn.Module | None:
    return None if step.norm is None else model.get_submodule(step.norm)


def step_sums(merged: nn.Module, own: nn.Module, step: Step, batches: Iterable[Any]) -> Sums:
    """Return one model's contribution to a step, on its own data.

    Args:
        merged: the merged model, all earlier steps done; not changed.
        own: the aligned model of the same architecture; not changed.
        step: the step.
        batches: inputs, or tuples and lists whose first item is the input.

    Returns:
        For a fitted layer with `d` inputs a unit and `n` units `gram`, shape `(d + 1, d + 1)`:
        X^T X of the merged model's inputs and a constant 1, `cross`, shape `(d + 1, n)`: X^T T
        with the own model's results after the norm, and `squares`, shape `(n,)`: those of T.
        Else, each of shape `(n,)` and times the number of values, mean and deviation of the
        merged model's results, `sum` and `spread`, and of the own ones, `mean` and `deviation`.
        Always `count`, the number of rows, shape `(1,)`.

    Raises:
        ValueError: no batch, or an activation is not finite.
    """
    sums: Sums = {}

    def add(key: str, value: Tensor) -> None:
        sums[key] = sums[key] + value.double() if key in sums else value.double()

    module = merged.get_submodule(step.layer)
    with evaluating(merged, own), torch.no_grad():
        for batch in batches:
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            x, y = _at(merged, step.layer, inputs)
            t = _wide(_by_unit(_at(own, step.layer, inputs)[1], module))
            if step.layer == step.norm:
                y = x
            else:
                scale, shift = _affine(_norm_of(own, step), t.shape[1])
                t = t * scale.to(t) + shift.to(t)
            add("count", torch.tensor([len(t)]))
            if step.fitted:
                for rows, numbers in _rows(module, _wide(x)):
                    rows = F.pad(rows, (0, 1), value=1.0)
                    add("gram", rows.T @ rows)
                    add("cross", rows.T @ t[numbers])
                    add("squares", t[numbers].double().square().sum(0))
            else:
                for values, total, squares in (
                    (_by_unit(y, module), "sum", "squares"), (t, "mean", "own squares")
                ):  # fmt: skip
                    add(total, values.double().sum(0))
                    add(squares, values.double().square().sum(0))
    if not sums or not sums["count"]:
        raise ValueError("no batch to fit the merged model on")
    sums = {key: value.cpu() for key, value in sums.items()}
    if not all(bool(torch.isfinite(value).all()) for value in sums.values()):
        raise ValueError(f"{step.layer}: an activation is NaN or infinite")
    if not step.fitted:
        # Of each client by itself, and so of both models: the means of clients differ, but that is
        # no spread that a model makes.
        for total, squares, key in (
            ("sum", "squares", "spread"), ("mean", "own squares", "deviation")
        ):  # fmt: skip
            mean = sums[total] / sums["count"]
            variance = sums.pop(squares) / sums["count"] - mean.square()
            # What rounding leaves of a constant is no variance.
            varies = variance > ROUNDING * mean.square()
            sums[key] = torch.where(varies, variance, 0.0).sqrt() * sums["count"]
    return sums


def own_input_sums(
    own: nn.Module, steps: Sequence[Step], batches: Iterable[Any]
) -> dict[str, Sums]:
    """Return one model's contribution to all fitted layers at once (RegMean), on its own data.

    The inputs are the own model's, so that one pass is enough; X^T T follows from X^T X.
    """
    chosen = {step.layer: step for step in steps if step.fitted}
    sums: dict[str, Sums] = {}

    def watch(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            for rows, _ in _rows(module, _wide(args[0])):
                rows = F.pad(rows, (0, 1), value=1.0)
                new = {"gram": (rows.T @ rows).double(),
                       "count": torch.tensor([float(len(rows))], dtype=torch.float64)}  # fmt: skip
                old = sums.get(name)
                sums[name] = {k: v if old is None else old[k] + v for k, v in new.items()}

        return record

    handles = [own.get_submodule(n).register_forward_hook(watch(n)) for n in chosen]
    try:
        with evaluating(own), torch.no_grad():
            for batch in batches:
                own(batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        for handle in handles:
            handle.remove()
    if chosen and not sums:
        raise ValueError("no batch to fit the merged model on")
    for name, each in sums.items():
        if not each["count"]:
            raise ValueError("no batch to fit the merged model on")
        if not bool(torch.isfinite(each["gram"]).all()):
            raise ValueError(f"{name}: an activation is NaN or infinite")
        weight, bias = _folded(own, chosen[name])
        each["gram"] = each["gram"].cpu()
        own_layer = torch.cat([weight, bias[:, None]], 1).T.cpu()
        each["cross"] = each["gram"] @ own_layer
        each["squares"] = (own_layer * each["cross"]).sum(0)
    return sums


def _folded(model: nn.Module, step: Step) -> tuple[Tensor, Tensor]:
    """Return a layer with its norm as one matrix `(units, features)` and a bias, float64."""
    module = model.get_submodule(step.layer)
    weight = module.get_parameter("weight").detach().double().flatten(1)
    scale, shift = (each.to(weight) for each in _affine(_norm_of(model, step), len(weight)))
    bias = module._parameters.get("bias")
    if bias is not None:
        shift = shift + bias.detach().double() * scale
    return weight * scale[:, None], shift


def add_up(all_sums: Sequence[Sums]) -> Sums:
    """Return the sums over clients."""
    return {key: torch.stack([sums[key] for sums in all_sums]).sum(0) for key in all_sums[0]}


def shapes(model: nn.Module, steps: Sequence[Step]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the sums of each step, by layer and name."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for step in steps:
        weight = model.get_submodule(step.layer).get_parameter("weight")
        units, inputs = len(weight), weight[0].numel() + 1
        of: dict[str, tuple[int, ...]] = {
            "gram": (inputs, inputs),
            "cross": (inputs, units),
            "squares": (units,),
        }
        if not step.fitted:
            of = dict.fromkeys(("sum", "spread", "mean", "deviation"), (units,))
        found[step.layer] = {"count": (1,), **of}
    return found


def solve(merged: nn.Module, step: Step, sums: Sums, ridge: float = RIDGE) -> dict[str, Tensor]:
    """Return the merged model's state dict with one layer set from the pooled sums.

    A BatchNorm that follows becomes the identity but for sign, scale and shift; statistics that fit
    it come at the end, with `recentred`.

    Args:
        merged: the merged model so far; not changed.
        step: the step.
        sums: the clients' contributions, added up.
        ridge: pull towards the weights so far, as a share of the inputs' mean square.
    """
    state = merged.state_dict()
    if step.layer == step.norm:
        return like(state, _with_own_norm(merged, step, sums, state))
    weight, bias = _folded(merged, step)
    if step.fitted:
        gram, cross = sums["gram"], sums["cross"]
        square = float(gram.diagonal()[:-1].mean())
        pull = ridge * (square if square > 0 else 1.0)
        start = torch.cat([weight, bias[:, None]], 1).T.cpu()
        own_bias = merged.get_submodule(step.layer)._parameters.get("bias")
        constant = step.norm is not None or own_bias is not None
        if not constant:
            gram, cross, start = gram[:-1, :-1], cross[:-1], start[:-1]
        left = gram + pull * torch.eye(len(gram), dtype=gram.dtype)
        found = torch.linalg.solve(left, cross + pull * start)
        new_weight = found[: weight.shape[1]].T
        new_bias = found[-1] if constant else torch.zeros(len(weight))
        if constant and not step.last:
            new_weight, new_bias = _restored(new_weight, new_bias, sums)
    else:
        module_scale, module_shift = (
            each.cpu() for each in _affine(_norm_of(merged, step), len(weight))
        )
        count = sums["count"]
        mean = sums["sum"] / count * module_scale + module_shift
        spread = sums["spread"] / count * module_scale.abs()
        target, deviation = sums["mean"] / count, sums["deviation"] / count
        factor = torch.where(spread > 1e-6 * deviation, deviation / spread, 1.0)
        new_weight = weight.cpu() * factor[:, None]
        new_bias = target + (bias.cpu() - mean) * factor
    return like(state, _written(merged, step, new_weight.to(weight), new_bias.to(weight), state))


def _restored(weight: Tensor, bias: Tensor, sums: Sums) -> tuple[Tensor, Tensor]:
    """Scale each unit about its mean, so that its results vary as much as what they were fitted to.

    A fit that is not perfect varies less; with its mean alone right, a ReLU would cut less or more
    of it, and what follows would see other features than the models' own.
    """
    rows = sums["gram"][-1, -1]
    mean = sums["gram"][-1, :-1] / rows
    spread = sums["gram"][:-1, :-1] / rows - torch.outer(mean, mean)
    variance = (weight @ spread * weight).sum(1)
    wanted = sums["squares"] / rows - (sums["cross"][-1] / rows).square()
    varies = (variance > MIN_EXPLAINED * wanted) & (wanted > 0)
    factor = torch.where(varies, (wanted / variance).sqrt(), 1.0)
    scaled = weight * factor[:, None]
    return scaled, bias + (weight - scaled) @ mean


def _with_own_norm(
    merged: nn.Module, step: Step, sums: Sums, state: StateDict
) -> dict[str, Tensor]:
    """Set a BatchNorm that follows no layer, so that its results are as the models' own are."""
    norm = merged.get_submodule(step.layer)
    assert isinstance(norm, _BatchNorm)
    count = sums["count"]
    mean, variance = sums["sum"] / count, (sums["spread"] / count).square()
    sign = torch.where(norm.weight.detach().cpu() < 0, -1.0, 1.0)
    # What the norm puts out varies by less than its scale where the variance is small beside eps.
    lost = torch.where(variance > MIN_VARIANCE, (1 + norm.eps / variance).sqrt(), 1.0)
    prefix = f"{step.layer}." if step.layer else ""
    values = {
        "running_mean": mean,
        "running_var": variance,
        "weight": sign * lost * sums["deviation"] / count,
        "bias": sums["mean"] / count,
    }
    return {**state, **{prefix + k: v.to(state[prefix + k]) for k, v in values.items()}}


def _written(
    merged: nn.Module, step: Step, weight: Tensor, bias: Tensor, state: StateDict
) -> dict[str, Tensor]:
    """Write a folded layer back into layer and norm."""
    prefix = f"{step.layer}." if step.layer else ""
    new = dict(state)

    def put(key: str, value: Tensor) -> None:
        new[key] = value.reshape(state[key].shape).to(state[key])

    if step.norm is None:
        put(f"{prefix}weight", weight)
        if f"{prefix}bias" in state:
            put(f"{prefix}bias", bias)
        return new
    norm = merged.get_submodule(step.norm)
    assert isinstance(norm, _BatchNorm)
    # The weight keeps its size, on which the speed of later training depends, and max pooling
    # between layer and norm sees the sign that it had.
    old = state[f"{prefix}weight"].double().flatten(1)
    before, length = old.norm(dim=1), weight.norm(dim=1)
    constant = length <= TINY * before
    size = torch.where(constant | (before == 0), 1.0, before / length)
    factor = torch.where(norm.weight.detach() < 0, -1.0, 1.0) * size
    after = f"{step.norm}." if step.norm else ""
    put(f"{prefix}weight", torch.where(constant[:, None], old, weight * factor[:, None]))
    if f"{prefix}bias" in state:
        put(f"{prefix}bias", torch.zeros_like(bias))
    put(f"{after}running_mean", torch.zeros_like(bias))
    put(f"{after}running_var", torch.full_like(bias, 1 - norm.eps))
    put(f"{after}weight", torch.where(constant, 0.0, 1 / factor))
    put(f"{after}bias", bias)
    return new


def fit_least_squares(
    model: nn.Module,
    merged: StateDict,
    state_dicts: Sequence[StateDict],
    data: Sequence[Sequence[Any]],
    *,
    max_features: int = MAX_FEATURES,
    ridge: float = RIDGE,
    one_pass: bool = False,
) -> dict[str, Tensor]:
    """Return the merged model with its layers fitted to what the models themselves compute.

    Layer by layer, the merged weights W minimise the sum over models of `||X W - T||^2`: X is
    what the layer of the merged model sees on a model's data, T what that model's own layer
    gives there, after its BatchNorm. Each unit is then scaled to vary as much as T does: a fit
    varies less, which adds up from layer to layer. (Not the last layer, and none without a bias.)
    No labels and no gradient steps; the architecture stays, and BatchNorm layers are left as
    training would leave them. What cannot be set in one go keeps the
    average: see `plan`. The mean of a rescaled unit without a bias is not set.

    Args:
        model: a module of the architecture, any weights; not changed.
        merged: state dict to begin with: the average of the aligned models.
        state_dicts: the aligned models, whose units mean the same.
        data: for each model batches of its own data, gone through once a layer (a list or a
            DataLoader); inputs, or tuples and lists whose first item is the input.
        max_features: inputs of a unit (plus one) up to which a layer is fitted; the units of
            larger layers, and of grouped ones, are rescaled to the models' own mean and deviation
            (REPAIR). 0 rescales all.
        ridge: pull towards the weights so far, as a share of the inputs' mean square.
        one_pass: let X be what the models' own layers see (RegMean): one pass over the data, and
            nothing is rescaled.

    Raises:
        ValueError: no models, no data for one of them, or an activation is not finite.

    Source: Nasery et al., PLeaS (CVPR 2025); Jin et al., RegMean (ICLR 2023); Jordan et al.,
    REPAIR (ICLR 2023).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> state, batch = net.state_dict(), torch.randn(64, 2)
        >>> fitted = fit_least_squares(net, state, [state], [[batch]])
        >>> bool(torch.allclose(fitted["2.weight"], state["2.weight"], atol=1e-4))
        True
    """
    if not state_dicts:
        raise ValueError("no models to fit the merged model to")
    if len(data) != len(state_dicts):
        raise ValueError(f"data of {len(data)} models for {len(state_dicts)} models")
    if any(not len(batches) for batches in data):
        raise ValueError("no batch to fit the merged model on")
    current = _loaded(model, merged)
    owns = [_loaded(model, state_dict) for state_dict in state_dicts]
    first = next(iter(data[0]))
    inputs = first[0] if isinstance(first, (tuple, list)) else first
    steps = plan(current, (inputs,), max_features)
    if one_pass:
        pooled = [own_input_sums(own, steps, b) for own, b in zip(owns, data, strict=True)]
        for step in steps:
            if step.fitted:
                sums = add_up([each[step.layer] for each in pooled])
                current.load_state_dict(solve(current, step, sums, ridge))
    else:
        for step in steps:
            sums = add_up(
                [step_sums(current, own, step, b) for own, b in zip(owns, data, strict=True)]
            )
            current.load_state_dict(solve(current, step, sums, ridge))
    statistics = [batchnorm_statistics(current, batches, frozen=True) for batches in data]
    current.load_state_dict(recentred(current, pool_statistics(statistics)))
    return like(merged, {key: value.detach() for key, value in current.state_dict().items()})


def _loaded(model: nn.Module, state_dict: StateDict) -> nn.Module:
    loaded = copy.deepcopy(model).eval()
    loaded.load_state_dict(state_dict)
    return loaded
