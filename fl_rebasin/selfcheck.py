"""The proof that ends every derivation: permuted models must be the same function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fl_rebasin.spec import Permutation, PermutationSpec, SpecError

TOLERANCE = 1e-9
"""Largest relative error of outputs and buffers in float64."""
SINGLE_TOLERANCE = 1e-4
"""The same for a model that computes a part of its forward pass in lower precision."""
DRAWS = 2

Call = Callable[[nn.Module, Any], Any]


class CheckFailedError(Exception):
    """A random permutation changed the model's function."""


class _Quiet(TorchDispatchMode):
    """Makes runs comparable: one average dropout mask for all units; notes low precision.

    A mask that is drawn place by place is not a function of the units.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.single = False

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
        if kwargs.get("dtype") in (torch.float32, torch.bfloat16, torch.float16):
            self.single = True
        return func(*args, **kwargs)


def random_inputs(example_inputs: Any, dtype: torch.dtype, batch: int) -> Any:
    """Return fresh inputs of the same structure: floats drawn at random, all else copied.

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
        leaf = leaf.detach().clone()
        if leaf.ndim and leaf.shape[0] == first and repeats > 1:
            leaf = leaf.repeat(repeats, *[1] * (leaf.ndim - 1))
        if not leaf.is_floating_point():
            return leaf
        drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        return drawn.to(leaf.device, dtype)

    plain = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    return tree_map(draw, plain)


def perturbed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of some dtype whose parameters and buffers differ from unit to unit.

    Fresh models hold ones and zeros (BatchNorm, biases), under which a wrong axis goes unseen.
    """
    twin = copy.deepcopy(model).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                scale = float(parameter.double().std()) if parameter.numel() > 1 else 0.0
                parameter.add_((scale or 0.5) * 0.3 * noise.to(parameter))
        for tensor in twin.buffers():
            if tensor.is_floating_point():
                # Variances must stay positive.
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(0.3 * noise.to(tensor))
    return twin


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


def _difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Return the largest relative error over two lists of tensors; NaN counts as 1."""
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        if not one.numel():
            continue
        if not one.is_floating_point():
            worst = max(worst, float(not torch.equal(one, other)))
            continue
        error = (one - other).abs().max() / one.abs().max().clamp_min(1e-30)
        worst = max(worst, float(error.nan_to_num(nan=1.0)))
    return worst


class SelfCheck:
    """Compares permuted models with the model, in evaluation and training mode.

    Args:
        model: module of the architecture; not changed.
        example_inputs: inputs that it runs on.
        call: runs a module on inputs.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, call: Call) -> None:
        self.example_inputs, self.call = example_inputs, call
        self.dtype = torch.float64
        self._base = perturbed(model, self.dtype)
        self.tolerance = TOLERANCE
        try:
            single = self._run(self._base.state_dict(), training=False)[2]
        except (RuntimeError, TypeError):
            # The forward pass fixes a dtype of its own.
            self.dtype, single = torch.float32, True
            self._base = perturbed(model, self.dtype)
        if single:
            self.tolerance = SINGLE_TOLERANCE
        self._start = copy.deepcopy(self._base.state_dict())
        self._expected: dict[bool, tuple[list[Tensor], dict[str, Tensor]]] = {}
        for training in (False, True):
            try:
                outputs, buffers, _ = self._run(self._start, training)
            except (RuntimeError, ValueError, TypeError):
                if not training:
                    raise
                continue  # The trace has said that training mode cannot be run.
            self._expected[training] = outputs, buffers

    def _run(
        self, state: Mapping[str, Tensor], training: bool
    ) -> tuple[list[Tensor], dict[str, Tensor], bool]:
        """Run once; return outputs, the state afterwards, and whether precision was low."""
        self._base.load_state_dict(state)
        self._base.train(training)
        inputs = random_inputs(self.example_inputs, self.dtype, 2 if training else 1)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _Quiet() as quiet:
            # Not torch.manual_seed, which would seed every GPU and so outlive the fork.
            torch.default_generator.manual_seed(2)
            outputs = output_tensors(self.call(self._base, inputs))
        after = {key: value.clone() for key, value in self._base.state_dict().items()}
        return [tensor.clone() for tensor in outputs], after, quiet.single

    def error(self, spec: PermutationSpec, perm: Permutation) -> float:
        """Return the largest relative error that a permutation causes; 1 or so where it is wrong.

        Outputs and all buffers after the run are compared.
        """
        worst = 0.0
        moved = spec.apply(perm, self._start)
        for training, (outputs, buffers) in self._expected.items():
            found, after, _ = self._run(moved, training)
            expected = spec.apply(perm, buffers)
            worst = max(
                worst,
                _difference(outputs, found),
                _difference(list(expected.values()), [after[key] for key in expected]),
            )
        return worst

    def check(self, spec: PermutationSpec) -> float:
        """Return the largest relative error over random permutations.

        Raises:
            CheckFailedError: it is above the tolerance.
        """
        generator = torch.Generator().manual_seed(3)
        worst = 0.0
        for _ in range(DRAWS):
            worst = max(worst, self.error(spec, _moving(spec, generator)))
        if not worst < self.tolerance:
            raise CheckFailedError(f"relative error {worst:.1e}, allowed {self.tolerance:.0e}")
        return worst

    def is_repeatable(self, spec: PermutationSpec) -> bool:
        """Return whether a model that is not permuted at all passes."""
        return self.error(spec, spec.identity()) < self.tolerance

    def guilty(self, spec: PermutationSpec) -> list[str]:
        """Return the groups that change the function when they alone are permuted."""
        drawn = _moving(spec, torch.Generator().manual_seed(4))
        still = spec.identity().indices
        return [
            name
            for name in spec.groups
            if not self.error(spec, Permutation({**still, name: drawn[name]})) < self.tolerance
        ]


def _moving(spec: PermutationSpec, generator: torch.Generator) -> Permutation:
    """Draw a permutation that moves every group; a small one could come out as the identity."""
    indices = {}
    for name, index in spec.random(generator).indices.items():
        still = torch.equal(index, torch.arange(len(index)))
        indices[name] = index.roll(1) if still else index
    return Permutation(indices)
