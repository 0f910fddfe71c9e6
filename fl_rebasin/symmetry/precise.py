"""Running a model so that two runs can be compared: in high precision and without randomness."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fl_rebasin.symmetry.spec import SpecError

Wide: TypeAlias = Mapping[torch.dtype, torch.dtype]

DOUBLE: Wide = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
"""The dtype in which to compute each dtype."""
SINGLE: Wide = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
"""The same for models with an operator that does not support double precision."""


class Precise(TorchDispatchMode):
    """Computes everything in wide dtypes, casts included, and without dropout.

    A random mask is not a function of the units, so that a permuted model would draw another one:
    masks become constant, 1 - p.
    """

    def __init__(self, wide: Wide) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wide = wide

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "bernoulli_":
            # PyTorch omits the default value from the arguments.
            probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return args[0].copy_(torch.as_tensor(probability))
        wide = self._wide
        if kwargs.get("dtype") in wide:
            kwargs = {**kwargs, "dtype": wide[kwargs["dtype"]]}
        args, kwargs = self._widened((args, kwargs))
        return self._widened(func(*args, **kwargs))

    def _widened(self, nest: Any) -> Any:
        if any(isinstance(leaf, Tensor) and leaf.dtype in self._wide for leaf in tree_leaves(nest)):
            return tree_map(lambda leaf: widened(leaf, self._wide), nest)
        return nest


def widened(leaf: Any, wide: Wide) -> Any:
    """Return a tensor of floats in a wide dtype, and anything else unchanged."""
    if isinstance(leaf, Tensor) and leaf.dtype in wide:
        return leaf.to(wide[leaf.dtype])
    return leaf


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Make PyTorch compute attention and transformer layers from elementary operators."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def fixed_seeds(devices: Iterable[torch.device]) -> Iterator[None]:
    """Draw the same random numbers each time, and restore all generators afterwards."""
    cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=cuda):
        # Not torch.manual_seed: it would seed every GPU, and the fork restores only some.
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


def random_inputs(example_inputs: Any, batch: int, wide: Wide) -> Any:
    """Return inputs of the same structure in wide dtypes.

    Float tensors with equal or non-finite values are replaced by random ones, because they would
    hide errors. Others are kept: a model may need positive inputs, for example.

    Args:
        example_inputs: a tensor, or a nested structure of tensors and other values.
        batch: minimum size of the first axis; smaller examples are repeated along it with noise.
        wide: the dtype in which to compute each dtype.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [x for x in tree_leaves(example_inputs) if isinstance(x, Tensor) and x.ndim]
    first = tensors[0].shape[0] if tensors else 0
    repeats = -(-batch // first) if first else 1

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().clone()
        if leaf.layout != torch.strided or leaf.is_quantized:
            return widened(leaf, wide)
        repeated = leaf.ndim and leaf.shape[0] == first and repeats > 1
        if repeated:
            leaf = leaf.repeat(repeats, *[1] * (leaf.ndim - 1))
        if not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        leaf = widened(leaf, wide)
        drawn = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
        if not leaf.numel() or bool((leaf == leaf.reshape(-1)[0]).all()):
            return drawn
        if not bool(torch.isfinite(leaf).all()):
            return drawn
        if repeated:
            leaf[first:] *= 1 + 0.1 * drawn[first:].abs()
        return leaf

    plain = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    return tree_map(draw, plain)


def output_tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of a forward pass's result.

    Raises:
        SpecError: a part of the result cannot be compared, or there is nothing to compare.
    """
    leaves = tree_leaves(outputs)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, bool, str, int, type(None))):
            raise SpecError(
                f"the model returns a {type(leaf).__name__}, which cannot be compared: wrap the "
                "module so that it returns tensors, or tuples, lists and dicts of tensors"
            )
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise SpecError(
            "the model returns no tensors: wrap it in a module that returns its outputs"
        )
    if not any(tensor.numel() for tensor in tensors):
        raise SpecError(
            "the model returns only empty tensors: give example inputs that are not empty"
        )
    return tensors
