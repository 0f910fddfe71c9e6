"""The sums of a logistic regression over clients: what clients send, and the checks of it.

With features X (a constant 1 as the last one), one-hot labels Y and the class probabilities P of a
head W, the gradient of the summed loss is X^T P - X^T Y. Clients send X^T X and X^T Y once, and
X^T P for each head. Sums over examples add up exactly over clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_rebasin.forward import evaluating, forward_hooks, inputs_and_labels
from fl_rebasin.merging.clients import Question, Request, Tensors
from fl_rebasin.merging.sum_checks import MAX_COUNT, check_gram, check_sum

HELD_BACK_EVERY = 10
"""Every tenth example of a client is held back, to decide which head is best."""
MAX_SCALE = 10.0
"""A client whose features have a mean square this many times the median is dropped."""
ROUNDING = 1e-3
"""Relative error that the bounds on sums allow for, since features are in single precision."""


@dataclass(frozen=True)
class FeatureSums:
    """The sums over a client's features and labels, float64.

    Attributes:
        gram: X^T X, shape `(features + 1, features + 1)`.
        class_sums: X^T Y, shape `(features + 1, classes)`; its last row counts the examples.
    """

    gram: Tensor
    class_sums: Tensor


@dataclass(frozen=True)
class HeadSums:
    """The sums over a client's class probabilities under one head, float64.

    Attributes:
        probability_sums: X^T P, shape `(features + 1, classes)`.
        squares: column sums of P^2, shape `(classes,)`.
        losses: summed cross-entropy of the fitted and of the held-back examples, shape `(2,)`.
        held_back: number of held-back examples.
    """

    probability_sums: Tensor
    squares: Tensor
    losses: Tensor
    held_back: float


def _features(model: nn.Module, layer: str, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return what the last layer sees, with a constant 1, and the labels of all examples."""
    seen: list[Tensor] = []
    features, labels = [], []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        seen.append(args[0].detach())

    hooks = [(model.get_submodule(layer), record)]
    with forward_hooks(hooks), evaluating(model), torch.no_grad():
        for batch in batches:
            inputs, classes = inputs_and_labels(batch, "a joint head")
            model(inputs)
            rows = seen.pop().float()
            if rows.ndim != 2 or classes.shape != rows.shape[:1] or classes.is_floating_point():
                raise ValueError(
                    "a joint head needs one class number for each example, got labels of shape "
                    f"{tuple(classes.shape)} and dtype {classes.dtype} for features of shape "
                    f"{tuple(rows.shape)}"
                )
            features.append(F.pad(rows, (0, 1), value=1.0).cpu())
            labels.append(classes.long().cpu())
    if not features:
        raise ValueError("no example to fit the head on")
    return torch.cat(features), torch.cat(labels)


def _answer_features(model: nn.Module, batches: Iterable[Any], request: Request) -> Tensors:
    """Compute the features once, keep them, and return the sums over them."""
    model.load_state_dict(request.states["merged"])
    features, labels = _features(model, str(request.config["layer"]), batches)
    classes = int(request.config["classes"])
    if not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"a label is not a class number from 0 to {classes - 1}")
    request.memory["features"] = features
    request.memory["labels"] = labels
    fitted = _is_fitted(len(labels))
    x, y = features[fitted].double(), F.one_hot(labels[fitted], classes).double()
    return {"gram": x.T @ x, "class-sums": x.T @ y}


def _is_fitted(count: int) -> Tensor:
    """Return which examples are fitted; the others are held back. Shape `(count,)`."""
    return torch.arange(count) % HELD_BACK_EVERY != HELD_BACK_EVERY - 1


def _answer_head(model: nn.Module, batches: Iterable[Any], request: Request) -> Tensors:
    """Return the sums over the kept features for one head."""
    if "features" not in request.memory:
        raise ValueError("the features of this round are not kept: the context was lost")
    features, labels = request.memory["features"], request.memory["labels"]
    fitted = _is_fitted(len(labels))
    logits = features.double() @ request.states["head"]["weight"].double()
    logs = logits.log_softmax(1)
    losses = F.nll_loss(logs, labels, reduction="none")
    probabilities = logs[fitted].exp()
    return {
        "probability-sums": features[fitted].double().T @ probabilities,
        "squares": probabilities.square().sum(0),
        "losses": torch.stack([losses[fitted].sum(), losses[~fitted].sum()]),
        "held-back": torch.tensor([int((~fitted).sum())]),
    }


FEATURES = Question("joint-head-features", "feature sums", _answer_features, data="all")
HEAD = Question("joint-head", "head sums", _answer_head, data="all")


def read_features(tensors: Tensors, features: int, classes: int) -> FeatureSums:
    """Return one client's sums over features.

    By Cauchy and Schwarz, |X_j^T Y_c|^2 <= |X_j|^2 n_c: a client cannot claim more.

    Raises:
        ValueError: they are not what the question asks for, or impossible.
    """
    gram = _checked(tensors, "gram", (features + 1, features + 1))
    class_sums = _checked(tensors, "class-sums", (features + 1, classes))
    _check_gram(gram)
    counts, total = class_sums[-1], float(gram[-1, -1])
    if not 0 < total <= MAX_COUNT or float(counts.min()) < 0:
        raise ValueError(f"{total} examples of {counts.min()} or more a class are impossible")
    if abs(float(counts.sum()) - total) > ROUNDING * total:
        raise ValueError("the examples of all classes are not all examples")
    _check_bound("class-sums", class_sums, gram, counts)
    return FeatureSums(gram, class_sums)


def read_head(tensors: Tensors, known: FeatureSums) -> HeadSums:
    """Return one client's sums for a head.

    By Cauchy and Schwarz, |X_j^T P_c|^2 <= |X_j|^2 sum(P_c), since probabilities are at most 1.

    Args:
        tensors: what the client sent.
        known: the client's sums over features.

    Raises:
        ValueError: they are not what the question asks for, or impossible.
    """
    features, classes = known.class_sums.shape
    sums = _checked(tensors, "probability-sums", (features, classes))
    squares = _checked(tensors, "squares", (classes,))
    losses = _checked(tensors, "losses", (2,))
    count, total = tensors["held-back"], float(known.gram[-1, -1])
    if count.dtype != torch.int64 or count.shape != (1,) or not 0 <= int(count) <= total:
        raise ValueError(f"{str(count.tolist())[:20]} is not a number of held-back examples")
    if float(losses.min()) < 0:
        raise ValueError("a loss is negative")
    mass = sums[-1]
    if float(mass.min()) < 0 or abs(float(mass.sum()) - total) > ROUNDING * total:
        raise ValueError("the probabilities do not sum to the number of examples")
    _check_bound("probability-sums", sums, known.gram, mass)
    if float(squares.min()) < 0 or bool((squares > mass * (1 + ROUNDING) + ROUNDING).any()):
        raise ValueError("squares of probabilities exceed the probabilities")
    return HeadSums(sums, squares, losses, int(count))


def _checked(tensors: Tensors, key: str, shape: tuple[int, ...]) -> Tensor:
    value = tensors[key]
    check_sum(key, value, shape)
    return value


def _check_gram(gram: Tensor) -> None:
    check_gram("X^T X", gram)
    diagonal = gram.diagonal()
    bound = torch.outer(diagonal, diagonal).sqrt()
    if bool((gram.abs() > bound * (1 + ROUNDING) + ROUNDING).any()):
        raise ValueError("X^T X has an entry beyond what its diagonal allows")


def _check_bound(key: str, sums: Tensor, gram: Tensor, mass: Tensor) -> None:
    bound = torch.outer(gram.diagonal(), mass).sqrt()
    if bool((sums.abs() > bound * (1 + ROUNDING) + ROUNDING).any()):
        raise ValueError(f"{key} holds a sum beyond what its examples allow")


def with_usual_scale(known: dict[int, FeatureSums]) -> tuple[dict[int, FeatureSums], list[str]]:
    """Return the clients whose features have a usual scale, and what is wrong with the others.

    All clients compute their features with the same body. A mean square far above the (lower)
    median over clients would let a client outweigh the others.
    """
    scales = {
        client: float(sums.gram.diagonal()[:-1].sum() / sums.gram[-1, -1])
        for client, sums in known.items()
    }
    limit = MAX_SCALE * median_low(scales.values()) if scales else 0.0
    usual = {client: sums for client, sums in known.items() if scales[client] <= limit}
    problems = [
        f"{FEATURES.subject} of client {client} dropped: the mean square of its features is "
        f"{scales[client]:.3g}, at most {limit:.3g} is usual"
        for client in known
        if client not in usual
    ]
    return usual, problems


def share_of(sums: FeatureSums, examples: float) -> float:
    """Return the factor by which a client's sums count, so that it has at most its examples."""
    return min(1.0, examples / float(sums.gram[-1, -1]))


def pooled_features(sums: Sequence[FeatureSums], shares: Sequence[float]) -> FeatureSums:
    """Return the sums over all clients, each times its share."""
    return FeatureSums(
        _weighted_sum([each.gram for each in sums], shares),
        _weighted_sum([each.class_sums for each in sums], shares),
    )


def pooled_heads(sums: Sequence[HeadSums], shares: Sequence[float]) -> HeadSums:
    """Return the sums over all clients, each times its share."""
    return HeadSums(
        _weighted_sum([each.probability_sums for each in sums], shares),
        _weighted_sum([each.squares for each in sums], shares),
        _weighted_sum([each.losses for each in sums], shares),
        sum(each.held_back * share for each, share in zip(sums, shares, strict=True)),
    )


def _weighted_sum(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    pairs = zip(tensors, shares, strict=True)
    return torch.stack([tensor * share for tensor, share in pairs]).sum(0)
