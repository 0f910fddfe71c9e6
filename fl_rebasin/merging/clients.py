"""Questions to the clients, which hold the data: answers are sums and means, never the data."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

from torch import Tensor, nn

from fl_rebasin.state_dicts import StateDict

Tensors: TypeAlias = dict[str, Tensor]
"""Tensors by name."""
Data: TypeAlias = Literal["some", "all", "held-back"]
"""Which of its data a client answers a question with."""
Answer = TypeVar("Answer")
Read: TypeAlias = Callable[[Tensors], Answer]
"""Turns the tensors of one client into an answer, or raises `ValueError` if they are invalid."""


@dataclass(frozen=True)
class Request:
    """What one client gets with a question.

    Attributes:
        states: state dicts by name, such as `merged` and `own`.
        config: numbers, strings and booleans by name.
        memory: tensors that the client keeps from one question to the next; the server neither
            sends nor sees them.
    """

    states: Mapping[str, StateDict]
    config: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    memory: MutableMapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A question that clients answer on their own data.

    Attributes:
        name: short name in lower case, with hyphens.
        subject: what the client is asked for, as log lines name it.
        answer: computes the answer on the client, from a module of the architecture (its weights
            may be overwritten), the client's batches and the request.
        data: which batches the client uses: some of its training data, all of them, or those that
            its training leaves out.
    """

    name: str
    subject: str
    answer: Callable[[nn.Module, Iterable[Any], Request], Tensors]
    data: Data = "some"


@dataclass(frozen=True)
class Cost:
    """What one or several questions cost.

    Attributes:
        clients: number of clients with a valid answer; of several questions the smallest number.
        seconds: time until the last answer.
        bytes: bytes of all arrays, in both directions.
        messages: number of questions.
    """

    clients: int
    seconds: float
    bytes: int
    messages: int = 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            min(self.clients, other.clients),
            self.seconds + other.seconds,
            self.bytes + other.bytes,
            self.messages + other.messages,
        )

    def metrics(self, name: str) -> dict[str, int | float]:
        """Return the cost as metrics: `NAME-clients`, `NAME-seconds`, and so on."""
        return {f"{name}-{key}": value for key, value in vars(self).items()}


Costs: TypeAlias = Mapping[str, Cost]
"""Costs by the name of what caused them."""


def total_costs(costs: Iterable[Costs]) -> dict[str, Cost]:
    """Return the sum of costs, name by name."""
    total: dict[str, Cost] = {}
    for each in costs:
        for name, cost in each.items():
            total[name] = total[name] + cost if name in total else cost
    return total


@dataclass(frozen=True)
class Answers(Generic[Answer]):
    """The answers to one question.

    Attributes:
        by_client: the valid answers.
        cost: what the question cost.
    """

    by_client: dict[int, Answer]
    cost: Cost


class Clients(Protocol):
    """The clients that trained the models of a merge, wherever they are.

    Attributes:
        models: the aligned model of each client; empty if no step needs them.
    """

    @property
    def models(self) -> Mapping[int, StateDict]:
        """The aligned model of each client."""

    @property
    def ids(self) -> Sequence[int]:
        """The clients that can be asked."""

    def ask(
        self, question: Question, requests: Mapping[int, Request], read: Read[Answer]
    ) -> Answers[Answer]:
        """Ask clients a question; leave out answers that `read` rejects."""

    def examples(self, client: int) -> float:
        """Return the most examples that a client's sums may count for."""

    def label_counts(self, metric: str, classes: int) -> dict[int, Tensor]:
        """Return how many training examples of each class the clients report in a metric."""


class LocalClients:
    """Clients whose data are all in one place: no message, and errors are raised.

    Args:
        model: a module of the architecture; not changed.
        models: the aligned models.
        data: the batches of each client.
    """

    def __init__(
        self, model: nn.Module, models: Sequence[StateDict], data: Sequence[Sequence[Any]]
    ) -> None:
        self.models: Mapping[int, StateDict] = dict(enumerate(models))
        self._model = model
        self._data = data
        self._memory: dict[int, dict[str, Tensor]] = {client: {} for client in self.models}

    @property
    def ids(self) -> Sequence[int]:
        """The clients by number."""
        return list(self.models)

    def ask(
        self, question: Question, requests: Mapping[int, Request], read: Read[Answer]
    ) -> Answers[Answer]:
        """Compute the answers one after the other."""
        started = time.perf_counter()
        answers = {}
        for client, request in requests.items():
            kept = replace(request, memory=self._memory[client])
            tensors = question.answer(copy.deepcopy(self._model), self._data[client], kept)
            answers[client] = read({key: value.cpu() for key, value in tensors.items()})
        return Answers(answers, Cost(len(answers), time.perf_counter() - started, bytes=0))

    def examples(self, client: int) -> float:
        """Return infinity: these clients are trusted."""
        return math.inf

    def label_counts(self, metric: str, classes: int) -> dict[int, Tensor]:
        """Raise `ValueError`: metrics are what Flower's clients report."""
        raise ValueError(
            f"label_counts={metric!r} names a metric of Flower clients: leave it out here"
        )
