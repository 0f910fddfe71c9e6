"""Label counts in the last layer: each class is decided by the models that have seen it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fl_rebasin.forward import call, evaluating, forward_hooks
from fl_rebasin.merging.clients import Clients
from fl_rebasin.merging.finishing_step import Finish, Finished
from fl_rebasin.state_dicts import StateDict, like

SMOOTHING = 0.1
"""Share of the mean count that is added to the count of each class."""


def last_layer(model: nn.Module, inputs: Any) -> tuple[str, str | None]:
    """Return the keys of weight and bias of the linear layer whose output the model returns.

    The model must return that output unchanged: the rows of the layer must belong to the classes
    and nothing else.

    Args:
        model: the model; not changed.
        inputs: a batch, or a tuple of positional or a dict of keyword arguments.

    Raises:
        ValueError: the model returns something else, or the layer shares or computes its weight.
    """
    results: list[tuple[str, nn.Linear, Tensor, int]] = []
    names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        results.append((names[module], module, output, output._version))

    hooks = [(module, record) for module in names if isinstance(module, nn.Linear)]
    with forward_hooks(hooks), evaluating(model), torch.no_grad():
        outputs = call(model, inputs)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module, output, version in reversed(results):
        if output is outputs and output._version == version:
            own = [module._parameters.get(key) for key in ("weight", "bias")]
            if own[0] is None or any(uses[id(each)] > 1 for each in own):
                raise ValueError(
                    f"labels need a last layer with a weight of its own: {name or 'it'} "
                    "shares or computes its weight"
                )
            prefix = f"{name}." if name else ""
            return f"{prefix}weight", None if module.bias is None else f"{prefix}bias"
    raise ValueError("labels need a model that returns the output of a linear layer")


def check_counts(counts: Tensor, classes: int) -> None:
    """Raise `ValueError` unless these can be the numbers of examples of each class."""
    if counts.shape != (classes,):
        raise ValueError(f"label counts of shape {tuple(counts.shape)} for {classes} classes")
    if not bool((torch.isfinite(counts) & (counts >= 0)).all()):
        raise ValueError("label counts must be finite and not negative")


def log_prior(counts: Tensor, added: Tensor | float = 1.0) -> Tensor:
    """Return the log of a label prior after adding some examples to each class, float64."""
    smoothed = counts.double() + added
    return (smoothed / smoothed.sum()).log()


def without_label_prior(
    state_dict: StateDict, counts: Tensor, total: Tensor, bias: str
) -> dict[str, Tensor]:
    """Return a model whose last bias reflects the label prior of all models instead of its own.

    With priors p_own and p_all: bias_c <- bias_c - log p_own(c) + log p_all(c). A tenth of the mean
    count is added to each class: a model that never saw a class knows nothing about its logit, and
    an unbounded correction would let that logit decide.

    Args:
        state_dict: the model; not changed.
        counts: its training examples of each class, shape `(classes,)`.
        total: the training examples of all models together, shape `(classes,)`.
        bias: key of the last layer's bias.

    Source: logit adjustment, Menon et al. (2021).
    """
    old = state_dict[bias]
    change = _smoothed_prior(total) - _smoothed_prior(counts)
    corrected = (old.double() + change.to(old.device)).to(old.dtype)
    return like(state_dict, {**state_dict, bias: corrected})


def _smoothed_prior(counts: Tensor) -> Tensor:
    return log_prior(counts, (SMOOTHING * counts.double().mean()).clamp_min(1))


def class_aware_head(
    merged: StateDict,
    state_dicts: Sequence[StateDict],
    counts: Sequence[Tensor],
    weight: str,
    bias: str | None = None,
) -> dict[str, Tensor]:
    """Return the merged model with the rows of its last layer averaged by class counts.

    With n_ic the examples of class c that model i has seen, row c of the weight is
    sum_i n_ic W_ic / sum_i n_ic, and with label priors p_i and p_all (one example is added to each
    class) entry c of the bias is

        sum_i n_ic (b_ic - log p_i(c)) / sum_i n_ic + log p_all(c)

    so that a model does not vote against a class just because it has seen few examples. A class
    without examples keeps the merged row and bias.

    Args:
        merged: the merged model; not changed.
        state_dicts: the aligned models.
        counts: the training examples of each class of each model, shape `(classes,)`.
        weight: key of the last layer's weight, shape `(classes, features)`.
        bias: key of its bias, shape `(classes,)`; None if it has none.

    Raises:
        ValueError: the number of counts differs from that of the models, or counts have another
            length, are negative or not finite, or are all 0.

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

    def where_seen(key: str, rows: Tensor) -> Tensor:
        old = merged[key]
        mask = seen.view(-1, *[1] * (old.ndim - 1))
        return torch.where(mask, rows, old.double()).to(old.dtype)

    rows = torch.stack([state_dict[weight].detach().double() for state_dict in state_dicts])
    new = {**merged, weight: where_seen(weight, torch.einsum("nc,nc...->c...", shares, rows))}
    if bias is not None:
        biases = torch.stack([state_dict[bias].detach().double() for state_dict in state_dicts])
        own = torch.stack([log_prior(each) for each in table])
        new[bias] = where_seen(bias, (shares * (biases - own)).sum(0) + log_prior(table.sum(0)))
    return like(merged, new)


def check_metric_name(label_counts: str) -> None:
    """Raise `ValueError` unless an option can be the name of a metric."""
    if not isinstance(label_counts, str) or not label_counts:
        raise ValueError(
            f"label_counts is {label_counts!r}: give the name of the metric that lists a client's "
            "training examples of each class"
        )


@dataclass(frozen=True)
class ClassAwareHead:
    """Finishing step: averages the rows of the last layer by the clients' label counts.

    It asks the clients nothing: they report the counts in a metric of their training reply. Clients
    without valid counts do not affect the last layer. See `class_aware_head`.

    Attributes:
        label_counts: name of the metric that lists the client's training examples of each class.
    """

    label_counts: str

    name: ClassVar[str] = "class-aware-head"
    needs_models: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_metric_name(self.label_counts)

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish:
        """Return the step for a model that ends in a linear layer.

        Raises:
            ValueError: the model ends in something else.
        """
        weight, bias = last_layer(model, example_inputs)

        def finish(merged: StateDict, clients: Clients) -> Finished:
            counts = clients.label_counts(self.label_counts, len(merged[weight]))
            if not counts:
                return Finished(merged, applied=False)
            models = [clients.models[client] for client in counts]
            headed = class_aware_head(merged, models, list(counts.values()), weight, bias)
            return Finished(headed)

        return finish
