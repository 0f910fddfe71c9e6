"""Fit the merged model, layer by layer, to what the models' own layers compute.

The layers of the merged model are fitted so that, on each client's data, their outputs come as
close as possible to those of the client's own aligned model. No labels and no gradient steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from fl_rebasin.forward import evaluating, forward_hooks, inputs_of
from fl_rebasin.merging.batchnorm import BatchNorm, ask_statistics, pool_statistics, recentred
from fl_rebasin.merging.clients import (
    Clients,
    Cost,
    LocalClients,
    Question,
    Request,
    Tensors,
    total_costs,
)
from fl_rebasin.merging.finishing_step import Finish, Finished
from fl_rebasin.merging.heads import check_metric_name, last_layer, without_label_prior
from fl_rebasin.merging.least_squares.layers import folded, input_rows, single_precision
from fl_rebasin.merging.least_squares.plan import MAX_FEATURES, plan
from fl_rebasin.merging.least_squares.steps import (
    RIDGE,
    FitStep,
    Step,
    Sums,
    add_up,
    checked,
    steps_from_json,
    steps_to_json,
)
from fl_rebasin.state_dicts import StateDict, like

MAX_COUNT = 1e15
"""More samples than any client can have: sums of more are invalid."""
MAX_ENTRY = 1e30
"""Larger sums could overflow when they are added up."""


def _layer_sums(model: nn.Module, batches: Iterable[Any], request: Request) -> Tensors:
    """Return a client's sums for one step."""
    own = copy.deepcopy(model)
    own.load_state_dict(request.states["own"])
    model.load_state_dict(request.states["merged"])
    (step,) = steps_from_json(str(request.config["steps"]))
    sums = step.sums(model, own, batches)
    return {f"{step.layer}/{key}": value for key, value in sums.items()}


def _own_sums(model: nn.Module, batches: Iterable[Any], request: Request) -> Tensors:
    """Return a client's sums for all steps at once."""
    model.load_state_dict(request.states["own"])
    steps = [s for s in steps_from_json(str(request.config["steps"])) if isinstance(s, FitStep)]
    found = regmean_sums(model, steps, batches)
    return {f"{layer}/{key}": value for layer, sums in found.items() for key, value in sums.items()}


LAYER_SUMS = Question("least-squares", "least-squares sums", _layer_sums)
REGMEAN_SUMS = Question("regmean", "RegMean sums", _own_sums)


def regmean_sums(
    own: nn.Module, steps: Sequence[FitStep], batches: Iterable[Any]
) -> dict[str, Sums]:
    """Return a model's sums for all fitted layers from one pass over its own data.

    The inputs X are those of the model itself, so that X^T T = X^T X W with its own weights W.

    Args:
        own: the aligned model; not changed.
        steps: the layers.
        batches: inputs, or tuples and lists whose first item is the input.

    Raises:
        ValueError: there is no batch, or an activation is not finite.
    """
    grams: dict[str, Sums] = {}
    names = {own.get_submodule(step.layer): step.layer for step in steps}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        for rows, _ in input_rows(module, single_precision(args[0])):
            new = {"gram": rows.T @ rows, "count": torch.tensor([len(rows)])}
            name = names[module]
            grams[name] = add_up([grams[name], new] if name in grams else [new])

    hooks = [(module, record) for module in names]
    with forward_hooks(hooks), evaluating(own), torch.no_grad():
        for batch in batches:
            own(inputs_of(batch))
    sums: dict[str, Sums] = {}
    for step in steps:
        found = checked(grams.get(step.layer, {}), step.layer)
        weight, bias = folded(own, step.layer, step.norm)
        matrix = torch.cat([weight, bias[:, None]], 1).T.cpu()
        cross = found["gram"] @ matrix
        sums[step.layer] = {**found, "cross": cross, "squares": (matrix * cross).sum(0)}
    return sums


def _read(tensors: Tensors, model: nn.Module, steps: Sequence[Step]) -> dict[str, Sums]:
    """Return one client's sums by layer.

    Raises:
        ValueError: they are not what the question asks for.
    """
    expected = {step.layer: step.shapes(model) for step in steps}
    wanted = {f"{layer}/{key}" for layer, shapes in expected.items() for key in shapes}
    if odd := sorted(tensors.keys() ^ wanted):
        raise ValueError(f"the question asks for other sums: {odd[:3]}")
    found: dict[str, Sums] = {}
    for step in steps:
        sums = {key: tensors[f"{step.layer}/{key}"] for key in expected[step.layer]}
        for key, value in sums.items():
            _check_sum(f"{step.layer}: {key}", value, expected[step.layer][key])
            if key in step.nonnegative and float(value.min()) < 0:
                raise ValueError(f"{step.layer}: {key} is negative")
        count = float(sums["count"])
        if not 0 < count <= MAX_COUNT:
            raise ValueError(f"{step.layer}: {count} is not a number of samples")
        if "gram" in sums:
            _check_gram(step.layer, sums["gram"])
        found[step.layer] = sums
    return found


def _check_sum(what: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.dtype != torch.float64 or tuple(value.shape) != shape:
        raise ValueError(
            f"{what} is {value.dtype} of shape {tuple(value.shape)}, expected float64 of shape "
            f"{shape}"
        )
    if not bool((value.abs() <= MAX_ENTRY).all()):  # Written so that NaN fails.
        raise ValueError(f"{what} is not finite or too large")


def _check_gram(layer: str, gram: Tensor) -> None:
    if not torch.allclose(gram, gram.T, rtol=1e-3, atol=1e-6 * float(gram.abs().max())):
        raise ValueError(f"{layer}: X^T X is not symmetric")
    if float(gram.diagonal().min()) < 0:
        raise ValueError(f"{layer}: X^T X has a negative diagonal")


@dataclass(frozen=True)
class _Fit:
    """A fit of one architecture.

    Attributes:
        name: name of the method.
        model: a module of the architecture.
        question: what the clients are asked.
        messages: the steps of each question, in order.
        head: keys of weight and bias of the last layer, where label priors are removed.
        label_counts: name of the metric with the label counts; None to keep the label priors.
    """

    name: str
    model: nn.Module
    question: Question
    messages: Sequence[Sequence[Step]]
    head: tuple[str, str | None] | None = None
    label_counts: str | None = None

    def __call__(self, merged: StateDict, clients: Clients) -> Finished:
        """Fit the merged model to the clients' models."""
        started = time.perf_counter()
        current = _loaded(self.model, merged)
        own = self._targets(clients)
        asked, done, costs, problems = list(own), 0, Cost(len(own), 0.0, 0, 0), []
        for steps in self.messages if asked else ():
            answers = self._ask(current, {client: own[client] for client in asked}, steps, clients)
            costs += answers.cost
            # A client that fails once is not asked again: a silent one costs the timeout each time.
            asked = list(answers.by_client)
            if not asked:
                break
            for step in steps:
                sums = add_up([each[step.layer] for each in answers.by_client.values()])
                try:
                    current.load_state_dict(step.solve(current, sums))
                    done += 1
                except (ValueError, RuntimeError) as error:  # Valid sums may have no solution.
                    problems.append(f"{step.layer} keeps the average: {error}")
        costs = replace(costs, seconds=time.perf_counter() - started)
        count = sum(map(len, self.messages))
        report = f"{self.name}: {done} of {count} layers, {costs.messages} messages"
        fitted = Finished(merged, {self.name: costs}, report, tuple(problems), applied=bool(done))
        if not done and count:
            return self._without_fit(fitted, clients)
        return self._with_statistics(fitted, current, clients, asked or list(own))

    def _targets(self, clients: Clients) -> dict[int, StateDict]:
        """Return the clients' models, without their label priors where counts are known."""
        if self.label_counts is None or self.head is None:
            return dict(clients.models)
        weight, bias = self.head
        if bias is None:
            return dict(clients.models)
        classes = len(self.model.get_parameter(weight))
        counts = clients.label_counts(self.label_counts, classes)
        total = sum(counts.values(), torch.zeros(classes, dtype=torch.float64))
        return {
            client: without_label_prior(model, counts[client], total, bias)
            if client in counts
            else model
            for client, model in clients.models.items()
        }

    def _ask(
        self,
        current: nn.Module,
        own: Mapping[int, StateDict],
        steps: Sequence[Step],
        clients: Clients,
    ) -> Any:
        config = {"steps": steps_to_json(steps)}
        shared = {"merged": current.state_dict()} if self.question is LAYER_SUMS else {}
        requests = {
            client: Request({**shared, "own": model}, config) for client, model in own.items()
        }
        return clients.ask(self.question, requests, lambda each: _read(each, current, steps))

    def _without_fit(self, fitted: Finished, clients: Clients) -> Finished:
        """Return the average with the statistics that it needs without a fit."""
        recalibrate = BatchNorm().bind(self.model, None)
        if recalibrate is None:
            return fitted
        recalibrated = recalibrate(fitted.state_dict, clients)
        costs = total_costs([fitted.costs, recalibrated.costs])
        return replace(fitted, state_dict=recalibrated.state_dict, costs=costs)

    def _with_statistics(
        self, fitted: Finished, current: nn.Module, clients: Clients, asked: Sequence[int]
    ) -> Finished:
        """Return the fitted model with BatchNorm layers as training would leave them."""
        state = {key: current.state_dict()[key].detach().clone() for key in fitted.state_dict}
        costs = fitted.costs
        if BatchNorm().bind(self.model, None) is not None:
            answers = ask_statistics(current, state, clients, asked, frozen=True)
            costs = total_costs([costs, {BatchNorm.name: answers.cost}])
            if answers.by_client:
                found = recentred(current, pool_statistics(answers.by_client.values()))
                state = {key: found[key] for key in state}
        return replace(fitted, state_dict=like(fitted.state_dict, state), costs=costs)


def _loaded(model: nn.Module, state_dict: StateDict) -> nn.Module:
    loaded = copy.deepcopy(model).eval()
    loaded.load_state_dict(state_dict)
    return loaded


def _check_fit_options(max_features: int, ridge: float, label_counts: str | None) -> None:
    if isinstance(max_features, bool) or not isinstance(max_features, int) or max_features < 1:
        raise ValueError(
            f"max_features is {max_features!r}: give a positive integer, or use Repair() to "
            "rescale all layers"
        )
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge is {ridge}: it must be finite and not negative")
    check_metric_name(label_counts)


@dataclass(frozen=True)
class LeastSquares:
    """Finishing step: layerwise least squares on what the merged model sees, a message a layer.

    Layer by layer, the merged weights W minimise the sum over clients of |X W - T|^2: X is what
    the layer of the merged model sees on a client's data, T what the client's own aligned layer
    gives there after its BatchNorm. Each unit is then scaled to vary as much as T does.

    Attributes:
        max_features: inputs of a unit, plus one, up to which a layer is fitted; larger and grouped
            layers are rescaled to the models' own mean and deviation (REPAIR).
        ridge: pull towards the merged weights, as a share of the inputs' mean square.
        label_counts: name of the metric that lists a client's training examples of each class;
            given, the clients' models lose their label priors first.

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
        """Return the steps of each message: one."""
        return [[step] for step in plan(model, inputs, self.max_features, self.ridge)]

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish | None:
        """Return the fit for a model."""
        return _bound(self, model, example_inputs)


@dataclass(frozen=True)
class RegMean:
    """Finishing step: least squares on what the clients' own models see, in one message.

    Layers with more than `max_features` inputs a unit keep the average.

    Attributes:
        max_features: inputs of a unit, plus one, up to which a layer is fitted.
        ridge: pull towards the merged weights, as a share of the inputs' mean square.
        label_counts: as for `LeastSquares`.

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

    Attributes:
        label_counts: as for `LeastSquares`.

    Source: Jordan et al., REPAIR (ICLR 2023).
    """

    label_counts: str | None = None

    name: ClassVar[str] = "repair"
    needs_models: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_metric_name(self.label_counts)

    def messages(self, model: nn.Module, inputs: Any) -> list[list[Step]]:
        """Return the steps of each message: one."""
        return [[step] for step in plan(model, inputs, max_features=0)]

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish | None:
        """Return the rescaling for a model."""
        return _bound(self, model, example_inputs)


FitMethod: TypeAlias = LeastSquares | RegMean | Repair


def _fit_of(method: FitMethod, model: nn.Module, inputs: Any) -> _Fit:
    question = REGMEAN_SUMS if isinstance(method, RegMean) else LAYER_SUMS
    counts = method.label_counts
    head = None if counts is None else last_layer(model, inputs)
    return _Fit(method.name, model, question, method.messages(model, inputs), head, counts)


def _bound(method: FitMethod, model: nn.Module, inputs: Any) -> Finish | None:
    """Return a method for a model; without a layer to fit, BatchNorm's statistics remain to do."""
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
    method = LeastSquares() if method is None else method
    example = inputs_of(next(iter(data[0])))
    fit = _fit_of(method, _loaded(model, merged), (example,))
    finished = fit(merged, LocalClients(model, state_dicts, data))
    if finished.problems:
        raise ValueError("; ".join(finished.problems))
    return dict(like(merged, finished.state_dict))
