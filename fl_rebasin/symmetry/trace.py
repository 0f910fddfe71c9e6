"""Runs of a model -> equations between the axes of its tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from fl_rebasin.symmetry.rules import RULES, pointwise
from fl_rebasin.symmetry.runtime import in_one_line
from fl_rebasin.symmetry.spec import SpecError
from fl_rebasin.symmetry.twin import Run, Twin
from fl_rebasin.symmetry.unify import (
    Term,
    Unknown,
    fresh,
    leaves,
    limit_to,
    pin,
    same_in_unused,
    unify_places,
)


class RuleError(Exception):
    """A rule of ours failed: not the model's fault."""


@dataclass
class _Seen:
    """What is known of one tensor: its axes, and a number for the log."""

    terms: tuple[Term, ...]
    number: int | str
    constant: bool = False
    computed: bool = False
    telling: list[tuple[Term, str]] = field(default_factory=list)


class Tracer(TorchDispatchMode):
    """Watches the operators of a forward pass and states their equations between axes.

    Attributes:
        layout: sizes, strides and offset that the first argument had before the call.
        touched: tensors of the state that an operator has seen, by their identity.
        statistics: buffers that describe a unit, by their identity.
        computed: axes that went into an operator that is not just a view.
        log: the operators with their arguments, tensors by number: equal logs, equal functions.
    """

    def __init__(self, known: Iterable[tuple[Tensor, tuple[Term, ...]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Tensors are not kept alive: activations would take more memory than the model.
        self._seen = WeakTensorKeyDictionary()
        self._count = 0
        self._state: set[int] = set()
        for tensor, terms in known:
            self._state.add(id(tensor))
            self.assign(tensor, terms)
        self.layout: Any = None
        self.touched: set[int] = set()
        self.statistics: set[int] = set()
        self.computed: list[tuple[Term, ...]] = []
        self.log: list[Any] = []

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._seen

    def _record(self, tensor: Tensor) -> _Seen:
        if tensor not in self._seen:
            terms = [Unknown(n, "constant of the model") for n in tensor.shape]
            self._seen[tensor] = _Seen(tuple(terms), f"constant {id(tensor)}", constant=True)
        record: _Seen = self._seen[tensor]
        return record

    def axes(self, tensor: Tensor) -> tuple[Term, ...]:
        """Return one term an axis of a tensor; one never seen before is a constant and pinned."""
        return self._record(tensor).terms

    def assign(self, tensor: Tensor, terms: Sequence[Term]) -> None:
        """Say what the axes of a new tensor are."""
        assert tuple(term.size for term in terms) == tuple(tensor.shape), (terms, tensor.shape)
        limit_to(terms)
        self._count += 1
        constant = tensor in self._seen and self._seen[tensor].constant
        self._seen[tensor] = _Seen(tuple(terms), self._count, constant)

    def pin_all(self, tensors: Any, reason: str) -> None:
        """Pin every axis of every tensor in a nest of them."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self.use(tensor)
                for term in self.axes(tensor):
                    pin(term, reason)

    def pin_if_used(self, tensor: Tensor, term: Term, reason: str) -> None:
        """Pin an axis as soon as the values of a tensor, which tell its order, are used."""
        self._record(tensor).telling.append((term, reason))

    def mark_statistic(self, tensor: Tensor) -> None:
        """Say that a buffer describes a unit, and moves with it even if no run updates it."""
        self.statistics.add(id(tensor))

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to the model and not to its state or its inputs."""
        return self._record(tensor).constant

    def use(self, tensor: Tensor, by_view: bool = False) -> None:
        """Take note that the values of a tensor, or a view's, are used."""
        record = self._record(tensor)
        for term, reason in record.telling:
            pin(term, reason)
        if id(tensor) in self._state:
            self.touched.add(id(tensor))
        if not by_view and not record.computed:
            record.computed = True
            self.computed.append(record.terms)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # A view's shape can change in place; the axes are those from before the call.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.use(tensor, by_view=func.is_view)
        # A result that is written into a view of another tensor is not followed.
        rule = None if "out" in kwargs else RULES.get(func.overloadpacket.__name__)
        if rule is None and _is_pointwise(func):
            rule = pointwise
        if rule is None and _is_composite(func):
            # In inference mode the operators that others are composed of arrive whole.
            with self:
                return func.decompose(*args, **kwargs)
        self.layout = _layout(args[0]) if args else None
        self.log.append((str(func), tree_map(self._number, (args, kwargs))))
        out = func(*args, **kwargs)
        try:
            if rule is not None and rule(self, func, args, kwargs, out):
                return out
        except Exception as error:
            raise RuleError(f"the rule for {func} failed, which is a bug in it: {error}") from error
        known = "no rule for" if rule is None else "no rule for these arguments of"
        reason = f"{known} {func.overloadpacket}"
        self.pin_all((args, kwargs), reason)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.assign(tensor, [Unknown(n, reason) for n in tensor.shape])
        return out

    def _number(self, leaf: Any) -> Any:
        """Return what stands for an argument in the log."""
        if isinstance(leaf, Tensor):
            return self._record(leaf).number, tuple(leaf.shape)
        return str(leaf)


class _Reads(TorchFunctionMode):
    """Tells a tracer of values that are read without an operator."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self._tracer.use(args[0])
        return func(*args, **(kwargs or {}))


def _layout(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.layout == torch.strided:
        return argument.shape, argument.stride(), argument.storage_offset()
    return None


def _is_pointwise(func: Any) -> bool:
    """Whether PyTorch says so, of the operator or of the one that it does in place."""
    if torch.Tag.pointwise in func.tags:
        return True
    name = func.overloadpacket.__name__
    if not name.endswith("_") or func.namespace != "aten":
        return False
    packet = getattr(torch.ops.aten, name[:-1], None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _is_composite(func: Any) -> bool:
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


@dataclass(frozen=True)
class Trace:
    """What the runs of a model say.

    Attributes:
        terms: for each key of the state dict one term an axis.
        runs: the reference run of each mode (training or not) whose function is one of its own.
    """

    terms: Mapping[str, tuple[Term, ...]]
    runs: Mapping[bool, Run]


def trace(twin: Twin) -> Trace:
    """Run a model in evaluation and in training mode under a `Tracer`.

    Raises:
        SpecError: the model cannot be run on the inputs.
    """
    if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(twin.example_inputs)):
        raise SpecError(
            f"the example inputs {described(twin.example_inputs)} have no values: give some on "
            "the model's device (the CPU for a model on the meta device)"
        )
    known = {id(t): (t, fresh(t.shape)) for t in twin.tensors.values()}
    runs: dict[bool, Run] = {}
    tracers: list[Tracer] = []
    for training in (False, True):
        try:
            tracer, run = _traced(twin, known, training)
        except (RuleError, SpecError):
            raise
        except Exception as error:  # The forward pass is the user's code.
            if not training:
                raise SpecError(
                    f"the model cannot be run on the example inputs "
                    f"{described(twin.example_inputs)}: {_told(error)}"
                ) from error
            warnings.warn(
                "the model is traced in evaluation mode only, it cannot be run for training on "
                f"the example inputs: {_told(error)}",
                stacklevel=4,
            )
            continue
        # Two modes that do the same need one proof.
        if not tracers or tracer.log != tracers[0].log:
            runs[training] = run
        tracers.append(tracer)
    touched = set[int]().union(*(tracer.touched for tracer in tracers))
    statistics = set[int]().union(*(tracer.statistics for tracer in tracers))
    computed = [term for tracer in tracers for terms in tracer.computed for term in terms]
    # What is cut off and never looked at, such as positions beyond the example's length, has the
    # same units as the rest, and stays.
    used = {leaf for term in computed for leaf in leaves(term)}
    for _, terms in known.values():
        for term in terms:
            same_in_unused(term, used)
    used = {leaf for term in computed for leaf in leaves(term)}
    written = {id(twin.tensors[key]) for run in runs.values() for key in run.written} | statistics
    unused = []
    for key, tensor in twin.tensors.items():
        if id(tensor) not in touched | written:
            for term in known[id(tensor)][1]:
                pin(term, "not used in the forward pass")
            if isinstance(tensor, nn.Parameter):
                unused.append(key)
        elif not isinstance(tensor, nn.Parameter) and id(tensor) not in written:
            for dim, term in enumerate(known[id(tensor)][1]):
                # Where all slices are equal nothing happens to it when they change places.
                if not _is_uniform(tensor, dim):
                    pin(term, "a buffer that no run updates: a constant of the model")
        for leaf in {leaf for term in known[id(tensor)][1] for leaf in leaves(term)} - used:
            pin(leaf, "not used in the forward pass")
    if unused:
        warnings.warn(
            f"{len(unused)} parameters are not used on the example inputs ({unused[:3]}): they "
            "stay where they are, so give inputs that reach them if they matter",
            stacklevel=4,
        )
    return Trace({key: known[id(tensor)][1] for key, tensor in twin.tensors.items()}, runs)


def _is_uniform(tensor: Tensor, dim: int) -> bool:
    """Whether all slices of a tensor along an axis are equal."""
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.numel():
        return False
    return torch.equal(tensor, tensor.narrow(dim, 0, 1).expand_as(tensor))


def _traced(
    twin: Twin, known: Mapping[int, tuple[Tensor, tuple[Term, ...]]], training: bool
) -> tuple[Tracer, Run]:
    """Run once under a tracer; for training, once more with a larger batch if one is too small."""

    def attempt() -> tuple[Tracer, Run]:
        tracer = Tracer(known.values())
        inputs = twin.inputs(training)
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                tracer.assign(tensor, [Unknown(n, "model input") for n in tensor.shape])
        with _Reads(tracer):
            return tracer, twin.run(training, inputs, tracer)

    while True:
        try:
            tracer, run = attempt()
            break
        except ValueError:
            if not training or twin.batch > 1:
                raise
            twin.batch = 2  # BatchNorm asks for more than one value a channel.
        except RuntimeError as error:
            if twin.gradients or "does not require grad" not in str(error):
                raise
            twin.gradients = True  # Forces, or gradient penalties.
    tracer.pin_all(run.outputs, "model output")
    for key, tensor in run.written.items():
        if tensor in tracer:
            # A tensor that forward put into a buffer's place moves as the buffer does.
            kept = tracer.axes(twin.tensors[key])
            if tensor.shape == twin.tensors[key].shape:
                unify_places(tracer.axes(tensor), kept)
            else:
                tracer.pin_all((tensor, twin.tensors[key]), "a buffer whose shape changes")
    return tracer, run


def described(inputs: Any) -> str:
    """Return the shapes, dtypes and devices of example inputs in words."""
    shown = tree_map(
        lambda leaf: (
            f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')} on {leaf.device}"
            if isinstance(leaf, Tensor)
            else leaf
        ),
        dict(inputs) if isinstance(inputs, Mapping) else inputs,
    )
    return in_one_line(shown, 200)


def _told(error: Exception) -> str:
    """Return an exception in one line."""
    return f"{type(error).__name__}: {in_one_line(error)}".removesuffix(": ")
