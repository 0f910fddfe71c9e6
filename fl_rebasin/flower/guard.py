"""The guard: clients judge, on data that they held back, which of several models is best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import nn
from torch.nn import functional as F

from fl_rebasin.flower.align import Metrics, to_reference
from fl_rebasin.flower.questions import ask
from fl_rebasin.flower.replies import ClientModel
from fl_rebasin.flower.round import Round
from fl_rebasin.forward import evaluating, inputs_and_labels
from fl_rebasin.matching.many import all_identity
from fl_rebasin.merging.clients import Question, Request, Tensors
from fl_rebasin.symmetry.spec import Permutation

MAX_COUNT = 10**15
"""More examples than any client can hold back: an answer above it is invalid."""
TEMPERATURES = tuple(2 ** (place / 2) for place in range(-6, 9))
"""Divisors of the logits: a model is judged at the temperature that suits it best."""
MAX_LOSS = 1e6
"""A mean loss above this, or one that is NaN, counts as infinite."""


@dataclass(frozen=True)
class Choice:
    """The candidate that the guard chose.

    Attributes:
        name: its name.
        metrics: what the question cost, and the held-back loss of each candidate.
    """

    name: str
    metrics: Metrics


@dataclass(frozen=True)
class Guard:
    """Forms several models, and lets the round's clients choose one on data that they held back.

    The candidates are the plain average, the aligned average and the average of the models aligned
    to the client with the most examples; each with BatchNorm statistics re-estimated (unless there
    are no finishing steps), and after each finishing step. The best example-weighted loss wins,
    each candidate at the temperature that suits it best. The wrapped strategy aggregates once
    for each candidate, and keeps the state that belongs to the best.
    """

    def alignments(
        self, current: Round, clients: Sequence[ClientModel], aligned: Sequence[Permutation]
    ) -> dict[str, list[Permutation]]:
        """Return the alignments to try, by name; only one if no unit moves."""
        found = {"aligned": list(aligned)}
        if all_identity(aligned):
            return found
        found["naive"] = [current.spec.identity() for _ in clients]
        if len(clients) > 2:
            reference = to_reference(current, clients)
            if reference != list(aligned) and not all_identity(reference):
                found["reference"] = reference
        return found

    def choose(
        self, grid: Grid, nodes: Sequence[int], candidates: Mapping[str, ArrayRecord]
    ) -> Choice:
        """Let clients evaluate candidate models, and choose the best.

        Args:
            grid: the ServerApp's grid.
            nodes: the clients to ask.
            candidates: models by name; the first one wins a tie, and if no client answers.

        Returns:
            The candidate with the lowest loss `sum_i n_i loss_i / sum_i n_i`, where client `i` has
            `n_i` held-back examples.
        """
        names = list(candidates)
        if len(names) == 1:
            return Choice(names[0], {})
        content = RecordDict({f"candidate-{i}": candidates[name] for i, name in enumerate(names)})
        answers = ask(
            grid, LOSSES, dict.fromkeys(nodes, content), lambda tensors: _read(tensors, len(names))
        )
        metrics: Metrics = answers.cost.metrics(LOSSES.name)
        scores = list(answers.by_client.values())
        if not scores:
            log(WARNING, "no client judged the candidates: %s is chosen", names[0])
            return Choice(names[0], metrics)
        total = sum(score.count for score in scores)
        losses = {
            name: sum(score.count / total * score.losses[place] for score in scores)
            for place, name in enumerate(names)
        }
        best = min(names, key=losses.__getitem__)
        table = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        log(INFO, "held-back loss of the candidates: %s; %s is chosen", table, best)
        return Choice(best, metrics | {f"guard-loss-{n}": loss for n, loss in losses.items()})


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


def _answer(model: nn.Module, batches: Iterable[Any], request: Request) -> Tensors:
    """Return the mean loss of each candidate on the client's held-back data."""
    pairs = [inputs_and_labels(batch, "the guard") for batch in batches]
    losses, count = [], 0
    for place in range(len(request.states)):
        model.load_state_dict(request.states[f"candidate-{place}"])
        count, loss = _mean_loss(model, pairs)
        losses.append(loss)
    return {"count": torch.tensor([count]), "losses": torch.tensor(losses, dtype=torch.float64)}


LOSSES = Question("guard", "evaluation of candidates", _answer, data="held-back")


def _mean_loss(model: nn.Module, pairs: Sequence[tuple[Any, Any]]) -> tuple[int, float]:
    """Return the number of examples and their mean cross-entropy at the best temperature.

    With logits z_k and labels y_k:  min over T of  1/n sum_k CE(z_k / T, y_k).

    A merged model is less confident than one that is fitted, whichever classes they prefer. One
    number corrects the confidence (Guo et al., On Calibration of Modern Neural Networks, ICML
    2017), and so does every further round of training.
    """
    count, totals = 0, torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    with evaluating(model), torch.no_grad():
        for inputs, labels in pairs:
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
    return count, float(totals.min()) / count  # NaN stays NaN.


def _read(tensors: Tensors, candidates: int) -> Scores:
    """Return the scores of one client.

    Raises:
        ValueError: they are not what the question asks for.
    """
    count, losses = tensors["count"], tensors["losses"]
    if count.dtype != torch.int64 or count.shape != (1,) or not 0 < int(count) <= MAX_COUNT:
        raise ValueError(f"{str(count.tolist())[:20]} is not a number of examples")
    if losses.dtype != torch.float64 or losses.shape != (candidates,):
        raise ValueError(
            f"expected {candidates} losses in float64, got {losses.dtype} of shape "
            f"{tuple(losses.shape)}"
        )
    found = [float(loss) for loss in losses]
    if bad := [loss for loss in found if loss < 0]:
        raise ValueError(f"a loss of {bad[0]} is impossible")
    # A loss that is too large rules out the candidate, not the client. Written so that NaN fails.
    found = [loss if loss <= MAX_LOSS else float("inf") for loss in found]
    if min(found) == float("inf"):
        raise ValueError("none of its losses is finite")
    return Scores(int(count), tuple(found))
