"""Class-aware heads: each class is decided by those who have seen it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fl_rebasin.forward import call, evaluating
from fl_rebasin.state_dicts import StateDict, like

SMOOTHING = 0.1
"""Share of the mean count that is added to each class's."""


def last_layer(model: nn.Module, inputs: Any) -> tuple[str, str | None]:
    """Return the keys of weight and bias of the linear layer whose result the model returns.

    The result must be returned as it is: the rows of the layer must be the classes' and nobody
    else's.

    Args:
        model: the model; not changed.
        inputs: a batch, or a tuple of positional or a dict of keyword arguments.

    Raises:
        ValueError: the model returns something else, or the layer shares or computes its weight.
    """
    results: list[tuple[str, nn.Linear, Tensor, int]] = []

    def watch(name: str, module: nn.Linear) -> Any:
        return lambda _, args, output: results.append((name, module, output, output._version))

    handles = [
        module.register_forward_hook(watch(name, module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with evaluating(model), torch.no_grad():
            outputs = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module, output, version in reversed(results):
        if output is outputs and output._version == version:
            own = [module._parameters.get(key) for key in ("weight", "bias")]
            if own[0] is None or any(uses[id(each)] > 1 for each in own):
                raise ValueError(
                    f"class-aware heads need a last layer with a weight of its own, {name or 'it'} "
                    "shares or computes it"
                )
            prefix = f"{name}." if name else ""
            return f"{prefix}weight", None if module.bias is None else f"{prefix}bias"
    raise ValueError("class-aware heads need a model that returns what a linear layer gives")


def check_counts(counts: Tensor, classes: int) -> None:
    """Raise `ValueError` unless these can be the numbers of examples of each class."""
    if counts.shape != (classes,):
        raise ValueError(f"label counts of shape {tuple(counts.shape)} for {classes} classes")
    if not bool((torch.isfinite(counts) & (counts >= 0)).all()):
        raise ValueError("label counts must be finite and not negative")


def log_prior(counts: Tensor, added: Tensor | float = 1.0) -> Tensor:
    """Return the log of a label prior, with some examples added to each class, float64."""
    smoothed = counts.double() + added
    return (smoothed / smoothed.sum()).log()


def without_label_prior(
    state_dict: StateDict, counts: Tensor, everybody: Tensor, bias: str
) -> dict[str, Tensor]:
    """Return a model whose last bias goes by everybody's label prior instead of its own.

    To each class a tenth of the mean count is added: a model that never saw a class knows nothing
    of its logit, and a correction without bound would let it decide.

    Args:
        state_dict: the model; not changed.
        counts: its training examples of each class, shape `(classes,)`.
        everybody: those of all models together.
        bias: key of the last layer's bias.

    Source: logit adjustment, Menon et al. (2021).
    """
    old = state_dict[bias]
    change = _softly(everybody) - _softly(counts)
    return like(
        state_dict, {**state_dict, bias: (old.double() + change.to(old.device)).to(old.dtype)}
    )


def _softly(counts: Tensor) -> Tensor:
    return log_prior(counts, (SMOOTHING * counts.double().mean()).clamp_min(1))


def class_aware_head(
    merged: StateDict,
    state_dicts: Sequence[StateDict],
    counts: Sequence[Tensor],
    weight: str,
    bias: str | None = None,
) -> dict[str, Tensor]:
    """Return the merged model with the rows of its last layer averaged by class counts.

    Row `c` is the mean of the models' rows `c`, weighted by how many examples of class `c` each
    has seen; a class that nobody has seen keeps the merged row. Each model's bias first loses the
    log of its own label prior (with one example added to each class), and the mean gains that of
    all together: a model says nothing about classes just because it has seen few.

    Args:
        merged: the merged model; not changed.
        state_dicts: the aligned models.
        counts: for each model its training examples of each class, shape `(classes,)`.
        weight: key of the last layer's weight, shape `(classes, features)`.
        bias: key of its bias, shape `(classes,)`; None if it has none.

    Raises:
        ValueError: not one row of counts a model, counts of another length, negative or not
            finite, or all 0.

    Source: logit adjustment of Menon et al. (2021); class-wise averaging as in Luo et al. (2021).
    """
    classes = len(merged[weight])
    if len(counts) != len(state_dicts):
        raise ValueError(f"label counts of {len(counts)} models for {len(state_dicts)} models")
    for each in counts:
        check_counts(each, classes)
    if not any(bool(each.any()) for each in counts):
        raise ValueError("all label counts are 0")
    table = torch.stack([each.double() for each in counts]).to(merged[weight].device)
    seen = table.sum(0) > 0
    shares = table / torch.where(seen, table.sum(0), 1.0)
    new = dict(merged)

    def put(key: str, rows: Tensor) -> None:
        old = merged[key]
        kept = seen.view(-1, *[1] * (old.ndim - 1))
        new[key] = torch.where(kept, rows, old.double()).to(old.dtype)

    rows = torch.stack([state_dict[weight].detach().double() for state_dict in state_dicts])
    put(weight, torch.einsum("nc,nc...->c...", shares, rows))
    if bias is not None:
        biases = torch.stack([state_dict[bias].detach().double() for state_dict in state_dicts])
        own = torch.stack([log_prior(each) for each in table])
        put(bias, (shares * (biases - own)).sum(0) + log_prior(table.sum(0)))
    return like(merged, new)
