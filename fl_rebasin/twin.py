"""A private copy of a model, in double precision, that can be run again and again alike.

Fresh models hold ones and zeros (norms, biases), under which a wrong axis goes unseen: the copy's
values differ from unit to unit. The model itself is not touched.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fl_rebasin.axes import Axis, Fixed, Parted, axis_index, groups_of, move_tensor
from fl_rebasin.spec import Permutation, PermutationSpec, SpecError

_PART = 1 << 22
"""Values that are moved at a time, so that no tensor is there twice."""

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


class Double(TorchDispatchMode):
    """Computes everything in double precision, casts included, and without chance.

    Dropout's masks, drawn place by place, are no function of the units: they become 1 - p.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "bernoulli_":
            # The operator leaves its default out of the arguments.
            chance = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return args[0].copy_(torch.as_tensor(chance))
        if kwargs.get("dtype") in _WIDE:
            kwargs = {**kwargs, "dtype": _WIDE[kwargs["dtype"]]}
        if any(leaf.dtype in _WIDE for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)):
            args, kwargs = tree_map(widened, (args, kwargs))
        out = func(*args, **kwargs)
        if any(leaf.dtype in _WIDE for leaf in tree_leaves(out) if _is_tensor(leaf)):
            out = tree_map(widened, out)
        return out


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def widened(leaf: Any) -> Any:
    """Return a tensor of floats in double precision, everything else as it is."""
    if isinstance(leaf, Tensor) and leaf.dtype in _WIDE:
        return leaf.to(_WIDE[leaf.dtype])
    return leaf


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Let PyTorch compose attention and the like of elementary operators."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


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


@contextmanager
def fixed_chance(devices: Iterable[torch.device]) -> Iterator[None]:
    """Draw the same random numbers each time, and leave all generators as they were."""
    cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=cuda):
        # Not torch.manual_seed, which would seed every GPU and so outlive the fork.
        for generator in [
            torch.default_generator,
            *(torch.cuda.default_generators[i] for i in cuda),
        ]:
            generator.manual_seed(2)
        random.seed(2)
        np.random.seed(2)
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])


def random_inputs(example_inputs: Any, batch: int) -> Any:
    """Return fresh inputs of the same structure: floats drawn at random, all else copied.

    Args:
        example_inputs: a tensor or a nest of tensors and other values.
        batch: least size of the first axis; smaller examples are repeated along it.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [x for x in tree_leaves(example_inputs) if isinstance(x, Tensor) and x.ndim]
    first = tensors[0].shape[0] if tensors else 0
    repeats = -(-batch // first) if first else 1

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().clone()
        if leaf.layout != torch.strided:
            return widened(leaf)
        if leaf.ndim and leaf.shape[0] == first and repeats > 1:
            leaf = leaf.repeat(repeats, *[1] * (leaf.ndim - 1))
        if leaf.dtype not in _WIDE and not leaf.is_floating_point():
            return leaf
        wide = _WIDE.get(leaf.dtype, leaf.dtype)
        return torch.randn(leaf.shape, generator=generator, dtype=wide).to(leaf.device)

    plain = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    return tree_map(draw, plain)


def output_tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of a forward pass's result.

    Raises:
        SpecError: a part of the result cannot be looked into, or there is nothing to compare.
    """
    leaves = tree_leaves(outputs)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, bool, str, int, type(None))):
            raise SpecError(
                f"the model returns a {type(leaf).__name__}, which cannot be compared: wrap the "
                "module so that it returns tensors, or tuples, lists and dicts of tensors"
            )
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not any(tensor.numel() for tensor in tensors):
        raise SpecError("the model returns no values: give example inputs that are not empty")
    return tensors


def _check(model: nn.Module) -> None:
    """Raise `SpecError` for tensors that have no place in an average."""
    named = dict(model.named_parameters()) | {
        name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)
    }
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
        example_inputs: a tensor, a tuple or a mapping that it runs on; floats are replaced by
            random ones, everything else is kept.

    Attributes:
        module: the copy.
        tensors: for each key of the state dict the copy's own tensor.
        batch: least batch size of runs for training.

    Raises:
        SpecError: the model holds tensors that cannot be averaged, or cannot be copied.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        _check(model)
        self.example_inputs = example_inputs
        self.batch = 1
        self._noise = Noise(seed=1)
        self._spec: PermutationSpec | None = None
        self._permutation: Permutation | None = None
        self._originals = dict(enumerate(dict.fromkeys([*model.parameters(), *model.buffers()])))
        memo: dict[int, Any] = {}
        for module in model.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor):  # Such as the older weight_norm's, not a leaf.
                    memo[id(value)] = widened(value.detach().clone())
        for number, tensor in self._originals.items():
            copied = self._empty(tensor)
            self._write(number, copied)
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = copied
        numbers = {id(memo[id(tensor)]): number for number, tensor in self._originals.items()}
        try:
            self.module: nn.Module = copy.deepcopy(model, memo)
        except Exception as error:  # The copy runs the user's code.
            raise SpecError(f"the model cannot be copied: {error}") from error
        self.tensors = self._state()
        self._numbers = {
            key: numbers[id(value)] for key, value in self.tensors.items() if id(value) in numbers
        }
        self._devices = {tensor.device for tensor in self.tensors.values()}
        # A tied tensor is written once.
        self._keys = {id(self.tensors[key]): key for key in reversed(self._numbers)}
        self._versions = {key: self.tensors[key]._version for key in self._keys.values()}
        # BatchNorm's operator writes without counting it, so buffers are compared.
        self._starts = {
            key: self.tensors[key].clone()
            for key in self._versions
            if not isinstance(self.tensors[key], nn.Parameter)
        }

    def _lively(self, number: int, rows: Tensor) -> Tensor:
        """Return some rows of a parameter's or buffer's value, not yet in double precision."""
        tensor = self._originals[number].detach()
        if tensor.is_meta:
            value = torch.zeros(len(rows), *tensor.shape[1:], dtype=tensor.dtype)
        else:
            value = tensor.index_select(0, rows.to(tensor.device))
        if not value.is_floating_point():
            return value
        if value.itemsize < 4:
            value = value.float()
        scale = self._scale(number)
        if scale:
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
        return 0.3 * spread or (0.15 if tensor.ndim == 1 else fan_in**-0.5)

    def _write(self, number: int, copied: Tensor, axes: Sequence[Axis] | None = None) -> None:
        """Write a tensor's start, permuted if axes are given, into the copy, part by part."""
        if not copied.ndim or not copied.numel() or copied.layout != torch.strided:
            copied.copy_(self._originals[number].detach() if not self._is_meta(number) else copied)
            return
        moves = {} if axes is None or self._permutation is None else self._permutation.indices
        axes = axes or [Fixed(size) for size in copied.shape]
        rows, rest = axis_index(axes[0], moves), axes[1:]
        count = max(1, _PART // max(1, copied[0].numel()))
        if any(isinstance(axis, Parted) or g.within for axis in axes for g in groups_of(axis)):
            # An axis may depend on another one: all at once.
            rows, rest, count = torch.arange(len(copied)), axes, len(copied)
        for start in range(0, len(copied), count):
            some = rows[start : start + count]
            value = self._lively(number, some)
            whole = rest if len(rest) == copied.ndim else (Fixed(len(some)), *rest)
            copied[start : start + count] = move_tensor(value, whole, moves)

    def _is_meta(self, number: int) -> bool:
        return self._originals[number].is_meta

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors of the state dict, each the very object that the module holds."""
        named: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        named |= dict(self.module.named_buffers(remove_duplicate=False))
        state = {}
        for key, value in self.module.state_dict().items():
            if not isinstance(value, Tensor):
                raise SpecError(
                    f"{key} in the state dict is a {type(value).__name__}, not a tensor"
                )
            state[key] = named.get(key, value)
        return state

    def _empty(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the copy without values."""
        dtype = _WIDE.get(tensor.dtype, tensor.dtype)
        if tensor.layout != torch.strided:
            return tensor.detach().to(dtype, copy=True)
        device = "cpu" if tensor.is_meta else tensor.device
        return torch.zeros(tensor.shape, dtype=dtype, device=device)

    def permute(self, spec: PermutationSpec, permutation: Permutation) -> None:
        """Hold the permuted start from now on."""
        self._spec, self._permutation = spec, permutation
        for key in self._versions:
            if any(True for axis in spec.axes[key] for _ in groups_of(axis)):
                self._restore(key)

    def _restore(self, key: str) -> None:
        axes = None if self._spec is None else self._spec.axes[key]
        with torch.no_grad():
            self._write(self._numbers[key], self.tensors[key], axes)
        self._versions[key] = self.tensors[key]._version
        if key in self._starts:
            self._starts[key] = self.tensors[key].clone()

    def inputs(self, training: bool) -> Any:
        """Return the inputs of a run: a batch of two or more where training needs it."""
        return random_inputs(self.example_inputs, batch=self.batch if training else 1)

    def run(self, training: bool, inputs: Any = None, watch: Any = None) -> Run:
        """Run the copy from its start.

        Args:
            training: mode of the module.
            inputs: what to run on, by default `self.inputs(training)`.
            watch: a dispatch mode that sees every operator.
        """
        self.module.train(training)
        inputs = self.inputs(training) if inputs is None else inputs
        try:
            with (
                torch.no_grad(),
                fixed_chance(self._devices),
                plain_kernels(),
                Double(),
                watch or nullcontext(),
            ):
                outputs = call(self.module, inputs)
        finally:
            written = self._take_back()
        return Run(output_tensors(outputs), written)

    def _take_back(self) -> dict[str, Tensor]:
        """Return what a run has written, and undo it."""
        written = {}
        for key, found in self._state().items():
            kept = self.tensors[key]
            if found is not kept:
                # forward has put another tensor into the buffer's place.
                written[key] = found
                path, _, name = key.rpartition(".")
                self.module.get_submodule(path)._buffers[name] = kept
            elif key in self._versions and self._is_written(key):
                written[key] = kept.detach().clone()
                self._restore(key)
        return written

    def _is_written(self, key: str) -> bool:
        if key in self._starts:
            start, now = self._starts[key], self.tensors[key]
            return start.shape != now.shape or not torch.equal(start, now)
        return self.tensors[key]._version != self._versions[key]
