"""The twin: a private double-precision copy of a model that starts each run from equal values.

The model itself is not changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fl_rebasin.forward import call
from fl_rebasin.symmetry.axes import Axis, groups_of
from fl_rebasin.symmetry.messages import in_one_line
from fl_rebasin.symmetry.precise import (
    DOUBLE,
    Precise,
    Wide,
    fixed_seeds,
    output_tensors,
    plain_kernels,
    random_inputs,
    widened,
)
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec, SpecError
from fl_rebasin.symmetry.start_values import StartValues, has_rows


def check_model(model: nn.Module) -> None:
    """Raise `SpecError` for a model with tensors that cannot be averaged, or for a script."""
    named = dict(model.named_parameters()) | {
        name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)
    }
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise SpecError(
                f"{name or 'the model'} is a script: give the module as it was before "
                "torch.jit.script or torch.jit.trace"
            )
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise SpecError(f"{name} is not initialised: run the lazy model once first")
        if tensor.is_complex():
            raise SpecError(f"{name} is complex: only real parameters can be matched")
        if tensor.is_quantized:
            raise SpecError(f"{name} is quantised: give the model as it was before quantisation")
        if tensor.layout != torch.strided:
            raise SpecError(
                f"{name} is sparse: pass it as an input, or register it as a buffer with "
                "persistent=False, so that the state dict does not hold it"
            )


@dataclass(frozen=True)
class Run:
    """The outputs of a run, and the buffers and parameters that it wrote, by key."""

    outputs: list[Tensor]
    written: dict[str, Tensor]


class Twin:
    """A private copy of a model in wide dtypes, which `run` runs from the same start each time.

    Args:
        model: any module; not changed.
        example_inputs: a tensor, a tuple or a mapping. Float tensors with equal values are replaced
            by random ones; everything else is kept.
        wide: the dtype in which to compute each dtype.

    Attributes:
        module: the copy.
        tensors: for each key of the state dict the copy's own tensor.
        batch: minimum batch size of runs in training mode.
        gradients: whether runs record gradients, which few forward passes need.

    Raises:
        SpecError: the model cannot be copied, or its state dict holds anything but tensors.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, wide: Wide = DOUBLE) -> None:
        self._wide = wide
        self.example_inputs = example_inputs
        self.batch = 1
        self.gradients = False
        self._permutation: Permutation | None = None
        originals = list(dict.fromkeys([*model.parameters(), *model.buffers()]))
        self._start_values = StartValues(originals)
        copies = self._copies(originals)
        self.module = _copied_module(model, originals, copies, wide)
        # All tensors, including those outside the state dict; a tied one once.
        numbers = {id(copied): number for number, copied in enumerate(copies)}
        held = [*self.module.parameters(), *self.module.buffers()]
        self._held = {id(t): (numbers[id(t)], t) for t in held if id(t) in numbers}
        self._versions = {identity: tensor._version for identity, (_, tensor) in self._held.items()}
        self._samples = {identity: _sample(tensor) for identity, (_, tensor) in self._held.items()}
        # BatchNorm's operator does not count its writes as versions, so buffers are compared.
        self._starts = {
            identity: tensor.clone()
            for identity, (_, tensor) in self._held.items()
            if not isinstance(tensor, nn.Parameter)
        }
        self.tensors = self._state()
        self._axes: dict[int, tuple[Axis, ...]] = {}
        self._devices = {tensor.device for tensor in self.tensors.values()}

    def _copies(self, originals: list[Tensor]) -> list[Tensor]:
        """Return copies of the model's tensors with their start values."""
        copies = []
        for number, tensor in enumerate(originals):
            copied = _empty_like(tensor, self._wide)
            self._start_values.write(number, copied)
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
            copies.append(copied)
        return copies

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors of the state dict, each the object that the module holds."""
        named: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        named |= dict(self.module.named_buffers(remove_duplicate=False))
        state = {}
        for key, value in self.module.state_dict().items():
            if not isinstance(value, Tensor):
                raise SpecError(
                    f"{key} in the state dict is a {type(value).__name__}, not a tensor: only "
                    "tensors can be merged"
                )
            state[key] = named.get(key, value)
        return state

    def permute(self, spec: PermutationSpec, permutation: Permutation) -> None:
        """Start each of the following runs from permuted values."""
        self._permutation = permutation
        self._axes = {id(tensor): spec.axes[key] for key, tensor in self.tensors.items()}
        for identity in self._held:
            if any(True for axis in self._axes.get(identity, ()) for _ in groups_of(axis)):
                self._restore(identity)

    def _restore(self, identity: int) -> None:
        """Write the start value of a tensor."""
        number, tensor = self._held[identity]
        indices = None if self._permutation is None else self._permutation.indices
        with torch.no_grad():
            self._start_values.write(number, tensor, self._axes.get(identity), indices)
        self._versions[identity] = tensor._version
        self._samples[identity] = _sample(tensor)
        if identity in self._starts:
            self._starts[identity] = tensor.clone()

    def inputs(self, training: bool) -> Any:
        """Return the inputs of a run; in training mode a batch of at least `batch` samples."""
        return random_inputs(self.example_inputs, self.batch if training else 1, self._wide)

    def run(self, training: bool, inputs: Any = None, tracer: Any = None) -> Run:
        """Run the copy from its start values.

        Args:
            training: mode of the module.
            inputs: the inputs, by default `self.inputs(training)`.
            tracer: a dispatch mode that sees every operator.
        """
        self.module.train(training)
        inputs = self.inputs(training) if inputs is None else inputs
        try:
            with _attributes_restored(self.module):
                with (
                    torch.set_grad_enabled(self.gradients),
                    fixed_seeds(self._devices),
                    plain_kernels(),
                    Precise(self._wide),
                    tracer or nullcontext(),
                ):
                    outputs = call(self.module, inputs)
                return Run(output_tensors(outputs), self._written())
        finally:
            for identity, (_, tensor) in self._held.items():
                tensor.grad = None
                if self._is_written(identity):
                    self._restore(identity)

    def _written(self) -> dict[str, Tensor]:
        """Return the tensors of the state dict that a run has written or replaced."""
        written = {}
        found = self._state()
        if odd := sorted(found.keys() ^ self.tensors.keys()):
            raise SpecError(
                f"the keys of the state dict change when the model runs ({odd[:3]}): run it once "
                "first, or register everything in its constructor"
            )
        for key, tensor in found.items():
            if tensor is not self.tensors[key]:
                written[key] = tensor  # forward has replaced the buffer by another tensor.
            elif id(tensor) in self._held and self._is_written(id(tensor)):
                written[key] = tensor.detach().clone()
        return written

    def _is_written(self, identity: int) -> bool:
        """Whether a run has changed the values of a tensor."""
        tensor = self._held[identity][1]
        if identity in self._starts:
            start = self._starts[identity]
            if tensor.layout != torch.strided or tensor.is_quantized:
                return tensor._version != self._versions[identity]
            return start.shape != tensor.shape or not torch.equal(start, tensor)
        if tensor._version != self._versions[identity]:
            return True
        # Writes to `parameter.data` do not change the version.
        return not torch.equal(self._samples[identity], _sample(tensor))


def _copied_module(
    model: nn.Module, originals: list[Tensor], copies: list[Tensor], wide: Wide
) -> nn.Module:
    """Return a deep copy of a model that holds the given copies of its tensors."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):  # Not a leaf: the weight of the older weight_norm.
                memo[id(value)] = widened(value.detach().clone(), wide)
    for tensor, copied in zip(originals, copies, strict=True):
        memo[id(tensor)] = copied
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # The copy runs the user's code.
        raise SpecError(f"the model cannot be copied: {in_one_line(error)}") from error


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Restore what a forward pass stores on modules: counters, caches, replaced buffers."""
    before = [
        (module, dict(vars(module)), dict(module._buffers), dict(module._parameters))
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, buffers, parameters in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._parameters.clear()
            module._parameters.update(parameters)


def _sample(tensor: Tensor) -> Tensor:
    """Return a few values of a tensor, by which to notice that it has changed."""
    if not has_rows(tensor):
        return torch.zeros(0)
    rows = tensor.detach()[:: max(1, len(tensor) // 8)].flatten(1 if tensor.ndim > 1 else 0)
    if tensor.ndim > 1:
        rows = rows[:, :: max(1, rows.shape[1] // 8)]
    return rows.clone()


def _empty_like(tensor: Tensor, wide: Wide) -> Tensor:
    """Return zeros in a wide dtype; a copy of the values if the tensor is sparse or quantised."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return widened(tensor.detach().clone(), wide)  # type: ignore[no-any-return]
    device = "cpu" if tensor.is_meta else tensor.device
    return torch.zeros(tensor.shape, dtype=wide.get(tensor.dtype, tensor.dtype), device=device)
