"""What is made of one aggregated model with the clients' help: fitted, re-estimated, new heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Literal, TypeAlias

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor, nn

from fl_rebasin.flower.align import Metrics
from fl_rebasin.flower.batchnorm import recalibrate_on_clients
from fl_rebasin.flower.least_squares import fit_on_clients
from fl_rebasin.flower.questions import reason
from fl_rebasin.flower.replies import ClientModel, read_label_counts
from fl_rebasin.merging.heads import check_counts, class_aware_head, without_label_prior
from fl_rebasin.merging.least_squares import Step
from fl_rebasin.state_dicts import StateDict

LeastSquares: TypeAlias = Literal["none", "layerwise", "one-pass", "rescaling"]


@dataclass(frozen=True)
class Finisher:
    """How one round's aggregated model is finished.

    Attributes:
        model: a module of the architecture.
        grid: how to ask the clients; None: they are not asked.
        least_squares: as for `ReBasinStrategy`.
        steps: the layers to be fitted, in order.
        recalibrate_batchnorm: as for `ReBasinStrategy`.
        label_counts: as for `ReBasinStrategy`.
        head: keys of weight and bias of the last layer, if `label_counts` is given.
        every: return each variant, for a guard to choose from, instead of the last one.
    """

    model: nn.Module
    grid: Grid | None
    least_squares: LeastSquares
    steps: Sequence[Step]
    recalibrate_batchnorm: bool
    label_counts: str | None
    head: tuple[str, str | None] | None
    every: bool

    def variants(
        self,
        nodes: Sequence[int],
        aligned: Mapping[int, StateDict],
        arrays: ArrayRecord,
        counts: Mapping[int, Tensor],
        own: Metrics,
    ) -> dict[str, ArrayRecord]:
        """Return what is made of one aggregated model, by the end of its name.

        Args:
            nodes: the round's clients.
            aligned: their aligned models by node, where these are asked for.
            arrays: the aggregated model.
            counts: label counts of the clients that reported good ones, by node.
            own: metrics; those of the questions to the clients are added.
        """
        variants: dict[str, ArrayRecord] = {}
        fitted = self.least_squares != "none"
        if self.every or not fitted:
            variants[""] = self.recalibrated(nodes, arrays, own)
        if variants and counts:
            headed = self._with_head(aligned, variants[""], counts)
            variants = {**variants, "+heads": headed} if self.every else {"": headed}
        if fitted:
            found = self._fitted(aligned, arrays, counts, own)
            if found is not None:
                variants["+lsq" if self.every else ""] = found
        # Where nobody answered, the average needs what it gets without least squares.
        return variants or {"": self.recalibrated(nodes, arrays, own)}

    def recalibrated(self, nodes: Sequence[int], arrays: ArrayRecord, own: Metrics) -> ArrayRecord:
        """Return the model with BatchNorm statistics re-estimated on the clients."""
        if not self.recalibrate_batchnorm or self.grid is None:
            return arrays
        arrays, metrics = recalibrate_on_clients(self.grid, nodes, self.model, arrays)
        _add(own, metrics)
        return arrays

    def _fitted(
        self,
        aligned: Mapping[int, StateDict],
        arrays: ArrayRecord,
        counts: Mapping[int, Tensor],
        own: Metrics,
    ) -> ArrayRecord | None:
        """Return the model fitted by least squares, or None if no client answers well."""
        if self.grid is None:
            return None
        bias = None if self.head is None else self.head[1]
        everybody = torch.stack(list(counts.values())).sum(0) if counts else None
        models = {}
        for node, model in aligned.items():
            if node in counts and everybody is not None and bias is not None:
                model = without_label_prior(model, counts[node], everybody, bias)
            models[node] = ArrayRecord(dict(model))
        found, metrics = fit_on_clients(
            self.grid, self.model, self.steps, arrays, models,
            inputs="own" if self.least_squares == "one-pass" else "merged",
        )  # fmt: skip
        _add(own, metrics)
        return None if found is arrays else found

    def _with_head(
        self,
        aligned: Mapping[int, StateDict],
        arrays: ArrayRecord,
        counts: Mapping[int, Tensor],
    ) -> ArrayRecord:
        """Return the model with a class-aware head, of those who report label counts."""
        assert self.head is not None
        models = [aligned[node] for node in counts]
        merged = arrays.to_torch_state_dict()
        return ArrayRecord(class_aware_head(merged, models, list(counts.values()), *self.head))

    def counts(self, clients: Sequence[ClientModel]) -> dict[int, Tensor]:
        """Return the label counts of the clients that report good ones, by node."""
        if self.head is None or self.label_counts is None:
            return {}
        classes = len(clients[0].state_dict[self.head[0]])
        known = {}
        for client in clients:
            try:
                counts = read_label_counts(client.reply, self.label_counts)
                check_counts(counts, classes)
                if not bool(counts.any()):
                    raise ValueError("all label counts are 0")
            except Exception as error:  # A client may send anything; none of it may end the run.
                log(
                    WARNING,
                    *("label counts of node %s dropped: %s", client.node, reason(error)),
                )
            else:
                known[client.node] = counts
        return known


def _add(own: Metrics, more: Metrics) -> None:
    """Add up seconds, bytes and messages; of clients the fewest that answered."""
    for name, value in more.items():
        if name not in own:
            own[name] = value
        elif name.endswith("-clients"):
            own[name] = min(own[name], value)
        else:
            own[name] += value
