"""The steps of a fit: a layer fitted by least squares, a layer rescaled, a norm rescaled.

Each step says which sums it needs, computes them on one client's data, and solves for new weights
from the sums of all clients. Sums over samples add up exactly over clients.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fl_rebasin.forward import Moments, evaluating, inputs_of
from fl_rebasin.merging.batchnorm import MIN_VARIANCE, write_norm
from fl_rebasin.merging.least_squares.layers import (
    affine_of,
    by_unit,
    folded,
    input_rows,
    norm_of,
    run_until,
    single_precision,
    write_folded,
)
from fl_rebasin.state_dicts import like

RIDGE = 1e-2
"""Pull towards the averaged weights, as a share of the inputs' mean square."""
ROUNDING = 1e-13
"""Share of the squared mean below which a variance is rounding."""
MIN_EXPLAINED = 0.04
"""Share of a unit's variance that the fit must explain for the unit to be scaled up to it."""
MIN_SPREAD = 1e-6
"""A merged unit that varies less than this share of the models' own is not scaled up to them."""

Sums: TypeAlias = dict[str, Tensor]
"""Sums over samples by name, float64: they may be added up over clients."""
Shapes: TypeAlias = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class FitStep:
    """A linear or convolutional layer that is fitted by least squares.

    With X the rows that the merged layer sees and T what the models' own layers give after their
    norm, the folded weight and bias W minimise, over all clients,

        sum |X W - T|^2 + r |W - W_merged|^2,    r = ridge * mean(diag(X^T X)),

    so that W = (X^T X + r I)^-1 (X^T T + r W_merged).

    Attributes:
        layer: name of the layer.
        norm: name of the BatchNorm that the layer's output goes into, directly or after pooling.
        last: whether no step follows, so that its outputs may vary less than the models' own.
        ridge: pull towards the merged weights, as a share of the inputs' mean square.
    """

    layer: str
    norm: str | None = None
    last: bool = False
    ridge: float = RIDGE

    kind: ClassVar[str] = "fit"
    nonnegative: ClassVar[tuple[str, ...]] = ("squares",)

    def shapes(self, model: nn.Module) -> Shapes:
        """Return the shapes of the sums, for `d` features and `n` units.

        `count`, the number of rows; `gram`, `(d + 1, d + 1)`: X^T X with a constant 1 as the last
        feature; `cross`, `(d + 1, n)`: X^T T; `squares`, `(n,)`: the column sums of T^2.
        """
        weight = model.get_submodule(self.layer).get_parameter("weight")
        units, inputs = len(weight), weight[0].numel() + 1
        return {
            "count": (1,),
            "gram": (inputs, inputs),
            "cross": (inputs, units),
            "squares": (units,),
        }

    def sums(self, merged: nn.Module, own: nn.Module, batches: Iterable[Any]) -> Sums:
        """Return one client's sums.

        Args:
            merged: the merged model after all earlier steps; not changed.
            own: the client's aligned model; not changed.
            batches: inputs, or tuples and lists whose first item is the input.

        Raises:
            ValueError: there is no batch, or an activation is not finite.
        """
        module = merged.get_submodule(self.layer)
        total: Sums = {}
        with evaluating(merged, own), torch.no_grad():
            for batch in batches:
                inputs = inputs_of(batch)
                x, _ = run_until(merged, self.layer, inputs)
                targets = _own_outputs(own, self, module, inputs)
                total = add_up([total, {"count": torch.tensor([len(targets)])}])
                for rows, places in input_rows(module, single_precision(x)):
                    total = add_up([total, _products(rows, targets[places])])
        return checked(total, self.layer)

    def solve(self, merged: nn.Module, sums: Sums) -> dict[str, Tensor]:
        """Return the merged model's state dict with the layer set from the clients' sums.

        Raises:
            ValueError: the solution is not finite.
            RuntimeError: there is none.
        """
        weight, bias = folded(merged, self.layer, self.norm)
        gram, cross = sums["gram"], sums["cross"]
        square = float(gram.diagonal()[:-1].mean())
        pull = self.ridge * (square if square > 0 else 1.0)
        start = torch.cat([weight, bias[:, None]], 1).T.cpu()
        own_bias = merged.get_submodule(self.layer)._parameters.get("bias")
        constant = self.norm is not None or own_bias is not None
        if not constant:
            gram, cross, start = gram[:-1, :-1], cross[:-1], start[:-1]
        left = gram + pull * torch.eye(len(gram), dtype=gram.dtype)
        found = torch.linalg.solve(left, cross + pull * start)
        new_weight = found[: weight.shape[1]].T
        new_bias = found[-1] if constant else torch.zeros(len(weight))
        if constant and not self.last:
            new_weight, new_bias = _scaled_to_targets(new_weight, new_bias, sums)
        return _written(merged, self, new_weight.to(weight), new_bias.to(weight))


def _products(rows: Tensor, targets: Tensor) -> Sums:
    return {
        "gram": rows.T @ rows,
        "cross": rows.T @ targets,
        "squares": targets.double().square().sum(0),
    }


def _scaled_to_targets(weight: Tensor, bias: Tensor, sums: Sums) -> tuple[Tensor, Tensor]:
    """Scale each unit about its mean, so that its outputs vary as much as the targets.

    With the mean x of the inputs and the targets t of a unit:

        factor = sqrt(Var(t) / Var(w x)),    w' = factor * w,    b' = b + (w - w') x

    An imperfect fit varies less. If only its mean were right, a ReLU would cut off a different
    share of it than of the models' own units.
    """
    rows = sums["gram"][-1, -1]
    mean = sums["gram"][-1, :-1] / rows
    spread = sums["gram"][:-1, :-1] / rows - torch.outer(mean, mean)
    variance = (weight @ spread * weight).sum(1)
    wanted = sums["squares"] / rows - (sums["cross"][-1] / rows).square()
    explained = (variance > MIN_EXPLAINED * wanted) & (wanted > 0)
    factor = torch.where(explained, (wanted / variance).sqrt(), 1.0)
    scaled = weight * factor[:, None]
    return scaled, bias + (weight - scaled) @ mean


@dataclass(frozen=True)
class RescaleStep:
    """A layer whose units get the models' own mean and deviation (REPAIR).

    With mean m and deviation s of the merged unit, and M and S those of the models' own units
    averaged over clients: w <- w S / s and b <- M + (b - m) S / s.

    Attributes:
        layer: name of the layer.
        norm: name of the BatchNorm that the layer's output goes into, directly or after pooling.
    """

    layer: str
    norm: str | None = None

    kind: ClassVar[str] = "rescale"
    nonnegative: ClassVar[tuple[str, ...]] = ("merged_deviation", "own_deviation")

    def shapes(self, model: nn.Module) -> Shapes:
        """Return the shapes of the sums: `count`, and mean and deviation times `count`."""
        return _moment_shapes(len(model.get_submodule(self.layer).get_parameter("weight")))

    def sums(self, merged: nn.Module, own: nn.Module, batches: Iterable[Any]) -> Sums:
        """Return one client's sums; arguments and errors as for `FitStep.sums`."""
        module = merged.get_submodule(self.layer)

        def outputs(inputs: Any) -> tuple[Tensor, Tensor]:
            merged_outputs = by_unit(run_until(merged, self.layer, inputs)[1], module)
            return merged_outputs, _own_outputs(own, self, module, inputs)

        with evaluating(merged, own), torch.no_grad():
            return _moment_sums(self.layer, map(outputs, map(inputs_of, batches)))

    def solve(self, merged: nn.Module, sums: Sums) -> dict[str, Tensor]:
        """Return the merged model's state dict with the layer rescaled.

        Raises:
            ValueError: the solution is not finite.
        """
        weight, bias = folded(merged, self.layer, self.norm)
        norm = norm_of(merged, self.norm)
        scale, shift = (each.cpu() for each in affine_of(norm, len(weight)))
        means = {key: value / sums["count"] for key, value in sums.items()}
        mean = means["merged_mean"] * scale + shift
        deviation = means["merged_deviation"] * scale.abs()
        target, own_deviation = means["own_mean"], means["own_deviation"]
        varies = deviation > MIN_SPREAD * own_deviation
        factor = torch.where(varies, own_deviation / deviation, 1.0)
        new_weight = weight.cpu() * factor[:, None]
        new_bias = target + (bias.cpu() - mean) * factor
        return _written(merged, self, new_weight.to(weight), new_bias.to(weight))


@dataclass(frozen=True)
class NormStep:
    """A BatchNorm that follows no layer, set so that its outputs vary as the models' own do.

    With mean m and deviation s of the merged norm's inputs, and M and S those of the own norms'
    outputs averaged over clients: running mean m, running variance s^2, bias M, and weight
    S sqrt(1 + eps / s^2) with the sign of the old one.

    Attributes:
        layer: name of the norm.
    """

    layer: str

    kind: ClassVar[str] = "norm"
    norm: ClassVar[None] = None
    nonnegative: ClassVar[tuple[str, ...]] = RescaleStep.nonnegative

    def shapes(self, model: nn.Module) -> Shapes:
        """Return the shapes of the sums: `count`, and mean and deviation times `count`."""
        return _moment_shapes(len(model.get_submodule(self.layer).get_parameter("weight")))

    def sums(self, merged: nn.Module, own: nn.Module, batches: Iterable[Any]) -> Sums:
        """Return one client's sums: of the merged norm's inputs and the own norm's outputs."""
        module = merged.get_submodule(self.layer)

        def values(inputs: Any) -> tuple[Tensor, Tensor]:
            merged_inputs = by_unit(run_until(merged, self.layer, inputs)[0], module)
            own_outputs = by_unit(run_until(own, self.layer, inputs)[1], module)
            return merged_inputs, single_precision(own_outputs)

        with evaluating(merged, own), torch.no_grad():
            return _moment_sums(self.layer, map(values, map(inputs_of, batches)))

    def solve(self, merged: nn.Module, sums: Sums) -> dict[str, Tensor]:
        """Return the merged model's state dict with the norm set.

        Raises:
            ValueError: the solution is not finite.
        """
        norm = merged.get_submodule(self.layer)
        assert isinstance(norm, _BatchNorm)
        means = {key: value / sums["count"] for key, value in sums.items()}
        variance = means["merged_deviation"].square()
        sign = torch.where(norm.weight.detach().cpu() < 0, -1.0, 1.0)
        # Where the variance is small beside eps, the norm's outputs vary by less than its scale.
        lost = torch.where(variance > MIN_VARIANCE, (1 + norm.eps / variance).sqrt(), 1.0)
        state = merged.state_dict()
        new = write_norm(
            state,
            self.layer,
            running_mean=means["merged_mean"],
            running_var=variance,
            weight=sign * lost * means["own_deviation"],
            bias=means["own_mean"],
        )
        return like(state, _finite(new))


Step: TypeAlias = FitStep | RescaleStep | NormStep


def _own_outputs(
    own: nn.Module, step: FitStep | RescaleStep, module: nn.Module, inputs: Any
) -> Tensor:
    """Return what the own layer gives after its norm, shape `(samples, units)`."""
    outputs = single_precision(by_unit(run_until(own, step.layer, inputs)[1], module))
    scale, shift = affine_of(norm_of(own, step.norm), outputs.shape[1])
    return outputs * scale.to(outputs) + shift.to(outputs)


def _moment_shapes(units: int) -> Shapes:
    names = ("merged_mean", "merged_deviation", "own_mean", "own_deviation")
    return {"count": (1,), **dict.fromkeys(names, (units,))}


def _moment_sums(layer: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> Sums:
    """Return mean and deviation of two sets of values, each times the number of samples.

    The deviation is that within one client: the means of clients differ too, but no single model
    shows that difference.

    Args:
        layer: name of the layer, for errors.
        pairs: values of the merged and of the own model, shape `(samples, units)`, by batch.
    """
    moments: list[Moments] = []
    for pair in pairs:
        new = [Moments.of(values.T.double()) for values in pair if len(values)]
        moments = [old + each for old, each in zip(moments, new, strict=True)] if moments else new
    sums: Sums = {}
    for name, each in zip(("merged", "own"), moments, strict=False):
        varies = each.variance > ROUNDING * each.mean.square()
        deviation = torch.where(varies, each.variance, 0.0).sqrt()
        sums["count"] = torch.tensor([each.count])
        sums[f"{name}_mean"] = each.mean * each.count
        sums[f"{name}_deviation"] = deviation * each.count
    return checked(sums, layer)


def add_up(all_sums: Sequence[Mapping[str, Tensor]]) -> Sums:
    """Return the sum of sums, name by name, float64."""
    total: Sums = {}
    for sums in all_sums:
        for key, value in sums.items():
            total[key] = total[key] + value.double() if key in total else value.double()
    return total


def checked(sums: Sums, layer: str) -> Sums:
    """Return sums in float64 on the CPU.

    Raises:
        ValueError: there is no sample, or a sum is not finite.
    """
    if not sums or not bool(sums["count"]):
        raise ValueError("no batch to fit the merged model on")
    sums = {key: value.double().cpu() for key, value in sums.items()}
    if not all(bool(torch.isfinite(value).all()) for value in sums.values()):
        raise ValueError(f"{layer}: an activation is NaN or infinite")
    return sums


def _written(
    merged: nn.Module, step: FitStep | RescaleStep, weight: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    new = _finite(write_folded(merged, step.layer, step.norm, weight, bias))
    return like(merged.state_dict(), new)


def _finite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise ValueError("the solution is not finite")
    return state


def steps_to_json(steps: Sequence[Step]) -> str:
    """Return what a client needs to know of some steps."""
    return json.dumps([[step.kind, step.layer, step.norm] for step in steps])


def steps_from_json(text: str) -> list[Step]:
    """Return the steps that `steps_to_json` has written."""
    steps: list[Step] = []
    for kind, layer, norm in json.loads(text):
        if kind == NormStep.kind:
            steps.append(NormStep(layer))
        else:
            steps.append(FitStep(layer, norm) if kind == FitStep.kind else RescaleStep(layer, norm))
    return steps
