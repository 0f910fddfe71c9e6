"""Deriving the permutation spec of a model from traced runs on example inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fl_rebasin.symmetry.axes import Axis, Cat, Fixed, Group, Parted, Prod, groups_of
from fl_rebasin.symmetry.fingerprint import fingerprint
from fl_rebasin.symmetry.precise import SINGLE
from fl_rebasin.symmetry.selfcheck import SINGLE_TOLERANCE, TOLERANCE, SelfCheck
from fl_rebasin.symmetry.spec import PermutationSpec, SpecError
from fl_rebasin.symmetry.terms_to_spec import terms_to_spec
from fl_rebasin.symmetry.trace import trace
from fl_rebasin.symmetry.twin import Twin, check_model

ExampleInputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]


def derive_spec(model: nn.Module, example_inputs: ExampleInputs) -> PermutationSpec:
    """Trace runs of a model to find out which axes may be permuted, and check the result.

    A private copy of the model runs; the model's parameters and buffers do not change. An axis may
    move only if each operator that it passes through has a rule for it. All other axes are pinned,
    and so are parameters that the example inputs do not reach. Finally the copy runs with random
    permutations in float64, in training and evaluation mode, and its outputs and buffers must be
    the same. Groups that fail this check are pinned, and a warning names them.

    The spec holds for the path that the model takes on the example inputs: if a model branches on
    its inputs, give examples that take the branch with all its parameters.

    Args:
        model: any module whose forward pass runs on `example_inputs`.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
            Float tensors with equal values are replaced by random ones; others are kept.

    Returns:
        The spec of `model.state_dict()`.

    Raises:
        SpecError: the model cannot be run on the inputs, or its state dict cannot be described.

    Source: the permutation symmetries of Ainsworth, Hayase, Srinivasa (ICLR 2023), section 3.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> derive_spec(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.zeros(1, 2)).groups
        {'0': 3}
    """
    if not isinstance(example_inputs, (Tensor, tuple, Mapping)):
        raise SpecError(
            f"example_inputs is a {type(example_inputs).__name__}: give a tensor, a tuple of "
            "positional arguments or a dict of keyword arguments"
        )
    if not isinstance(model, nn.Module):
        raise SpecError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    check_model(model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_unchanged(model))
        return _derive(model, example_inputs)


def _derive(model: nn.Module, example_inputs: ExampleInputs) -> PermutationSpec:
    tolerance = TOLERANCE
    try:
        twin = Twin(model, example_inputs)
        traced = trace(twin)
    except SpecError as failure:
        if not _lacks_double(failure.__cause__):
            raise
        tolerance = SINGLE_TOLERANCE
        warnings.warn(
            f"the model cannot run in float64 ({failure.__cause__}): the self-check runs in "
            f"float32, with a tolerance of {tolerance:.0e}",
            stacklevel=3,
        )
        twin = Twin(model, example_inputs, SINGLE)
        traced = trace(twin)
    spec = terms_to_spec(traced.terms, _learnable(twin))
    spec = replace(spec, fingerprint=fingerprint(model))
    selfcheck = SelfCheck(twin, traced.runs, tolerance)
    for _ in range(3):
        error, draw = selfcheck.check(spec)
        if draw is None:
            return spec
        if not selfcheck.is_repeatable(spec):
            raise SpecError(
                "the model's outputs are NaN, or differ between two equal runs: make its forward "
                "pass repeatable under torch.manual_seed and finite on the example inputs (float "
                "tensors with equal values are replaced by standard normal ones), or derive the "
                "spec of a part of the model"
            )
        failing = selfcheck.failing_groups(spec, draw)
        warnings.warn(
            f"the self-check pins the groups {failing}: relative error {error:.1e}", stacklevel=3
        )
        spec = _without(spec, failing)
    raise SpecError(
        "the self-check fails even after the failing groups were pinned three times: please report "
        "this as a bug, with the model"
    )


def _lacks_double(error: BaseException | None) -> bool:
    """Whether an operator reports that it does not support double precision."""
    words = ("'Double'", "float64", "torch.double")
    return isinstance(error, (RuntimeError, TypeError)) and any(w in str(error) for w in words)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the model's buffers afterwards, and raise if running the copy changed the model.

    A function that the model holds may refer to the model itself, which copying cannot redirect.
    """
    versions = {
        name: parameter._version
        for name, parameter in model.named_parameters()
        if not parameter.is_inference()
    }
    buffers = {
        name: (buffer, buffer.clone())
        for name, buffer in model.named_buffers()
        if buffer.layout == torch.strided and not buffer.is_quantized and not buffer.is_meta
    }
    try:
        yield
    finally:
        changed = [
            name
            for name, parameter in model.named_parameters()
            if name in versions and parameter._version != versions[name]
        ]
        for name, (buffer, before) in buffers.items():
            if not torch.equal(buffer, before):
                changed.append(name)
                with torch.no_grad():
                    buffer.copy_(before)
        if changed:
            raise SpecError(
                f"running a copy of the model changes the model's own {changed[:3]}: let forward "
                "use submodules as attributes, not functions that refer to them"
            )


def _learnable(twin: Twin) -> tuple[str, ...]:
    """Return the keys of the parameters; a tied one once."""
    seen: dict[int, str] = {}
    for key, tensor in twin.tensors.items():
        if isinstance(tensor, nn.Parameter):
            seen.setdefault(id(tensor), key)
    return tuple(seen.values())


def _without(spec: PermutationSpec, failing: Sequence[str]) -> PermutationSpec:
    """Return the spec with some groups pinned, and with them the groups within their units."""
    gone = {*failing, *(name for name, blocks in spec.within.items() if blocks in failing)}

    def fix(axis: Axis) -> Axis:
        match axis:
            case Group(name, size) if name in gone:
                return Fixed(size)
            case Cat(parts):
                return Cat(tuple(map(fix, parts)))
            case Prod(factors):
                return Prod(tuple(map(fix, factors)))
            case Parted(across, cases):
                return Parted(across, tuple((size, fix(part)) for size, part in cases))
            case _:
                return axis

    pinned = dict(spec.pinned)
    for key, axes in spec.axes.items():
        for dim, axis in enumerate(axes):
            if any(group.name in gone for group in groups_of(axis)):
                pinned[f"{key}[{dim}]"] = "self-check"
    return replace(
        spec,
        axes={key: tuple(map(fix, axes)) for key, axes in spec.axes.items()},
        groups={name: size for name, size in spec.groups.items() if name not in gone},
        within={name: blocks for name, blocks in spec.within.items() if name not in gone},
        pinned=pinned,
    )
