"""A round's replies, brought into one basin: on the server, and on the clients where asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from logging import INFO
from typing import Literal, TypeAlias

from flwr.serverapp import Grid
from flwr.supercore import log

from fl_rebasin.flower.matching import match_on_clients
from fl_rebasin.flower.replies import ClientModel
from fl_rebasin.matching.certificate import Reference
from fl_rebasin.matching.many import (
    align_many,
    all_identity,
    heaviest,
    mean_similarities,
    restore_unit_order,
)
from fl_rebasin.matching.objective import weights_of
from fl_rebasin.matching.weights import match_to, match_weights
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

Matching: TypeAlias = Literal[
    "none", "weights", "activations", "activations-then-weights", "straight-through"
]
AlignTo: TypeAlias = Literal["joint", "global"]
Metrics: TypeAlias = dict[str, float | int]


@dataclass(frozen=True)
class Aligner:
    """How one round is aligned.

    Attributes:
        spec: spec of all models.
        gauge: the global model, whose unit order the aligned models take.
        matching: as for `ReBasinStrategy`.
        align_to: as for `ReBasinStrategy`.
        grid: how to ask the clients; None: they are not asked.
    """

    spec: PermutationSpec
    gauge: StateDict
    matching: Matching
    align_to: AlignTo
    grid: Grid | None

    @cached_property
    def _around(self) -> Reference:
        return Reference(self.spec, weights_of(self.spec, self.gauge))

    def to_global(self, client: ClientModel) -> Permutation:
        """Match a model to the global one."""
        if self.matching == "none":
            return self.spec.identity()
        return match_to(self._around, weights_of(self.spec, client.state_dict))[0]

    def align(self, clients: Sequence[ClientModel]) -> tuple[list[Permutation], Metrics]:
        """Return a permutation for each client, and what the alignment did."""
        if self.matching == "none":
            return [self.spec.identity() for _ in clients], {}
        started = time.perf_counter()
        models = [client.state_dict for client in clients]
        weights = [client.weight for client in clients]
        sweeps, own = 0, Metrics()
        if self.align_to == "global":
            orders = [self.to_global(client) for client in clients]
        else:
            found = align_many(self.spec, models, weights, unit_order_of=self.gauge)
            orders, sweeps = list(found.permutations), found.sweeps
            own["rebasin-margin"] = min(found.margins.values(), default=1.0)
        if self.matching != "weights" and not all_identity(orders) and self.grid is not None:
            matched, asked = self._match_on_clients(clients, self.grid)
            own |= asked
            if self.matching == "activations-then-weights":
                found = align_many(
                    self.spec, models, weights, unit_order_of=self.gauge, start=matched
                )
            else:
                found = restore_unit_order(self.spec, models, weights, matched, self.gauge)
            orders, sweeps = list(found.permutations), sweeps + found.sweeps
        units = sum(permutation.moved for permutation in orders)
        if own.get("rebasin-margin", 0.0) < 1:
            before, after = mean_similarities(self.spec, models, orders, weights)
            own = {
                "rebasin-similarity-before": before,
                "rebasin-similarity-after": after,
                **own,
            }
        seconds = time.perf_counter() - started
        log(
            INFO,
            "aligned %s models: %s, %s units moved, %.2f s",
            len(models),
            f"similarity {before:.3f} -> {after:.3f}"
            if "rebasin-similarity-after" in own
            else f"nothing to be done, margin {own['rebasin-margin']:.1f}",
            *(units, seconds),
        )
        return orders, {
            **own,
            "rebasin-units-moved": units,
            "rebasin-sweeps": sweeps,
            "rebasin-seconds": seconds,
        }

    def _match_on_clients(
        self, clients: Sequence[ClientModel], grid: Grid
    ) -> tuple[list[Permutation], Metrics]:
        """Let clients match their models to the heaviest; those that fail are matched here."""
        reference = clients[heaviest([client.weight for client in clients])]
        models = {client.node: client.state_dict for client in clients}
        found, metrics = match_on_clients(
            *(grid, self.spec, models, reference.node),
            "straight-through" if self.matching == "straight-through" else "activations",
        )
        return [
            found[client.node]
            if client.node in found
            else match_weights(self.spec, reference.state_dict, client.state_dict).permutation
            for client in clients
        ], metrics

    def alternatives(
        self, clients: Sequence[ClientModel], orders: Sequence[Permutation]
    ) -> dict[str, list[Permutation]]:
        """Return what else could be averaged than the aligned models."""
        others = {"naive": [self.spec.identity() for _ in clients]}
        if len(clients) > 2:
            models = [client.state_dict for client in clients]
            weights = [client.weight for client in clients]
            found = align_many(
                self.spec, models, weights, unit_order_of=self.gauge, method="reference"
            )
            to_heaviest = list(found.permutations)
            if to_heaviest != list(orders) and not all_identity(to_heaviest):
                others["reference"] = to_heaviest
        return others
