"""Which layers of a model a fit sets, in which order, found from one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _MaxPoolNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fl_rebasin.forward import call, evaluating, first_input
from fl_rebasin.merging.least_squares.steps import RIDGE, FitStep, NormStep, RescaleStep, Step

MAX_FEATURES = 2500
"""Default limit on the inputs of a unit, bias included: X^T X has the square of that in entries."""

TRANSPARENT = (nn.Linear, _ConvNd, _BatchNorm, _MaxPoolNd, nn.Identity, nn.Dropout)
"""Modules that are watched: those that are set, and those between a layer and its norm."""


@dataclass(frozen=True)
class _Result:
    """The output of a watched module.

    Attributes:
        source: name of the layer that it comes from.
        version: version of the tensor when it was returned; a later one has been written to.
        tensor: the tensor itself, kept alive so that no other one gets its identity.
    """

    source: str
    version: int
    tensor: Tensor


class _Dataflow(TorchDispatchMode):
    """Follows the outputs of layers through one forward pass.

    Attributes:
        calls: how often each layer ran, in the order of the first calls.
        norms: for each layer the first BatchNorm that its output goes into.
        results: the outputs by the identity of the tensor.
        uses: how often watched modules take each tensor in, by identity.
        other_uses: the same for operators outside the watched modules.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.norms: dict[str, str] = {}
        self.results: dict[int, _Result] = {}
        self.uses: Counter[int] = Counter()
        self.other_uses: Counter[int] = Counter()
        self._depth = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self._depth:
            leaves = tree_leaves((args, kwargs))
            self.other_uses.update(id(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Follow what the model computes."""
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, TRANSPARENT):
                handles.append(module.register_forward_pre_hook(self._enter))
                leaving = self._leaving(name)
                handles.append(module.register_forward_hook(leaving, with_kwargs=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _leaving(self, name: str) -> Any:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            self._depth -= 1
            taken = first_input(args, kwargs) if args or kwargs else None
            if isinstance(taken, Tensor) and output is not taken:
                self._record(name, module, taken, output)

        return leave

    def _record(self, name: str, module: nn.Module, taken: Tensor, output: Any) -> None:
        self.uses[id(taken)] += 1
        known = self.results.get(id(taken))
        source = known.source if known is not None and known.version == taken._version else None
        if isinstance(module, _BatchNorm):
            self.calls[name] += 1
            if source is not None:
                self.norms.setdefault(source, name)
            return
        if isinstance(module, (nn.Linear, _ConvNd)):
            self.calls[name] += 1
            source = name
        if source is not None and isinstance(output, Tensor):
            self.results[id(output)] = _Result(source, output._version, output)
            # The identity may have belonged to a tensor that is gone.
            self.other_uses.pop(id(output), None)
            self.uses.pop(id(output), None)

    def shared_sources(self, outputs: Any) -> set[str]:
        """Return the layers whose output is used more or less than once."""
        uses = self.uses + Counter(id(leaf) for leaf in tree_leaves(outputs))
        return {
            result.source
            for identity, result in self.results.items()
            if uses[identity] + self.other_uses[identity] != 1
        }


def plan(
    model: nn.Module, inputs: Any, max_features: int = MAX_FEATURES, ridge: float = RIDGE
) -> list[Step]:
    """Return the steps of a fit in the order of the forward pass.

    Layers that run more than once, share a parameter, compute their weight (parametrisations) or
    are transposed convolutions are left out: they keep the average. A BatchNorm is set together
    with the layer before it if nothing else uses that layer's output; otherwise it is a step of its
    own, if it has running statistics and a scale.

    Args:
        model: a module of the architecture; not changed.
        inputs: a batch, or a tuple of positional or a dict of keyword arguments.
        max_features: largest number of inputs of a unit, bias included, for which a layer is
            fitted; larger layers are rescaled, so 0 rescales all of them.
        ridge: pull of the fits towards the merged weights.
    """
    flow = _Dataflow()
    with evaluating(model), torch.no_grad(), flow.watching(model):
        outputs = call(model, inputs)
    shared = flow.shared_sources(outputs)
    pairs = {
        layer: norm
        for layer, norm in flow.norms.items()
        if layer not in shared
        and _can_be_set(model, layer, flow)
        and _can_be_set(model, norm, flow)
    }
    steps: list[Step] = []
    for name in flow.calls:
        module = model.get_submodule(name)
        if not _can_be_set(model, name, flow) or name in pairs.values():
            continue
        if isinstance(module, _BatchNorm):
            steps.append(NormStep(name))
        elif (
            _can_be_fitted(module) and module.get_parameter("weight")[0].numel() + 1 <= max_features
        ):
            steps.append(FitStep(name, pairs.get(name), ridge=ridge))
        else:
            steps.append(RescaleStep(name, pairs.get(name)))
    if steps and isinstance(steps[-1], FitStep):
        steps[-1] = replace(steps[-1], last=True)
    return steps


def _can_be_set(model: nn.Module, name: str, flow: _Dataflow) -> bool:
    """Whether writing to a layer changes one step of the forward pass only."""
    module = model.get_submodule(name)
    if isinstance(module, _BatchNorm) and module.running_mean is None:
        return False
    if module._parameters.get("weight") is None or getattr(module, "transposed", False):
        return False
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    own = [p for p in module._parameters.values() if p is not None]
    alone = all(names[id(p)] == 1 and not flow.other_uses[id(p)] for p in own)
    return flow.calls[name] == 1 and alone


def _can_be_fitted(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d))
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )
