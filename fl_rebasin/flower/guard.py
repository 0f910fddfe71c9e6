"""The guard: clients say on data that they held back which of several models is best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import nn
from torch.nn import functional as F

from fl_rebasin.flower.questions import TIMEOUT, LoadFn, Question, ask, loaded
from fl_rebasin.forward import evaluating

QUESTION = Question("guard", "evaluation of candidates", "add_guard_handler")
MAX_COUNT = 10**15
TEMPERATURES = tuple(2 ** (place / 2) for place in range(-6, 9))
"""What logits are divided by, to see what a model is worth once it is as sure as it should be."""
MAX_LOSS = 1e6
"""A mean loss above this, or one that is NaN, counts as infinite."""


@dataclass(frozen=True)
class Scores:
    """What one client measured.

    Attributes:
        count: number of examples.
        losses: mean cross-entropy of each candidate, in nats, at the temperature that suits it
            best; infinite where it is not finite.
    """

    count: int
    losses: tuple[float, ...]


def add_guard_handler(app: ClientApp, load_held_back: LoadFn) -> None:
    """Let a ClientApp measure candidate models on data that it did not train on.

    Args:
        app: the ClientApp; gets a query handler for the action `rebasin_guard`.
        load_held_back: returns a module of the architecture, whose weights are overwritten, and
            batches of inputs and labels (class numbers) that the client's training leaves out.

    Example:
        >>> app = ClientApp()
        >>> held_back = [(torch.rand(8, 2), torch.zeros(8, dtype=torch.int64))]
        >>> add_guard_handler(app, lambda context: (nn.Linear(2, 2), held_back))
    """

    @app.query(QUESTION.action)
    def evaluate(message: Message, context: Context) -> Message:
        model, batches = load_held_back(context)
        pairs = list(batches)
        losses = []
        count = 0
        for record in message.content.array_records.values():
            count, loss = _mean_loss(loaded(model, record), pairs)
            losses.append(loss)
        metrics = MetricRecord({"num-examples": count, "loss": losses})
        return Message(RecordDict({"scores": metrics}), reply_to=message)


def _mean_loss(model: nn.Module, pairs: Iterable[Any]) -> tuple[int, float]:
    """Return the number of examples and their mean cross-entropy at the best temperature.

    A model that is merged from others is less sure than one that is fitted to them, whichever
    classes they prefer. How sure it is one number sets right (Guo et al., On Calibration of Modern
    Neural Networks, ICML 2017), and every further training round does.
    """
    count, totals = 0, torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    with evaluating(model), torch.no_grad():
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError("the guard needs batches of inputs and labels")
            inputs, labels = pair
            logits = model(inputs).double()
            totals += torch.stack(
                [
                    F.cross_entropy(logits / temperature, labels, reduction="sum").cpu()
                    for temperature in TEMPERATURES
                ]
            )
            count += labels.numel()
    if not count:
        raise ValueError("no held-back example to judge models by")
    return count, float(totals.min()) / count  # NaN goes through.


def choose_on_clients(
    grid: Grid,
    node_ids: Sequence[int],
    candidates: Mapping[str, ArrayRecord],
    timeout: float = TIMEOUT,
) -> tuple[str, dict[str, float | int]]:
    """Let clients evaluate candidate models; return the best by the example-weighted loss.

    Each client takes the loss of each model at the temperature that suits it best.

    Args:
        grid: the ServerApp's grid.
        node_ids: clients to ask; each needs `add_guard_handler`.
        candidates: state dicts by name; the first is taken where nobody answers well.
        timeout: seconds to wait for the answers.

    Returns:
        The name of the best candidate (of equal ones the first), and metrics: `guard-clients`,
        `guard-seconds`, `guard-bytes`, and for each candidate `guard-loss-NAME`.
    """
    names = list(candidates)
    content = RecordDict({f"candidate-{i}": candidates[name] for i, name in enumerate(names)})
    answers = ask(
        grid, QUESTION, dict.fromkeys(node_ids, content),
        lambda reply: _read(reply, len(names)), timeout,
    )  # fmt: skip
    scores = list(answers.by_node.values())
    if not scores:
        log(WARNING, "no client judged the candidates: %s is taken", names[0])
        return names[0], answers.metrics
    total = sum(score.count for score in scores)
    losses = {
        name: sum(score.count / total * score.losses[place] for score in scores)
        for place, name in enumerate(names)
    }
    best = min(names, key=losses.__getitem__)
    log(
        INFO, "held-back loss of the candidates: %s; %s is taken",
        *(", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()), best),
    )  # fmt: skip
    return best, {**answers.metrics, **{f"guard-loss-{n}": loss for n, loss in losses.items()}}


def _read(content: RecordDict, candidates: int) -> Scores:
    """Return a reply's scores.

    Raises:
        ValueError: they are not what was asked for.
    """
    record = content.metric_records["scores"]
    count, losses = record["num-examples"], record["loss"]
    if not isinstance(count, int) or not 0 < count <= MAX_COUNT:
        raise ValueError(f"{str(count)[:20]} is no number of examples")
    if not isinstance(losses, list) or len(losses) != candidates:
        raise ValueError(f"{candidates} losses were asked for")
    found = [float(cast(float, loss)) for loss in losses]
    if bad := [loss for loss in found if loss < 0]:
        raise ValueError(f"a loss of {bad[0]} is impossible")
    # A candidate that diverges on one client is out, not the client; written so that NaN is too.
    found = [loss if loss <= MAX_LOSS else float("inf") for loss in found]
    if min(found) == float("inf"):
        raise ValueError("none of its losses is finite")
    return Scores(count, tuple(found))
