"""Module and example inputs -> permutation spec, by running the module and watching."""

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
from fl_rebasin.symmetry.readoff import read_off
from fl_rebasin.symmetry.runtime import SINGLE
from fl_rebasin.symmetry.selfcheck import SINGLE_TOLERANCE, TOLERANCE, SelfCheck
from fl_rebasin.symmetry.spec import PermutationSpec, SpecError
from fl_rebasin.symmetry.trace import trace
from fl_rebasin.symmetry.twin import Twin, check_model

ExampleInputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]


def derive_spec(model: nn.Module, example_inputs: ExampleInputs) -> PermutationSpec:
    """Find out by a traced run which axes of a model may be permuted, and prove it.

    The model is run on a copy of itself; its parameters and buffers do not change. An axis may
    move only if every operator that it passes through has a rule for it; anything else is pinned,
    and so is a parameter that the example inputs do not reach. At the end random permutations are
    applied in float64, in training and evaluation mode: outputs and buffers must stay the same.
    Groups that fail are pinned, and a warning names them.

    The spec holds for the path that the model takes on the example inputs: a model that branches
    on its inputs needs examples that take the branch with all its parameters.

    Args:
        model: any module whose forward pass runs on `example_inputs`.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword
            arguments; floats that are all equal are replaced by random ones, others are kept.

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
        stack.enter_context(_untouched(model))
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
            f"the model cannot run in float64 ({failure.__cause__}): it is checked in float32, to "
            f"a relative error of {tolerance:.0e}",
            stacklevel=3,
        )
        twin = Twin(model, example_inputs, SINGLE)
        traced = trace(twin)
    spec = read_off(traced.terms, _learnable(twin))
    spec = replace(spec, fingerprint=fingerprint(model))
    proof = SelfCheck(twin, traced.runs, tolerance)
    for _ in range(3):
        error, draw = proof.check(spec)
        if draw is None:
            return spec
        if not proof.is_repeatable(spec):
            raise SpecError(
                "the model's outputs are NaN, or differ between two equal runs: make its forward "
                "pass repeatable under torch.manual_seed and finite on the example inputs (floats "
                "that are all equal are replaced by standard normal ones), or trace a part of it"
            )
        guilty = proof.guilty(spec, draw)
        warnings.warn(
            f"the self-check pins the groups {guilty}: relative error {error:.1e}", stacklevel=3
        )
        spec = without(spec, guilty)
    raise SpecError("the self-check still fails after its guilty groups were pinned")


def _lacks_double(error: BaseException | None) -> bool:
    """Whether an operator says that it is not there in double precision."""
    words = ("'Double'", "float64", "torch.double")
    return isinstance(error, (RuntimeError, TypeError)) and any(w in str(error) for w in words)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Give the model's buffers back as they were, and raise if the copy has written to it.

    A function that the model holds may refer to the model itself, where copying does not reach.
    """
    versions = {name: parameter._version for name, parameter in model.named_parameters()
                if not parameter.is_inference()}  # fmt: skip
    buffers = {
        name: (buffer, buffer.clone())
        for name, buffer in model.named_buffers()
        if buffer.layout == torch.strided and not buffer.is_quantized and not buffer.is_meta
    }
    try:
        yield
    finally:
        odd = [
            name
            for name, parameter in model.named_parameters()
            if name in versions and parameter._version != versions[name]
        ]
        for name, (buffer, before) in buffers.items():
            if not torch.equal(buffer, before):
                odd.append(name)
                with torch.no_grad():
                    buffer.copy_(before)
        if odd:
            raise SpecError(
                f"running a copy of the model changes the model's own {odd[:3]}: let forward use "
                "submodules as attributes, not functions that refer to them"
            )


def _learnable(twin: Twin) -> tuple[str, ...]:
    """Return the keys of the parameters, a tied one once."""
    seen: dict[int, str] = {}
    for key, tensor in twin.tensors.items():
        if isinstance(tensor, nn.Parameter):
            seen.setdefault(id(tensor), key)
    return tuple(seen.values())


def without(spec: PermutationSpec, guilty: Sequence[str]) -> PermutationSpec:
    """Return the spec with some groups pinned, and what lies within their units."""
    gone = {*guilty, *(name for name, blocks in spec.within.items() if blocks in guilty)}

    def close(axis: Axis) -> Axis:
        match axis:
            case Group(name, size) if name in gone:
                return Fixed(size)
            case Cat(parts):
                return Cat(tuple(map(close, parts)))
            case Prod(factors):
                return Prod(tuple(map(close, factors)))
            case Parted(across, cases):
                return Parted(across, tuple((size, close(part)) for size, part in cases))
            case _:
                return axis

    pinned = dict(spec.pinned)
    for key, axes in spec.axes.items():
        for dim, axis in enumerate(axes):
            if any(group.name in gone for group in groups_of(axis)):
                pinned[f"{key}[{dim}]"] = "self-check"
    return replace(
        spec,
        axes={key: tuple(map(close, axes)) for key, axes in spec.axes.items()},
        groups={name: size for name, size in spec.groups.items() if name not in gone},
        within={name: blocks for name, blocks in spec.within.items() if name not in gone},
        pinned=pinned,
    )
