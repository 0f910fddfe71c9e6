"""The clients of a round, asked through Flower's grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from fl_rebasin.flower.log_text import reason
from fl_rebasin.flower.questions import ask
from fl_rebasin.flower.replies import read_label_counts
from fl_rebasin.merging.clients import Answer, Answers, Question, Read, Request
from fl_rebasin.merging.heads import check_counts
from fl_rebasin.state_dicts import StateDict


@dataclass(frozen=True)
class RoundClients:
    """The clients whose replies a round uses; what finishing steps ask (`merging.clients.Clients`).

    Attributes:
        grid: the ServerApp's grid.
        replies: the valid training reply of each node, without its model.
        models: the aligned model of each node, if a step needs them.
        weights: the weight of each node's training reply; an answer counts for at most as many
            examples.
        counts: label counts that have been read, by metric.
    """

    grid: Grid
    replies: Mapping[int, Message]
    models: Mapping[int, StateDict] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)
    counts: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    @property
    def ids(self) -> Sequence[int]:
        """The nodes."""
        return list(self.replies)

    def ask(
        self, question: Question, requests: Mapping[int, Request], read: Read[Answer]
    ) -> Answers[Answer]:
        """Ask nodes a question; drop invalid answers, and name them in the log."""
        records: dict[int, ArrayRecord] = {}  # A state dict that goes to all is packed once.

        def packed(state: StateDict) -> ArrayRecord:
            if id(state) not in records:
                records[id(state)] = ArrayRecord(dict(state))
            return records[id(state)]

        contents = {
            node: RecordDict(
                {
                    **{name: packed(state) for name, state in request.states.items()},
                    "config": ConfigRecord(dict(request.config)),
                }
            )
            for node, request in requests.items()
        }
        return ask(self.grid, question, contents, read)

    def examples(self, client: int) -> float:
        """Return the weight of a node's training reply, which no answer may exceed."""
        return self.weights.get(client, math.inf)

    def label_counts(self, metric: str, classes: int) -> dict[int, Tensor]:
        """Return the label counts of the nodes that report valid ones.

        Args:
            metric: name of the metric that lists the training examples of each class.
            classes: number of classes.

        Returns:
            For each node the counts, float64, shape `(classes,)`.
        """
        if metric not in self.counts:
            known = {}
            for node, reply in self.replies.items():
                try:
                    known[node] = _valid_counts(reply, metric, classes)
                except Exception as error:  # A client may send anything.
                    log(WARNING, "label counts of node %s dropped: %s", node, reason(error))
            self.counts[metric] = known
        return self.counts[metric]


def _valid_counts(reply: Message, metric: str, classes: int) -> Tensor:
    counts = read_label_counts(reply, metric)
    check_counts(counts, classes)
    if not bool(counts.any()):
        raise ValueError("all label counts are 0")
    return counts
