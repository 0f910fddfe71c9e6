"""Traced runs of a model: the terms of the axes of its state dict."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fl_rebasin.symmetry.messages import describe_error, describe_inputs
from fl_rebasin.symmetry.spec import SpecError
from fl_rebasin.symmetry.terms import Term, Unknown, fresh, leaves, pin
from fl_rebasin.symmetry.tracer import ReadTracer, RuleError, Tracer
from fl_rebasin.symmetry.twin import Run, Twin
from fl_rebasin.symmetry.unify import unify_elementwise, unify_unused

UNUSED = "not used in the forward pass"
CONSTANT = "a buffer that no run updates: a constant of the model"

Known: TypeAlias = Mapping[int, tuple[Tensor, tuple[Term, ...]]]
"""The tensors of the state dict, by id, with the terms of their axes."""


@dataclass(frozen=True)
class TraceResult:
    """The outcome of tracing a model.

    Attributes:
        terms: for each key of the state dict the term of each axis.
        runs: the run of each mode (training or not); only one of them if both modes compute the
            same function.
    """

    terms: Mapping[str, tuple[Term, ...]]
    runs: Mapping[bool, Run]


def trace(twin: Twin) -> TraceResult:
    """Run a model in evaluation and in training mode under a `Tracer`.

    Raises:
        SpecError: the model cannot be run on the inputs.
    """
    if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(twin.example_inputs)):
        raise SpecError(
            f"the example inputs {describe_inputs(twin.example_inputs)} have no values: give "
            "inputs on the model's device (on the CPU for a model on the meta device)"
        )
    known = {id(t): (t, fresh(t.shape)) for t in twin.tensors.values()}
    tracers, runs = _run_modes(twin, known)
    used = _used_axes(tracers, known)
    statistics = set[int]().union(*(tracer.statistics for tracer in tracers))
    written = {id(twin.tensors[key]) for run in runs.values() for key in run.written} | statistics
    touched = set[int]().union(*(tracer.touched for tracer in tracers))
    unused = []
    for key, tensor in twin.tensors.items():
        terms = known[id(tensor)][1]
        if id(tensor) not in touched | written:
            for term in terms:
                pin(term, UNUSED)
            if isinstance(tensor, nn.Parameter):
                unused.append(key)
        elif not isinstance(tensor, nn.Parameter) and id(tensor) not in written:
            for dim, term in enumerate(terms):
                # An axis of equal slices may move: nothing changes.
                if not _is_uniform(tensor, dim):
                    pin(term, CONSTANT)
        for leaf in {leaf for term in terms for leaf in leaves(term)} - used:
            pin(leaf, UNUSED)
    if unused:
        warnings.warn(
            f"{len(unused)} parameters are not used on the example inputs ({unused[:3]}) and will "
            "not be permuted: if they matter, give inputs that reach them",
            stacklevel=4,
        )
    return TraceResult({key: known[id(tensor)][1] for key, tensor in twin.tensors.items()}, runs)


def _run_modes(twin: Twin, known: Known) -> tuple[list[Tracer], dict[bool, Run]]:
    """Trace a run in each mode; return all tracers, and the runs that compute other functions."""
    runs: dict[bool, Run] = {}
    tracers: list[Tracer] = []
    for training in (False, True):
        try:
            tracer, run = _traced_run(twin, known, training)
        except (RuleError, SpecError):
            raise
        except Exception as error:  # The forward pass is the user's code.
            if not training:
                raise SpecError(
                    f"the model cannot be run on the example inputs "
                    f"{describe_inputs(twin.example_inputs)}: {describe_error(error)}"
                ) from error
            warnings.warn(
                "the model is traced in evaluation mode only, because it cannot be run in training "
                f"mode on the example inputs: {describe_error(error)}",
                stacklevel=5,
            )
            continue
        # Two modes that compute the same function need one proof.
        if not tracers or tracer.log != tracers[0].log:
            runs[training] = run
        tracers.append(tracer)
    return tracers, runs


def _used_axes(tracers: Sequence[Tracer], known: Known) -> set[Unknown]:
    """Return the axes that operators compute with; unused parts of an axis join a used part.

    A part that is cut off and never used, such as positions beyond the example's length, has the
    same units as the used part.
    """
    computed = [term for tracer in tracers for terms in tracer.computed for term in terms]
    used = {leaf for term in computed for leaf in leaves(term)}
    for _, terms in known.values():
        for term in terms:
            unify_unused(term, used)
    return {leaf for term in computed for leaf in leaves(term)}


def _is_uniform(tensor: Tensor, dim: int) -> bool:
    """Whether all slices of a tensor along an axis are equal."""
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.numel():
        return False
    return torch.equal(tensor, tensor.narrow(dim, 0, 1).expand_as(tensor))


def _traced_run(twin: Twin, known: Known, training: bool) -> tuple[Tracer, Run]:
    """Run once under a tracer; try again with a larger batch or with gradients if needed."""
    tracer, run = _retried(twin, known, training)
    tracer.pin_all(run.outputs, "model output")
    for key, tensor in run.written.items():
        if tensor in tracer:
            # A tensor with which forward replaced a buffer moves as the buffer does.
            buffer = twin.tensors[key]
            if tensor.shape == buffer.shape:
                unify_elementwise(tracer.axes(tensor), tracer.axes(buffer))
            else:
                tracer.pin_all((tensor, buffer), "a buffer whose shape changes")
    return tracer, run


def _retried(twin: Twin, known: Known, training: bool) -> tuple[Tracer, Run]:
    while True:
        try:
            return _attempt(twin, known, training)
        except ValueError:
            if not training or twin.batch > 1:
                raise
            twin.batch = 2  # BatchNorm needs more than one value per channel.
        except RuntimeError as error:
            if twin.gradients or "does not require grad" not in str(error):
                raise
            twin.gradients = True  # The forward pass takes gradients, as for forces.


def _attempt(twin: Twin, known: Known, training: bool) -> tuple[Tracer, Run]:
    tracer = Tracer(known.values())
    inputs: Any = twin.inputs(training)
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, Tensor):
            tracer.assign(tensor, [Unknown(n, "model input") for n in tensor.shape])
    with ReadTracer(tracer):
        return tracer, twin.run(training, inputs, tracer)
