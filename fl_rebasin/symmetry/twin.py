"""A private copy of a model, in wide dtypes, that can be run again and again alike.

Fresh models hold ones and zeros (norms, biases), under which a wrong axis goes unseen: the copy's
values differ from unit to unit. The model itself is not touched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fl_rebasin.forward import call
from fl_rebasin.symmetry.axes import Axis, Fixed, Parted, axis_index, groups_of, move_tensor
from fl_rebasin.symmetry.runtime import (
    DOUBLE,
    Precise,
    Wide,
    fixed_chance,
    in_one_line,
    output_tensors,
    plain_kernels,
    random_inputs,
    widened,
)
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec, SpecError

_PART = 1 << 22
"""Values that are moved at a time, so that no tensor is there twice."""
_FRESH = 0.15
"""Scale of the noise for gains and biases that are all alike."""


class Noise:
    """Standard normal numbers from a table: the same for the same place, and cheap.

    The length of the table is a prime, so that rows of a matrix differ.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._table = torch.randn(65_537, generator=generator)

    def rows(self, rows: Tensor, width: int, start: int) -> Tensor:
        """Return the numbers for some rows of a matrix: shape `(len(rows), width)`, float32."""
        length = len(self._table)
        table = self._table.repeat(1 + -(-width // length))
        windows = table.as_strided((length, width), (1, 1))
        return windows.index_select(0, (rows * width + start) % length)


def check_model(model: nn.Module) -> None:
    """Raise `SpecError` for tensors that have no place in an average."""
    named = dict(model.named_parameters()) | {
        name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)
    }
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise SpecError(
                f"{name or 'the model'} is a script: give the module before torch.jit.script or "
                "torch.jit.trace"
            )
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise SpecError(f"{name} is not initialised: run the lazy model once before")
        if tensor.is_complex():
            raise SpecError(f"{name} is complex: only real parameters can be matched")
        if tensor.is_quantized:
            raise SpecError(f"{name} is quantised: give the model before it is quantised")
        if tensor.layout != torch.strided:
            raise SpecError(
                f"{name} is sparse: keep it out of the state dict, as an input or as a buffer with "
                "persistent=False"
            )


@dataclass(frozen=True)
class Run:
    """What a run gave: outputs, and buffers and parameters that it wrote, by key."""

    outputs: list[Tensor]
    written: dict[str, Tensor]


class Twin:
    """The copy of a model, and its runs.

    Args:
        model: any module; not changed.
        example_inputs: a tensor, a tuple or a mapping that it runs on; floats that are all equal
            are replaced by random ones, everything else is kept.
        wide: what each dtype is computed in.

    Attributes:
        module: the copy.
        tensors: for each key of the state dict the copy's own tensor.
        batch: least batch size of runs for training.
        gradients: whether runs record gradients, which few forward passes need.

    Raises:
        SpecError: the model holds tensors that cannot be averaged, or cannot be copied.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, wide: Wide = DOUBLE) -> None:
        self._wide = wide
        self.example_inputs = example_inputs
        self.batch = 1
        self.gradients = False
        self._noise = Noise(seed=1)
        self._scales: dict[int, float] = {}
        self._permutation: Permutation | None = None
        self._originals = dict(enumerate(dict.fromkeys([*model.parameters(), *model.buffers()])))
        memo: dict[int, Any] = {}
        for module in model.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor):  # Such as the older weight_norm's, not a leaf.
                    memo[id(value)] = widened(value.detach().clone(), wide)
        for number, tensor in self._originals.items():
            copied = _empty_like(tensor, wide)
            self._write(number, copied)
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = copied
        numbers = {id(memo[id(tensor)]): number for number, tensor in self._originals.items()}
        try:
            self.module: nn.Module = copy.deepcopy(model, memo)
        except Exception as error:  # The copy runs the user's code.
            raise SpecError(f"the model cannot be copied: {in_one_line(error)}") from error
        # All tensors, also those that are not in the state dict, a tied one once.
        held = [*self.module.parameters(), *self.module.buffers()]
        self._held = {id(t): (numbers[id(t)], t) for t in held if id(t) in numbers}
        self._versions = {name: tensor._version for name, (_, tensor) in self._held.items()}
        self._samples = {name: _sample(tensor) for name, (_, tensor) in self._held.items()}
        # BatchNorm's operator writes without counting it, so buffers are compared.
        self._starts = {
            name: tensor.clone()
            for name, (_, tensor) in self._held.items()
            if not isinstance(tensor, nn.Parameter)
        }
        self.tensors = self._state()
        self._axes: dict[int, tuple[Axis, ...]] = {}
        self._devices = {tensor.device for tensor in self.tensors.values()}

    def _lively(self, number: int, rows: Tensor) -> Tensor:
        """Return some rows of a parameter's or buffer's value, not yet in a wide dtype."""
        tensor = self._originals[number].detach()
        if tensor.is_meta:
            value = torch.zeros(len(rows), *tensor.shape[1:], dtype=tensor.dtype)
        else:
            value = tensor.index_select(0, rows.to(tensor.device))
        if not value.is_floating_point():
            return value
        if value.itemsize < 4:
            value = value.float()
        if number not in self._scales:
            self._scales[number] = self._scale(number)
        if scale := self._scales[number]:
            noise = self._noise.rows(rows, math.prod(tensor.shape[1:]), number)
            noise = noise.reshape(value.shape)
            if not isinstance(self._originals[number], nn.Parameter):
                noise = torch.special.ndtr(noise)  # Variances must stay positive.
            value += scale * noise.to(value)
        return value

    def _scale(self, number: int) -> float:
        """Return the scale of the noise that makes a tensor's values differ from unit to unit."""
        tensor = self._originals[number]
        sample = torch.zeros(2)
        if not tensor.is_meta:
            sample = tensor.detach().reshape(len(tensor), -1)[:: max(1, len(tensor) // 64)]
            sample = sample.flatten()[:: max(1, sample.numel() // 4096)].double()
        spread = float(sample.std()) if len(sample) > 1 else 0.0
        if not isinstance(tensor, nn.Parameter):
            # Statistics that have not been estimated yet.
            return 0.0 if spread else 0.3
        fan_in = tensor.numel() / len(tensor)
        return 0.3 * spread or (_FRESH if tensor.ndim == 1 else fan_in**-0.5)

    def _write(self, number: int, copied: Tensor, axes: Sequence[Axis] | None = None) -> None:
        """Write a tensor's start, permuted if axes are given, into the copy, part by part."""
        original = self._originals[number].detach()
        if not _is_plain(copied):
            if original.is_meta:
                copied.zero_()
            elif copied.layout == torch.strided and not copied.is_quantized:
                copied.copy_(original)
            if copied.ndim == 0 and isinstance(self._originals[number], nn.Parameter):
                copied += _FRESH  # A gain of zero would hide what it multiplies.
            return
        moves = {} if axes is None or self._permutation is None else self._permutation.indices
        axes = axes or [Fixed(size) for size in copied.shape]
        if any(isinstance(axis, Parted) or g.within for axis in axes for g in groups_of(axis)):
            # An axis may depend on another one: all at once.
            value = self._lively(number, torch.arange(len(copied)))
            copied.copy_(move_tensor(value, axes, moves))
            return
        rows = axis_index(axes[0], moves)
        start = 0
        for some in rows.split(max(1, _PART // copied[0].numel())):
            value = self._lively(number, some)
            copied[start : start + len(some)] = move_tensor(
                value, (Fixed(len(some)), *axes[1:]), moves
            )
            start += len(some)

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors of the state dict, each the very object that the module holds."""
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
        """Hold the permuted start from now on."""
        self._permutation = permutation
        self._axes = {id(tensor): spec.axes[key] for key, tensor in self.tensors.items()}
        for name in self._held:
            if any(True for axis in self._axes.get(name, ()) for _ in groups_of(axis)):
                self._restore(name)

    def _restore(self, name: int) -> None:
        number, tensor = self._held[name]
        with torch.no_grad():
            self._write(number, tensor, self._axes.get(name))
        self._versions[name] = tensor._version
        self._samples[name] = _sample(tensor)
        if name in self._starts:
            self._starts[name] = tensor.clone()

    def inputs(self, training: bool) -> Any:
        """Return the inputs of a run: a batch of two or more where training needs it."""
        return random_inputs(self.example_inputs, self.batch if training else 1, self._wide)

    def run(self, training: bool, inputs: Any = None, watch: Any = None) -> Run:
        """Run the copy from its start.

        Args:
            training: mode of the module.
            inputs: what to run on, by default `self.inputs(training)`.
            watch: a dispatch mode that sees every operator.
        """
        self.module.train(training)
        inputs = self.inputs(training) if inputs is None else inputs
        # What forward keeps on its modules (counters, caches, replaced buffers) is not the model.
        kept = [
            (module, dict(vars(module)), dict(module._buffers), dict(module._parameters))
            for module in self.module.modules()
        ]
        try:
            with (
                torch.set_grad_enabled(self.gradients),
                fixed_chance(self._devices),
                plain_kernels(),
                Precise(self._wide),
                watch or nullcontext(),
            ):
                outputs = call(self.module, inputs)
            return Run(output_tensors(outputs), self._written())
        finally:
            for module, attributes, buffers, parameters in kept:
                vars(module).clear()
                vars(module).update(attributes)
                for holder, entries in (
                    (module._buffers, buffers),
                    (module._parameters, parameters),
                ):
                    holder.clear()
                    holder.update(entries)  # type: ignore[arg-type]
            for name, (_, tensor) in self._held.items():
                tensor.grad = None
                if self._is_written(name):
                    self._restore(name)

    def _written(self) -> dict[str, Tensor]:
        """Return what a run has left in the state dict in place of the start."""
        written = {}
        found = self._state()
        if odd := sorted(found.keys() ^ self.tensors.keys()):
            raise SpecError(
                f"the keys of the state dict change when the model runs ({odd[:3]}): run it once "
                "before, or register everything in its constructor"
            )
        for key, tensor in found.items():
            if tensor is not self.tensors[key]:
                written[key] = tensor  # forward has put another tensor into the buffer's place.
            elif id(tensor) in self._held and self._is_written(id(tensor)):
                written[key] = tensor.detach().clone()
        return written

    def _is_written(self, name: int) -> bool:
        tensor = self._held[name][1]
        if name in self._starts:
            start = self._starts[name]
            if tensor.layout != torch.strided or tensor.is_quantized:
                return tensor._version != self._versions[name]
            return start.shape != tensor.shape or not torch.equal(start, tensor)
        if tensor._version != self._versions[name]:
            return True
        # What is done to `parameter.data` is not counted.
        return not torch.equal(self._samples[name], _sample(tensor))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has rows that can be written one by one."""
    strided = tensor.layout == torch.strided and not tensor.is_quantized
    return strided and tensor.ndim > 0 and tensor.numel() > 0


def _sample(tensor: Tensor) -> Tensor:
    """Return some values of a tensor."""
    if not _is_plain(tensor):
        return torch.zeros(0)
    rows = tensor.detach()[:: max(1, len(tensor) // 8)].flatten(1 if tensor.ndim > 1 else 0)
    if tensor.ndim > 1:
        rows = rows[:, :: max(1, rows.shape[1] // 8)]
    return rows.clone()


def _empty_like(tensor: Tensor, wide: Wide) -> Tensor:
    """Return a tensor for the copy, of which only a special one holds values already."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return widened(tensor.detach().clone(), wide)  # type: ignore[no-any-return]
    device = "cpu" if tensor.is_meta else tensor.device
    return torch.zeros(tensor.shape, dtype=wide.get(tensor.dtype, tensor.dtype), device=device)
