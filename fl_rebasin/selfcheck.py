"""The proof that ends every derivation: permuted models must be the same function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fl_rebasin.spec import Permutation, PermutationSpec

TOLERANCE = 1e-9
"""Largest relative error of outputs and buffers in float64."""
SINGLE_TOLERANCE = 1e-3
"""The same for a model that only runs in float32."""
DRAWS = 2

Call = Callable[[nn.Module, Any], Any]


class CheckFailedError(Exception):
    """A random permutation changed the model's function."""


class _NoDropout(TorchDispatchMode):
    """Gives every unit the same, average dropout mask: a mask drawn by place is not a function."""

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
        return func(*args, **kwargs)


def random_inputs(example_inputs: Any, dtype: torch.dtype, batch: int) -> Any:
    """Return inputs of the same structure: floats drawn at random, all else as given.

    Args:
        example_inputs: a tensor or a nest of tensors and other values.
        dtype: dtype of the floating tensors.
        batch: least size of the first axis; smaller examples are repeated along it.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [x for x in tree_leaves(example_inputs) if isinstance(x, Tensor) and x.ndim]
    first = tensors[0].shape[0] if tensors else 0
    repeats = -(-batch // first) if first else 1

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.ndim and leaf.shape[0] == first and repeats > 1:
            leaf = leaf.repeat(repeats, *[1] * (leaf.ndim - 1))
        if not leaf.is_floating_point():
            return leaf
        drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        return drawn.to(leaf.device, dtype)

    plain = example_inputs if isinstance(example_inputs, (Tensor, tuple)) else dict(example_inputs)
    return tree_map(draw, plain)


def _perturbed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy whose parameters and buffers differ from unit to unit.

    Fresh models hold ones and zeros (BatchNorm, biases), under which a wrong axis goes unseen.
    """
    twin = copy.deepcopy(model).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in twin.parameters():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                scale = float(tensor.double().std()) if tensor.numel() > 1 else 0.0
                tensor.add_((scale or 0.5) * 0.3 * noise.to(tensor))
        for tensor in twin.buffers():
            if tensor.is_floating_point():
                # Variances must stay positive.
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(0.3 * noise.to(tensor))
    return twin


def _difference(left: Any, right: Any) -> float:
    """Return the largest relative error over the tensors of two nests."""
    worst = 0.0
    for one, other in zip(tree_leaves(left), tree_leaves(right), strict=True):
        if isinstance(one, Tensor) and one.numel():
            if not one.is_floating_point():
                worst = max(worst, float(not torch.equal(one, other)))
                continue
            error = (one - other).abs().max() / one.abs().max().clamp_min(1e-30)
            # A NaN on one side only must fail; the same NaN on both says nothing either way.
            worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


def _run(model: nn.Module, inputs: Any, call: Call) -> tuple[Any, Mapping[str, Tensor]]:
    """Run once; return outputs and the buffers afterwards."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _NoDropout():
        torch.manual_seed(2)
        outputs = call(model, inputs)
    return outputs, dict(model.state_dict())


def worst_error(
    spec: PermutationSpec, model: nn.Module, example_inputs: Any, call: Call, perm: Permutation
) -> tuple[float, float]:
    """Return the relative error that a permutation causes, and the tolerance for it.

    Outputs in evaluation and training mode and all buffers after the run are compared.
    """
    dtype, tolerance = torch.float64, TOLERANCE
    base = _perturbed(model, dtype)
    try:
        _run(base.eval(), random_inputs(example_inputs, dtype, 1), call)
    except (RuntimeError, TypeError):
        # The forward pass fixes a dtype of its own.
        dtype, tolerance = torch.float32, SINGLE_TOLERANCE
        base = _perturbed(model, dtype)
    worst = 0.0
    start = copy.deepcopy(base.state_dict())
    for training in (False, True):
        inputs = random_inputs(example_inputs, dtype, 2 if training else 1)
        base.load_state_dict(start)
        base.train(training)
        try:
            outputs, buffers = _run(base, inputs, call)
        except (RuntimeError, ValueError):
            if training:
                break
            raise
        expected = copy.deepcopy(outputs), spec.apply(perm, buffers)
        base.load_state_dict(spec.apply(perm, start))
        worst = max(worst, _difference(expected, _run(base, inputs, call)))
    return worst, tolerance


def self_check(spec: PermutationSpec, model: nn.Module, example_inputs: Any, call: Call) -> float:
    """Return the largest relative error over random permutations.

    Raises:
        CheckFailedError: an error is above the tolerance.
    """
    generator = torch.Generator().manual_seed(3)
    worst = 0.0
    for _ in range(DRAWS):
        perm = spec.random(generator)
        error, tolerance = worst_error(spec, model, example_inputs, call, perm)
        if not error < tolerance:
            raise CheckFailedError(f"relative error {error:.1e}, allowed {tolerance:.0e}")
        worst = max(worst, error)
    return worst


def guilty_groups(
    spec: PermutationSpec, model: nn.Module, example_inputs: Any, call: Call
) -> list[str]:
    """Return the groups that change the function when they alone are permuted."""
    drawn = spec.random(torch.Generator().manual_seed(4))
    guilty = []
    for name in spec.groups:
        alone = Permutation({**spec.identity().indices, name: drawn[name]})
        error, tolerance = worst_error(spec, model, example_inputs, call, alone)
        if not error < tolerance:
            guilty.append(name)
    return guilty
