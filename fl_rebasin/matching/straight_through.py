"""Straight-through estimator: learn the permutation that makes the merged model good."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fl_rebasin.matching.coordinate_descent import Matcher
from fl_rebasin.matching.objective import (
    check_finite,
    check_module,
    cosine,
    precision_of,
    weights_of,
    with_weights,
)
from fl_rebasin.matching.weights import Match, match_weights
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

Loss = Callable[[Any, Any], Tensor]


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
    """Find the permutation of `other` with which the mean of the two models has the least loss.

    Free weights start at those of `reference` and are trained with Adam. In each step `other` is
    weight-matched to them; the loss is that of the mean of `reference` and the moved `other`, and
    its gradient goes to the free weights as if they were the moved `other` (straight through the
    assignment). Of the start and the permutation after each epoch the one with the least loss
    over all batches is returned, so that the result is never worse on them than the start.
    BatchNorm layers normalise by the batch (one of a single sample, which has no variance, is left
    out), dropout is off.

    Args:
        spec: spec of both models.
        model: a module of the architecture; it is copied, and its weights do not matter.
        reference: state dict that stays.
        other: state dict to be permuted; neither is changed.
        batches: pairs of inputs and targets, gone through `epochs` times and to compare.
        epochs: passes over the batches.
        learning_rate: Adam's.
        loss: maps outputs and targets to a scalar; cross-entropy by default.
        start: permutation to begin with; by default that of `match_weights`.

    Raises:
        TypeError: `model` is not a module.
        SpecError: a model or `start` does not fit the spec, or weights are not finite.
        ValueError: no batch, one that is no pair, or the loss is not finite.

    Source: Git Re-Basin, Algorithm 2.

    Example:
        >>> from fl_rebasin import derive_spec
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> spec = derive_spec(net, torch.zeros(1, 2))
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> state = net.state_dict()
        >>> match_straight_through(spec, net, state, state, batches).permutation.is_identity
        True
    """
    if not len(batches):
        raise ValueError("no batch to learn the permutation from")
    check_module(spec, model)
    check_finite(spec, reference, "reference")
    check_finite(spec, other, "other")
    fixed = with_weights(model, reference).state_dict()
    moving = with_weights(model, other).state_dict()
    weights = weights_of(spec, moving)
    if start is None:
        match = match_weights(spec, fixed, moving)
        first, sweeps = match.permutation, match.sweeps
    else:
        spec.check_permutation(start)
        first, sweeps = Matcher(spec, weights, weights, start).permutation, 0
    runner = _runner(model)
    # Of a tensor with two names the first is enough, and only one may be given.
    names = [
        key for key, _ in (*runner.named_parameters(), *runner.named_buffers()) if key in fixed
    ]
    trained = [key for key, _ in runner.named_parameters() if key in spec.learnable]

    def midpoint(permutation: Permutation, free: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = spec.apply(permutation, moving)
        state = {}
        for key in names:
            value = fixed[key]
            if not value.is_floating_point():
                state[key] = value.clone()
                continue
            end = moved[key]
            if key in free:
                end = end + (free[key] - free[key].detach())
            state[key] = (value + end) / 2
        return state

    def step_loss(
        permutation: Permutation, free: Mapping[str, Tensor], batch: Any
    ) -> Tensor | None:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                "straight-through matching needs batches of inputs and targets, got a "
                + type(batch).__name__
            )
        inputs, targets = batch
        try:
            outputs = functional_call(runner, midpoint(permutation, free), (inputs,))
        except ValueError:
            if len(inputs) > 1:
                raise
            return None
        value = loss(outputs, targets)
        if not bool(torch.isfinite(value)):
            raise ValueError("the loss of the merged model is NaN or infinite")
        return value

    def total(permutation: Permutation) -> float:
        with torch.no_grad():
            losses = [step_loss(permutation, {}, batch) for batch in batches]
        counted = [float(value) for value in losses if value is not None]
        if not counted:
            raise ValueError("no batch of two or more samples to learn the permutation from")
        return sum(counted)

    best, least = first, total(first)
    free = {key: fixed[key].clone().requires_grad_() for key in trained}
    optimiser = torch.optim.Adam(free.values(), lr=learning_rate)
    permutation = first
    for _ in range(epochs):
        for batch in batches:
            target = weights_of(spec, {**fixed, **free})
            precision, _ = precision_of([target, weights])
            matcher = Matcher(spec, target, weights, permutation, precision)
            sweeps += matcher.descend()
            permutation = matcher.permutation
            value = step_loss(permutation, free, batch)
            if value is not None:
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                optimiser.step()
        if (reached := total(permutation)) < least:
            best, least = permutation, reached
    target = weights_of(spec, fixed)
    return Match(
        permutation=best,
        similarity=cosine(target, weights_of(spec, spec.apply(best, moving))),
        similarity_before=cosine(target, weights),
        sweeps=sweeps,
    )


def _runner(model: nn.Module) -> nn.Module:
    """Return a copy that computes as in evaluation, but normalises by the statistics of a batch."""
    runner = copy.deepcopy(model).eval().requires_grad_(False)
    for module in runner.modules():
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0  # cuDNN has gradients of these in training mode only.
        if isinstance(module, (_BatchNorm, nn.RNNBase)):
            module.train()
    return runner
