"""The models that a round may end with: aggregated from each alignment, then finished."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fl_rebasin.flower.aggregation import aggregate, copy_of
from fl_rebasin.flower.finishing import Finishing
from fl_rebasin.flower.replies import ClientModel, reply_with_model, unchanged_reply
from fl_rebasin.flower.round import Round
from fl_rebasin.flower.round_clients import RoundClients
from fl_rebasin.merging.clients import Costs
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.spec import Permutation


@dataclass(frozen=True)
class Candidate:
    """A model that a round may end with.

    Attributes:
        arrays: the model; None if the strategy aggregated none, or one that is not finite.
        metrics: what the strategy aggregated from the replies' metrics.
        strategy: the strategy that aggregated it, in the state that goes with the model.
    """

    arrays: ArrayRecord | None
    metrics: MetricRecord | None
    strategy: Strategy


def form_candidates(
    strategy: Strategy,
    current: Round,
    clients: list[ClientModel],
    failed: Sequence[Message],
    alignments: Mapping[str, Sequence[Permutation]],
    finishing: Finishing,
) -> tuple[dict[str, Candidate], list[Costs]]:
    """Aggregate each alignment, and finish the results.

    Args:
        strategy: the strategy that aggregates. With several alignments each is aggregated by a
            copy: the strategy may keep state.
        current: the round.
        clients: the clients; their models are released after the last alignment unless a step
            needs them.
        failed: replies of clients that failed, which the strategy gets as well.
        alignments: permutations of the clients' models by name.
        finishing: the finishing steps.

    Returns:
        The candidates by name, and what the questions to the clients cost.
    """
    round_clients = RoundClients(
        current.grid,
        {client.node: client.reply for client in clients},
        weights={client.node: client.weight for client in clients},
    )
    candidates: dict[str, Candidate] = {}
    costs: list[Costs] = []
    for place, (name, permutations) in enumerate(alignments.items(), 1):
        alone, last = len(alignments) == 1, place == len(alignments)
        trial = strategy if alone else copy_of(strategy, current.grid)
        keep = finishing.needs_models
        rebuilt, models = _rebuilt(current, clients, permutations, keep=keep, last=last)
        arrays, metrics = aggregate(trial, current.arrays, current.number, [*failed, *rebuilt])
        del rebuilt
        # Flower's views of records are reference cycles, which would keep all the models.
        gc.collect(1)
        if arrays is None:
            candidates[name] = Candidate(None, metrics, trial)
            continue
        found, spent = finishing.apply(
            arrays, replace(round_clients, models=models), current.number
        )
        costs += spent
        for variant in found:
            candidates[name + variant.name] = Candidate(variant.arrays, metrics, trial)
    return candidates, costs


def _rebuilt(
    current: Round,
    clients: list[ClientModel],
    permutations: Sequence[Permutation],
    *,
    keep: bool,
    last: bool,
) -> tuple[list[Message], dict[int, StateDict]]:
    """Return replies with permuted models, and the models by node if they are to be kept.

    The last time each model is released as soon as its reply is rebuilt.
    """
    rebuilt: list[Message] = []
    models: dict[int, StateDict] = {}
    for place, (client, permutation) in enumerate(zip(clients, permutations, strict=True)):
        model: StateDict = client.state_dict
        if permutation.is_identity:
            rebuilt.append(unchanged_reply(client, current.arrays))
        elif keep:
            model = dict(_moved(current, client, permutation))
            rebuilt.append(reply_with_model(client, model.items()))
        else:
            rebuilt.append(reply_with_model(client, _moved(current, client, permutation)))
        if keep:
            models[client.node] = model
        elif last:
            clients[place] = replace(client, state_dict={}, record=None)
    return rebuilt, models


def _moved(
    current: Round, client: ClientModel, permutation: Permutation
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a permuted model in the global model's key order, one at a time."""
    for key in current.arrays:
        yield key, current.spec.move(key, client.state_dict[key], permutation)
