"""Straight-through matching: learn the permutation that gives the merged model a low loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fl_rebasin.forward import inputs_and_labels
from fl_rebasin.matching.coordinate_descent import Matcher
from fl_rebasin.matching.objective import (
    check_finite,
    check_module,
    cosine,
    precision_of,
    weights_of,
)
from fl_rebasin.matching.weights import Match, match_weights
from fl_rebasin.state_dicts import StateDict, with_weights
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

Loss = Callable[[Any, Any], Tensor]
"""Maps outputs and labels to a scalar."""


def match_straight_through(
    spec: PermutationSpec,
    model: nn.Module,
    reference: StateDict,
    other: StateDict,
    batches: Sequence[tuple[Any, Any]],
    *,
    epochs: int = 1,
    learning_rate: float = 1e-3,
    loss: Loss = F.cross_entropy,
    start: Permutation | None = None,
) -> Match:
    """Find the permutation of `other` that gives the mean of the two models the lowest loss.

    Let theta_A be `reference` and theta_B `other`. Free weights theta start at theta_A and are
    trained with Adam. Each step matches theta_B to them and takes the gradient of the loss of the
    midpoint,

        p = argmax over p of <theta, p(theta_B)>,    L((theta_A + p(theta_B)) / 2),

    where the gradient for p(theta_B) is passed straight through the assignment to theta. Of the
    start and the permutations after each epoch, the one with the lowest loss over all batches is
    returned, so the result is never worse on them than the start. BatchNorm layers normalise by
    the statistics of the batch, and dropout is off. A batch of a single sample is left out if a
    BatchNorm layer cannot normalise it.

    Args:
        spec: spec of both models.
        model: a module of the architecture; it is copied, and its weights do not matter. The
            copies run on its device and in its dtypes.
        reference: state dict whose unit order is kept.
        other: state dict to permute; neither is changed.
        batches: pairs of inputs and labels on the module's device, for training and for the
            comparison.
        epochs: passes over the batches.
        learning_rate: learning rate of Adam.
        loss: maps outputs and labels to a scalar; cross-entropy by default.
        start: permutation to begin with; by default the result of `match_weights`.

    Raises:
        TypeError: `model` is not a module.
        SpecError: a model or `start` does not fit the spec, or weights are not finite.
        ValueError: there is no batch, a batch is not a pair, or the loss is not finite.

    Source: Git Re-Basin, section 3.3 and Algorithm 2.

    Example:
        >>> from fl_rebasin import derive_spec
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> spec = derive_spec(net, torch.zeros(1, 2))
        >>> state, batches = net.state_dict(), [(torch.eye(2), torch.tensor([0, 1]))]
        >>> match_straight_through(spec, net, state, state, batches).permutation.is_identity
        True
    """
    if not len(batches):
        raise ValueError("no batch to learn the permutation from")
    check_module(spec, model)
    check_finite(spec, reference, "reference")
    check_finite(spec, other, "other")
    midpoint = _Midpoint(
        spec,
        runner=_runner(model),
        reference=with_weights(model, reference).state_dict(),
        other=with_weights(model, other).state_dict(),
        loss=loss,
    )
    target, weights = weights_of(spec, midpoint.reference), weights_of(spec, midpoint.other)
    if start is None:
        match = match_weights(spec, midpoint.reference, midpoint.other)
        permutation, sweeps = match.permutation, match.sweeps
    else:
        spec.check_permutation(start)
        permutation, sweeps = Matcher(spec, weights, weights, start).permutation, 0
    best, lowest = permutation, midpoint.total_loss(permutation, batches)
    free = midpoint.free_weights()
    optimiser = torch.optim.Adam(free.values(), lr=learning_rate)
    for _ in range(epochs):
        for batch in batches:
            free_target = weights_of(spec, {**midpoint.reference, **free})
            precision, _ = precision_of([free_target, weights])
            matcher = Matcher(spec, free_target, weights, permutation, precision)
            sweeps += matcher.descend()
            permutation = matcher.permutation
            value = midpoint.batch_loss(permutation, free, batch)
            if value is not None:
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                optimiser.step()
        if (total := midpoint.total_loss(permutation, batches)) < lowest:
            best, lowest = permutation, total
    return Match(
        permutation=best,
        similarity=cosine(target, weights_of(spec, spec.apply(best, midpoint.other))),
        similarity_before=cosine(target, weights),
        sweeps=sweeps,
    )


@dataclass(frozen=True)
class _Midpoint:
    """The mean of a reference and a permuted model, as a function that has a loss.

    Attributes:
        spec: spec of both models.
        runner: module of the architecture that runs the mean.
        reference: state dict of the reference.
        other: state dict of the model to permute.
        loss: maps outputs and labels to a scalar.
    """

    spec: PermutationSpec
    runner: nn.Module
    reference: StateDict
    other: StateDict
    loss: Loss

    def free_weights(self) -> dict[str, Tensor]:
        """Return the learnable parameters of the reference as new leaves of a graph."""
        return {
            key: self.reference[key].clone().requires_grad_()
            for key, _ in self.runner.named_parameters()
            if key in self.spec.learnable
        }

    def state(self, permutation: Permutation, free: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of the midpoint; its gradient goes to the free weights."""
        moved = self.spec.apply(permutation, self.other)
        # A tensor with two names is given under one of them only.
        named = (*self.runner.named_parameters(), *self.runner.named_buffers())
        state = {}
        for key in (key for key, _ in named if key in self.reference):
            value = self.reference[key]
            if not value.is_floating_point():
                state[key] = value.clone()
                continue
            end = moved[key]
            if key in free:
                end = end + (free[key] - free[key].detach())
            state[key] = (value + end) / 2
        return state

    def batch_loss(
        self, permutation: Permutation, free: Mapping[str, Tensor], batch: Any
    ) -> Tensor | None:
        """Return the loss on one batch; None for a single sample that cannot be normalised.

        Raises:
            ValueError: the batch is not a pair, or the loss is not finite.
        """
        inputs, labels = inputs_and_labels(batch, "straight-through matching")
        try:
            outputs = functional_call(self.runner, self.state(permutation, free), (inputs,))
        except ValueError:
            if len(inputs) > 1:
                raise
            return None
        value = self.loss(outputs, labels)
        if not bool(torch.isfinite(value)):
            raise ValueError("the loss of the merged model is NaN or infinite")
        return value

    def total_loss(self, permutation: Permutation, batches: Sequence[Any]) -> float:
        """Return the sum of the losses on all batches.

        Raises:
            ValueError: no batch can be normalised.
        """
        with torch.no_grad():
            losses = [self.batch_loss(permutation, {}, batch) for batch in batches]
        counted = [float(value) for value in losses if value is not None]
        if not counted:
            raise ValueError("no batch of two or more samples to learn the permutation from")
        return sum(counted)


def _runner(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, but with BatchNorm by the statistics of the batch."""
    runner = copy.deepcopy(model).eval().requires_grad_(False)
    for module in runner.modules():
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0  # Training mode, because cuDNN has no gradients without it.
        if isinstance(module, (_BatchNorm, nn.RNNBase)):
            module.train()
    return runner
