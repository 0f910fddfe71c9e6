"""How a round is aligned: a permutation for each client's model, found here or by the clients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from logging import INFO
from numbers import Real
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore import log
from torch import nn

from fl_rebasin.flower.questions import ask
from fl_rebasin.flower.replies import ClientModel
from fl_rebasin.flower.round import Round
from fl_rebasin.forward import inputs_and_labels
from fl_rebasin.matching.activations import match_activations
from fl_rebasin.matching.many import (
    Alignment,
    align_many,
    all_identity,
    heaviest,
    mean_similarities,
    restore_unit_order,
)
from fl_rebasin.matching.objective import weights_of
from fl_rebasin.matching.straight_through import match_straight_through
from fl_rebasin.matching.weights import match_to, match_weights
from fl_rebasin.merging.clients import Question, Request, Tensors
from fl_rebasin.symmetry.serialization import spec_from_json, spec_to_json
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

Metrics: TypeAlias = dict[str, float | int]


@dataclass(frozen=True)
class Aligned:
    """How a round's models are permuted.

    Attributes:
        permutations: one for each client.
        metrics: what the alignment did, for the round's metrics.
    """

    permutations: list[Permutation]
    metrics: Metrics = field(default_factory=dict)


class AlignmentMethod(Protocol):
    """How a round is aligned: a small frozen object, checked when it is made."""

    def align(self, current: Round, clients: Sequence[ClientModel]) -> Aligned:
        """Return a permutation for each client's model."""


@runtime_checkable
class OneByOne(AlignmentMethod, Protocol):
    """A method that can align a model without the others, so that replies need not be kept."""

    @property
    def one_by_one(self) -> bool:
        """Whether it does so with its present options."""

    def align_one(self, current: Round, client: ClientModel) -> Permutation:
        """Return the permutation of one model."""


@dataclass(frozen=True)
class WeightMatching:
    """Matches units by their weights, on the server.

    Attributes:
        to: `"others"` aligns the models to one another (MergeMany): it maximises
            `sum_{i<j} w_i w_j <p_i(theta_i), p_j(theta_j)>`, then restores the unit order of the
            global model. `"global"` aligns each model to the global model alone: it maximises
            `<theta_global, p_i(theta_i)>`. This suits rounds that continue from a trained model: no
            client affects how another one is aligned, and the server needs to hold only one model
            at a time.

    Raises:
        ValueError: `to` is neither.

    Source: Git Re-Basin, sections 3.2 and 4 (Algorithms 1 and 3).
    """

    to: Literal["others", "global"] = "others"

    def __post_init__(self) -> None:
        if self.to not in (known := ("others", "global")):
            raise ValueError(f"unknown to={self.to!r}: use one of {', '.join(known)}")

    @property
    def one_by_one(self) -> bool:
        """Whether each model is aligned without the others."""
        return self.to == "global"

    def align(self, current: Round, clients: Sequence[ClientModel]) -> Aligned:
        """Return a permutation for each client's model."""
        started = time.perf_counter()
        if self.one_by_one:
            matches = [_match_to_global(current, client) for client in clients]
            sweeps = sum(count for _, count in matches)
            permutations = [permutation for permutation, _ in matches]
            return _measured(current, clients, permutations, {"rebasin-sweeps": sweeps}, started)
        found = _jointly(current, clients)
        return _measured(current, clients, list(found.permutations), _metrics_of(found), started)

    def align_one(self, current: Round, client: ClientModel) -> Permutation:
        """Match a model to the global one."""
        return _match_to_global(current, client)[0]


def _match_to_global(current: Round, client: ClientModel) -> tuple[Permutation, int]:
    """Return the permutation that matches a model to the global one, and the number of sweeps."""
    return match_to(current.reference, weights_of(current.spec, client.state_dict))


@dataclass(frozen=True)
class ActivationMatching:
    """Matches units by their activations: each client matches its model on its own data.

    The reference is the model of the client with the most examples. Where no unit needs to move,
    the clients are not asked.

    Attributes:
        then_weights: refine the result by weight matching of all models.

    Source: Git Re-Basin, section 3.1.
    """

    then_weights: bool = False

    def align(self, current: Round, clients: Sequence[ClientModel]) -> Aligned:
        """Return a permutation for each client's model."""
        config = {"method": "activations"}
        return _align_on_clients(current, clients, config, self.then_weights)


@dataclass(frozen=True)
class StraightThrough:
    """Learns each permutation by the loss of the merged model, on the client's own labelled data.

    The reference is the model of the client with the most examples.

    Attributes:
        epochs: passes over the client's batches.
        learning_rate: learning rate of Adam.

    Raises:
        ValueError: an option is out of range.

    Source: Git Re-Basin, section 3.3 (Algorithm 2).
    """

    epochs: int = 1
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"epochs must be a positive integer, got {self.epochs!r}")
        if not isinstance(self.learning_rate, Real) or not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate must be positive and finite, got {self.learning_rate!r}"
            )

    def align(self, current: Round, clients: Sequence[ClientModel]) -> Aligned:
        """Return a permutation for each client's model."""
        config = {
            "method": "straight-through",
            "epochs": self.epochs,
            "learning-rate": self.learning_rate,
        }
        return _align_on_clients(current, clients, config, then_weights=False)


def to_reference(current: Round, clients: Sequence[ClientModel]) -> list[Permutation]:
    """Return the permutations that match all models to the heaviest one, by their weights."""
    return list(_jointly(current, clients, method="reference").permutations)


def _jointly(current: Round, clients: Sequence[ClientModel], **options: Any) -> Alignment:
    models = [client.state_dict for client in clients]
    weights = [client.weight for client in clients]
    return align_many(current.spec, models, weights, unit_order_of=current.global_model, **options)


def _metrics_of(found: Alignment) -> Metrics:
    return {
        "rebasin-margin": min(found.margins.values(), default=1.0),
        "rebasin-sweeps": found.sweeps,
    }


def _align_on_clients(
    current: Round,
    clients: Sequence[ClientModel],
    config: dict[str, Any],
    then_weights: bool,
) -> Aligned:
    """Let the clients match their models, unless a proof shows that no unit needs to move."""
    started = time.perf_counter()
    found = _jointly(current, clients)
    metrics = _metrics_of(found)
    if not all_identity(found.permutations):
        matched, asked = _match_on_clients(current, clients, config)
        if then_weights:
            found = _jointly(current, clients, start=matched)
        else:
            models = [client.state_dict for client in clients]
            weights = [client.weight for client in clients]
            found = restore_unit_order(current.spec, models, weights, matched, current.global_model)
        sweeps = int(metrics["rebasin-sweeps"]) + found.sweeps
        metrics = {**metrics, "rebasin-sweeps": sweeps, **asked}
    return _measured(current, clients, list(found.permutations), metrics, started)


def _measured(
    current: Round,
    clients: Sequence[ClientModel],
    permutations: list[Permutation],
    metrics: Metrics,
    started: float,
) -> Aligned:
    """Add what an alignment did to its metrics, and log it in one line."""
    units = sum(permutation.moved for permutation in permutations)
    margin = metrics.get("rebasin-margin", 0.0)
    summary = f"nothing to do, margin {margin:.1f}"
    if margin < 1:
        models = [client.state_dict for client in clients]
        weights = [client.weight for client in clients]
        before, after = mean_similarities(current.spec, models, permutations, weights)
        summary = f"similarity {before:.3f} -> {after:.3f}"
        metrics = {
            "rebasin-similarity-before": before,
            "rebasin-similarity-after": after,
            **metrics,
        }
    seconds = time.perf_counter() - started
    log(
        INFO,
        "aligned %s models: %s, %s units moved, %.2f s",
        len(clients),
        summary,
        units,
        seconds,
    )
    own = {"rebasin-units-moved": units, "rebasin-seconds": seconds}
    return Aligned(permutations, {**metrics, **own})


def _match_on_clients(
    current: Round, clients: Sequence[ClientModel], config: dict[str, Any]
) -> tuple[list[Permutation], Metrics]:
    """Let clients match their models to the heaviest; match those of the others here.

    Returns:
        A permutation for each client, and the cost of the question as metrics.
    """
    reference = clients[heaviest([client.weight for client in clients])]
    record = ArrayRecord(dict(reference.state_dict))
    options = ConfigRecord({**config, "spec": spec_to_json(current.spec)})
    contents = {
        client.node: RecordDict(
            {
                "reference": record,
                "own": ArrayRecord(dict(client.state_dict)),
                "config": options,
            }
        )
        for client in clients
        if client is not reference
    }
    answers = ask(current.grid, PERMUTATION, contents, lambda tensors: _read(tensors, current.spec))
    log(INFO, "%s of %s clients matched their models", len(answers.by_client), len(contents))
    found = {reference.node: current.spec.identity(), **answers.by_client}
    permutations = [
        found[client.node]
        if client.node in found
        else match_weights(current.spec, reference.state_dict, client.state_dict).permutation
        for client in clients
    ]
    return permutations, answers.cost.metrics("matching")


def _answer(model: nn.Module, batches: Iterable[Any], request: Request) -> Tensors:
    """Return the permutation that matches the client's model to the reference."""
    config, states = request.config, request.states
    spec = spec_from_json(str(config["spec"]), model)
    reference, own = states["reference"], states["own"]
    method = config["method"]
    if method == "activations":
        match = match_activations(spec, model, reference, own, batches)
    elif method == "straight-through":
        pairs = list(batches)
        for pair in pairs:
            inputs_and_labels(pair, "straight-through matching")
        start = match_activations(spec, model, reference, own, pairs).permutation
        match = match_straight_through(
            spec,
            model,
            reference,
            own,
            pairs,
            epochs=int(config["epochs"]),
            learning_rate=float(config["learning-rate"]),
            start=start,
        )
    else:
        raise ValueError(f"unknown method {method!r}: use activations or straight-through")
    return dict(match.permutation.indices)


PERMUTATION = Question("matching", "permutation", _answer)


def _read(tensors: Tensors, spec: PermutationSpec) -> Permutation:
    """Return the permutation of one client.

    Raises:
        ValueError: it is not a permutation of this spec.
    """
    identity = spec.identity()
    if odd := sorted(tensors.keys() ^ identity.indices.keys()):
        raise ValueError(f"permutation and spec differ in the groups {odd[:3]}")
    for name, expected in identity.indices.items():
        index = tensors[name]
        if index.dtype != torch.int64 or index.shape != expected.shape:
            raise ValueError(
                f"{name}: expected an order of {tuple(expected.shape)} units, got {index.dtype} of "
                f"shape {tuple(index.shape)}"
            )
    permutation = Permutation(tensors, spec.within)
    spec.check_permutation(permutation)
    return permutation
