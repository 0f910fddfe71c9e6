"""Module and example inputs -> permutation spec, by running the module once and watching."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fl_rebasin.rules import RULES, pointwise
from fl_rebasin.selfcheck import CheckFailedError, SelfCheck, output_tensors, random_inputs
from fl_rebasin.spec import Axis, Cat, Fixed, Group, PermutationSpec, Prod, SpecError, groups_of
from fl_rebasin.unify import Join, Product, Term, Unknown, pin, resolve

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


class RuleError(Exception):
    """A rule of ours failed: not the model's fault."""


class Tracer(TorchDispatchMode):
    """Watches the operators of a forward pass and states their equations between axes.

    `axes` returns (and, for a tensor never seen before, pins) the axes of a tensor.
    """

    def __init__(self, known: Iterable[tuple[Tensor, tuple[Term, ...]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes: dict[int, tuple[Tensor, tuple[Term, ...]]] = {
            id(tensor): (tensor, terms) for tensor, terms in known
        }
        self.touched: set[int] = set()

    def axes(self, tensor: Tensor) -> tuple[Term, ...]:
        """Return one term an axis of a tensor."""
        if id(tensor) not in self._axes:
            self.assign(tensor, [Unknown(n, "constant of the model") for n in tensor.shape])
        return self._axes[id(tensor)][1]

    def assign(self, tensor: Tensor, terms: Sequence[Term]) -> None:
        """Say what the axes of a new tensor are."""
        assert tuple(term.size for term in terms) == tuple(tensor.shape), (terms, tensor.shape)
        # The tensor is kept alive, since its id is the key.
        self._axes[id(tensor)] = (tensor, tuple(terms))

    def pin_all(self, tensors: Any, reason: str) -> None:
        """Pin every axis of every tensor in a nest of them."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                for term in self.axes(tensor):
                    pin(term, reason)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # A view's shape can change in place; the axes are those from before the call.
        before = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in before:
            self.axes(tensor)
            self.touched.add(id(tensor))
        out = func(*args, **kwargs)
        rule = RULES.get(func.overloadpacket.__name__)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        try:
            if rule is not None and rule(self, func, args, kwargs, out):
                return out
        except Exception as error:
            raise RuleError(f"the rule for {func} failed, which is a bug in it: {error}") from error
        reason = f"no rule for {func.overloadpacket}"
        self.pin_all((args, kwargs), reason)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.assign(tensor, [Unknown(n, reason) for n in tensor.shape])
        return out


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


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
            arguments; floats are replaced by random ones, integers are kept.

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
    _check_parameters(model)
    spec = _trace(model, example_inputs)
    proof = SelfCheck(model, example_inputs, call)
    for _ in range(3):
        try:
            proof.check(spec)
            return spec
        except CheckFailedError as failure:
            if not proof.is_repeatable(spec):
                raise SpecError(
                    "the model's outputs on random inputs are NaN, or differ between two equal "
                    "runs: make its forward pass repeatable under torch.manual_seed and finite "
                    "on standard normal inputs, or trace a part of it"
                ) from None
            guilty = proof.guilty(spec)
            if not guilty:
                raise SpecError(
                    f"permuting several groups at once changes this model's function: {failure}"
                ) from None
            warnings.warn(f"the self-check pins the groups {guilty}: {failure}", stacklevel=2)
            spec = _without(spec, guilty)
    raise SpecError("the self-check still fails after its guilty groups were pinned")


def _check_parameters(model: nn.Module) -> None:
    """Raise `SpecError` for tensors that have no place in an average."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise SpecError(f"{name} is not initialised: run the lazy model once before")
        if tensor.is_complex():
            raise SpecError(f"{name} is complex: only real parameters can be matched")


def _trace(model: nn.Module, example_inputs: ExampleInputs) -> PermutationSpec:
    """Run the model under a `Tracer` and read the spec off the solved equations."""
    try:
        twin = copy.deepcopy(model).float()
    except RuntimeError as error:
        raise SpecError(
            f"the model cannot be copied ({error}): give one that has not run yet, and use "
            "torch.nn.utils.parametrizations rather than the older weight_norm"
        ) from error
    named: dict[str, Tensor] = dict(twin.named_parameters(remove_duplicate=False))
    named |= dict(twin.named_buffers(remove_duplicate=False))
    stored = {}
    for key, value in twin.state_dict().items():
        if not isinstance(value, Tensor):
            raise SpecError(f"{key} in the state dict is a {type(value).__name__}, not a tensor")
        stored[key] = named.get(key, value)
    unknowns = {
        id(tensor): (tensor, tuple(Unknown(n) for n in tensor.shape)) for tensor in stored.values()
    }
    used: set[int] = set()
    for training in (False, True):
        twin.train(training)
        inputs = random_inputs(example_inputs, torch.float32, batch=2 if training else 1)
        tracer = Tracer(unknowns.values())
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                tracer.assign(tensor, [Unknown(n, "model input") for n in tensor.shape])
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), tracer:
                torch.default_generator.manual_seed(0)
                outputs = call(twin, inputs)
        except RuleError:
            raise
        except Exception as error:  # The forward pass is the user's code.
            if training:
                warnings.warn(
                    "the model is traced in evaluation mode only, it cannot be run for training "
                    f"on the example inputs: {error}",
                    stacklevel=3,
                )
                continue
            raise SpecError(
                f"the model cannot be run on the example inputs {describe_inputs(example_inputs)}:"
                f" {error}"
            ) from error
        tracer.pin_all(output_tensors(outputs), "model output")
        used |= tracer.touched
    unused = []
    for key, tensor in stored.items():
        if id(tensor) not in used:
            for term in unknowns[id(tensor)][1]:
                pin(term, "not used in the forward pass")
            if isinstance(tensor, nn.Parameter):
                unused.append(key)
    if unused:
        warnings.warn(
            f"{len(unused)} parameters are not used on the example inputs ({unused[:3]}): they "
            "stay where they are, so give inputs that reach them if they matter",
            stacklevel=3,
        )
    parameters = {id(p): None for p in twin.parameters()}
    learnable, seen = [], set()
    for key, tensor in stored.items():
        if id(tensor) in parameters and id(tensor) not in seen:
            seen.add(id(tensor))
            learnable.append(key)
    return _read_off(
        {key: unknowns[id(tensor)][1] for key, tensor in stored.items()}, tuple(learnable)
    )


def describe_inputs(inputs: Any) -> str:
    """Return the shapes and dtypes of example inputs in words."""
    shown = tree_map(
        lambda leaf: f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else leaf,
        dict(inputs) if isinstance(inputs, Mapping) else inputs,
    )
    return str(shown)


def _read_off(terms: Mapping[str, tuple[Term, ...]], learnable: tuple[str, ...]) -> PermutationSpec:
    """Turn solved unknowns into named groups."""
    names: dict[int, Group] = {}
    taken: set[str] = set()
    pinned: dict[str, str] = {}

    def axis(term: Term, key: str, dim: int) -> Axis:
        match resolve(term):
            case Unknown(size=size, reason=str(reason)):
                pinned.setdefault(f"{key}[{dim}]", reason)
                return Fixed(size)
            case Unknown() as unknown:
                if id(unknown) not in names:
                    stem = key.rpartition(".")[0] or key
                    name, count = stem, 1
                    while name in taken:
                        count += 1
                        name = f"{stem}#{count}"
                    taken.add(name)
                    names[id(unknown)] = Group(name, unknown.size)
                return names[id(unknown)]
            case Join(parts):
                return Cat(tuple(axis(part, key, dim) for part in parts))
            case Product(factors):
                if not factors:
                    return Fixed(1)
                return Prod(tuple(axis(part, key, dim) for part in factors))
        raise AssertionError(term)

    # A group takes its name from the layer that puts it out, so first axes are named first.
    for key, each in terms.items():
        if each:
            axis(each[0], key, 0)
    axes = {
        key: tuple(axis(term, key, dim) for dim, term in enumerate(each))
        for key, each in terms.items()
    }
    groups = {group.name: group.size for group in names.values()}
    return PermutationSpec(axes, groups, pinned, learnable)


def _without(spec: PermutationSpec, guilty: Sequence[str]) -> PermutationSpec:
    """Return the spec with some groups pinned."""

    def close(axis: Axis) -> Axis:
        match axis:
            case Group(name, size) if name in guilty:
                return Fixed(size)
            case Cat(parts):
                return Cat(tuple(map(close, parts)))
            case Prod(factors):
                return Prod(tuple(map(close, factors)))
            case _:
                return axis

    pinned = dict(spec.pinned)
    for key, axes in spec.axes.items():
        for dim, axis in enumerate(axes):
            if any(group.name in guilty for group in groups_of(axis)):
                pinned[f"{key}[{dim}]"] = "self-check"
    return replace(
        spec,
        axes={key: tuple(map(close, axes)) for key, axes in spec.axes.items()},
        groups={name: size for name, size in spec.groups.items() if name not in guilty},
        pinned=pinned,
    )
