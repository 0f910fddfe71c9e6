"""The sums that clients answer with, and the checks of what they send."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fl_rebasin.forward import evaluating, first_input, forward_hooks, inputs_of
from fl_rebasin.merging.clients import (
    Question,
    Request,
    Tensors,
)
from fl_rebasin.merging.least_squares.layers import folded, input_rows, single_precision
from fl_rebasin.merging.least_squares.steps import (
    FitStep,
    Step,
    Sums,
    add_up,
    checked,
    steps_from_json,
)
from fl_rebasin.merging.sum_checks import MAX_COUNT, check_gram, check_sum


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
        for rows, _ in input_rows(module, single_precision(first_input(args, kwargs))):
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


def read_sums(tensors: Tensors, model: nn.Module, steps: Sequence[Step]) -> dict[str, Sums]:
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
            check_sum(f"{step.layer}: {key}", value, expected[step.layer][key])
            if key in step.nonnegative and float(value.min()) < 0:
                raise ValueError(f"{step.layer}: {key} is negative")
        count = float(sums["count"])
        if not 0 < count <= MAX_COUNT:
            raise ValueError(f"{step.layer}: {count} is not a number of samples")
        if "gram" in sums:
            check_gram(f"{step.layer}: X^T X", sums["gram"])
        found[step.layer] = sums
    return found
