"""Running a module: evaluation mode, inputs of any form, hooks, and moments of what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Hook: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
"""Called after a module's forward pass with the module, its arguments, its keywords, its output."""


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and restore the mode of every module afterwards.

    PyTorch's fast path for transformers is off: it skips their submodules, or feeds them nested
    tensors.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for model in models:
        model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def inputs_of(batch: Any) -> Any:
    """Return the inputs of a batch: the first item of a tuple or list, else the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def inputs_and_labels(batch: Any, purpose: str) -> tuple[Any, Any]:
    """Return the two parts of a batch.

    Args:
        batch: a pair of inputs and labels.
        purpose: what needs the labels, for the error message.

    Raises:
        ValueError: the batch is not a pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(
            f"{purpose} needs batches of inputs and labels, got a {type(batch).__name__}"
        )
    return batch[0], batch[1]


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument that a module was called with, positional or not."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Register forward hooks, and remove them afterwards.

    Args:
        hooks: pairs of a module and the function to call after each of its forward passes.
    """
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Moments:
    """Count, mean and centred sum of squares of some units over samples.

    Two of them add up exactly: with delta = mean_b - mean_a and n = n_a + n_b,

        mean = mean_a + delta * n_b / n
        squares = squares_a + squares_b + delta^2 * n_a * n_b / n

    Attributes:
        count: number of samples.
        mean: mean of each unit, shape `(units,)`.
        squares: sum of `(x - mean)^2` over the samples, shape `(units,)`.

    Source: Chan, Golub, LeVeque (1979).
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Return the moments of values of shape `(units, samples)`, in their own precision."""
        mean = values.mean(1)
        return cls(values.shape[1], mean, (values - mean[:, None]).square().sum(1))

    def __add__(self, other: Moments) -> Moments:
        total = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            total,
            self.mean + delta * (other.count / total),
            self.squares + other.squares + delta.square() * (self.count * other.count / total),
        )

    @property
    def variance(self) -> Tensor:
        """Population variance of each unit."""
        return self.squares / self.count
