"""Fit the merged model, layer by layer, to what the models' own layers compute.

The layers of the merged model are fitted so that, on each client's data, their outputs come as
close as possible to those of the client's own aligned model. No labels and no gradient steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn

from fl_rebasin.forward import inputs_of
from fl_rebasin.merging.batchnorm import BatchNorm
from fl_rebasin.merging.clients import (
    LocalClients,
)
from fl_rebasin.merging.finishing_step import Finish
from fl_rebasin.merging.heads import check_metric_name, last_layer
from fl_rebasin.merging.least_squares.fit import Fit
from fl_rebasin.merging.least_squares.plan import MAX_FEATURES, plan
from fl_rebasin.merging.least_squares.steps import (
    RIDGE,
    FitStep,
    Step,
)
from fl_rebasin.merging.least_squares.sums import LAYER_SUMS, REGMEAN_SUMS
from fl_rebasin.state_dicts import StateDict, like, with_weights


def _check_fit_options(max_features: int, ridge: float, label_counts: str | None) -> None:
    if isinstance(max_features, bool) or not isinstance(max_features, int) or max_features < 1:
        raise ValueError(
            f"max_features is {max_features!r}: give a positive integer, or use Repair() to "
            "rescale all layers"
        )
    if not isinstance(ridge, Real) or not 0 <= ridge < math.inf:
        raise ValueError(f"ridge is {ridge!r}: it must be finite and not negative")
    if label_counts is not None:
        check_metric_name(label_counts)


@dataclass(frozen=True)
class LeastSquares:
    """Finishing step: layerwise least squares on what the merged model sees, one message a layer.

    Layer by layer, the merged weights W minimise

        sum over clients of |X W - T|^2, plus r |W - W_merged|^2,  r = ridge * mean(diag(X^T X))

    where X is what the layer of the merged model sees on a client's data, and T what the client's
    own aligned layer gives there after its BatchNorm. Each unit is then scaled to vary as much as T
    does.

    Attributes:
        max_features: largest number of inputs of a unit, bias included, for which a layer is
            fitted; larger and grouped layers are rescaled to the models' own mean and deviation
            (REPAIR).
        ridge: pull towards the merged weights, as a share of the inputs' mean square.
        label_counts: name of the metric that lists a client's training examples of each class; if
            given, the label priors of the clients' models are removed first.

    Raises:
        ValueError: an option is out of range.

    Source: Nasery et al., PLeaS (CVPR 2025).
    """

    max_features: int = MAX_FEATURES
    ridge: float = RIDGE
    label_counts: str | None = None

    name: ClassVar[str] = "least-squares"
    needs_models: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_fit_options(self.max_features, self.ridge, self.label_counts)

    def messages(self, model: nn.Module, inputs: Any) -> list[list[Step]]:
        """Return the steps of each message: one step."""
        return [[step] for step in plan(model, inputs, self.max_features, self.ridge)]

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish | None:
        """Return the fit for a model."""
        return _bound(self, model, example_inputs)


@dataclass(frozen=True)
class RegMean:
    """Finishing step: least squares on what the clients' own models see, in one message.

    The same as `LeastSquares`, but with the inputs X_i of each client's own layer W_i, so that
    T_i = X_i W_i:

        W = (sum_i X_i^T X_i + r I)^-1 (sum_i X_i^T X_i W_i + r W_merged)

    Attributes:
        max_features: largest number of inputs of a unit, bias included, for which a layer is
            fitted; larger and grouped layers keep the average.
        ridge: pull towards the merged weights, as a share of the inputs' mean square.
        label_counts: as for `LeastSquares`.

    Raises:
        ValueError: an option is out of range.

    Source: Jin et al., RegMean (ICLR 2023).
    """

    max_features: int = MAX_FEATURES
    ridge: float = RIDGE
    label_counts: str | None = None

    name: ClassVar[str] = "regmean"
    needs_models: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_fit_options(self.max_features, self.ridge, self.label_counts)

    def messages(self, model: nn.Module, inputs: Any) -> list[list[Step]]:
        """Return the steps of each message: all fits at once."""
        steps = plan(model, inputs, self.max_features, self.ridge)
        fits: list[Step] = [step for step in steps if isinstance(step, FitStep)]
        return [fits] if fits else []

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish | None:
        """Return the fit for a model."""
        return _bound(self, model, example_inputs)


@dataclass(frozen=True)
class Repair:
    """Finishing step: gives each unit the mean and deviation that it has in the models (REPAIR).

    With mean m and deviation s of the merged unit, and M and S those of the models' own units
    averaged over clients: w <- w S / s and b <- M + (b - m) S / s.

    Attributes:
        label_counts: as for `LeastSquares`.

    Raises:
        ValueError: `label_counts` cannot be the name of a metric.

    Source: Jordan et al., REPAIR (ICLR 2023).
    """

    label_counts: str | None = None

    name: ClassVar[str] = "repair"
    needs_models: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.label_counts is not None:
            check_metric_name(self.label_counts)

    def messages(self, model: nn.Module, inputs: Any) -> list[list[Step]]:
        """Return the steps of each message: one step."""
        return [[step] for step in plan(model, inputs, max_features=0)]

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish | None:
        """Return the rescaling for a model."""
        return _bound(self, model, example_inputs)


FitMethod: TypeAlias = LeastSquares | RegMean | Repair


def _fit_of(method: FitMethod, model: nn.Module, inputs: Any) -> Fit:
    question = REGMEAN_SUMS if isinstance(method, RegMean) else LAYER_SUMS
    counts = method.label_counts
    head = None if counts is None else last_layer(model, inputs)
    return Fit(method.name, model, question, method.messages(model, inputs), head, counts)


def _bound(method: FitMethod, model: nn.Module, inputs: Any) -> Finish | None:
    """Return a method for a model; if it has no layer to fit, re-estimate BatchNorm statistics."""
    fit = _fit_of(method, model, inputs)
    return fit if fit.messages else BatchNorm().bind(model, inputs)


def fit_least_squares(
    model: nn.Module,
    merged: StateDict,
    state_dicts: Sequence[StateDict],
    data: Sequence[Sequence[Any]],
    method: FitMethod | None = None,
) -> dict[str, Tensor]:
    """Return the merged model with its layers fitted to what the models themselves compute.

    The architecture stays, and BatchNorm layers are as training would leave them. Layers that
    cannot be set alone keep the average: see `plan`. A rescaled unit without a bias keeps its mean.

    Args:
        model: a module of the architecture, any weights; not changed.
        merged: state dict to start from: the average of the aligned models.
        state_dicts: the aligned models.
        data: for each model the batches of its own data, used once for each layer (a list or a
            DataLoader); inputs, or tuples and lists whose first item is the input.
        method: `LeastSquares()` by default, `RegMean()` or `Repair()`.

    Raises:
        ValueError: there are no models, no data for one of them, or an activation is not finite.

    Source: Nasery et al., PLeaS (CVPR 2025); Jin et al., RegMean (ICLR 2023); Jordan et al.,
    REPAIR (ICLR 2023).

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> batch = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> state = net.state_dict()
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
    method = LeastSquares() if method is None else method
    example = inputs_of(next(iter(data[0])))
    fit = _fit_of(method, with_weights(model, merged), (example,))
    finished = fit(merged, LocalClients(model, state_dicts, data))
    if finished.problems:
        raise ValueError("; ".join(finished.problems))
    return dict(like(merged, finished.state_dict))
