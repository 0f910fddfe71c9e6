"""The fit: ask the clients for sums, solve, and go on with the next layer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fl_rebasin.merging.batchnorm import BatchNorm, ask_statistics, pool_statistics, recentred
from fl_rebasin.merging.clients import (
    Clients,
    Cost,
    Question,
    Request,
    total_costs,
)
from fl_rebasin.merging.finishing_step import Finished
from fl_rebasin.merging.heads import without_label_prior
from fl_rebasin.merging.least_squares.steps import (
    Step,
    add_up,
    steps_to_json,
)
from fl_rebasin.merging.least_squares.sums import LAYER_SUMS, read_sums
from fl_rebasin.state_dicts import StateDict, like, with_weights


@dataclass(frozen=True)
class Fit:
    """A fit of one architecture.

    Attributes:
        name: name of the method.
        model: a module of the architecture.
        question: what the clients are asked.
        messages: the steps of each question, in order.
        head: keys of weight and bias of the last layer, where label priors are removed.
        label_counts: name of the metric with the label counts; None to keep the label priors.
    """

    name: str
    model: nn.Module
    question: Question
    messages: Sequence[Sequence[Step]]
    head: tuple[str, str | None] | None = None
    label_counts: str | None = None

    def __call__(self, merged: StateDict, clients: Clients) -> Finished:
        """Fit the merged model to the clients' models."""
        started = time.perf_counter()
        current = with_weights(self.model, merged).eval()
        own = self._targets(clients)
        asked, done, costs, problems = list(own), 0, Cost(len(own), 0.0, 0, 0), []
        for steps in self.messages if asked else ():
            answers = self._ask(current, {client: own[client] for client in asked}, steps, clients)
            costs += answers.cost
            # A client that fails once is not asked again: waiting for it costs the timeout.
            asked = list(answers.by_client)
            if not asked:
                break
            for step in steps:
                sums = add_up([each[step.layer] for each in answers.by_client.values()])
                try:
                    current.load_state_dict(step.solve(current, sums))
                    done += 1
                except (ValueError, RuntimeError) as error:  # Valid sums may have no solution.
                    problems.append(f"{step.layer} keeps the average: {error}")
        costs = replace(costs, seconds=time.perf_counter() - started)
        count = sum(map(len, self.messages))
        report = f"{self.name}: {done} of {count} layers, {costs.messages} messages"
        fitted = Finished(merged, {self.name: costs}, report, tuple(problems))
        if not done and count:
            return replace(fitted, applied=False, recalibrate=True)
        return self._with_statistics(fitted, current, clients, asked or list(own))

    def _targets(self, clients: Clients) -> dict[int, StateDict]:
        """Return the clients' models, without their label priors where counts are known."""
        if self.label_counts is None or self.head is None:
            return dict(clients.models)
        weight, bias = self.head
        if bias is None:
            return dict(clients.models)
        classes = len(self.model.get_parameter(weight))
        counts = clients.label_counts(self.label_counts, classes)
        total = sum(counts.values(), torch.zeros(classes, dtype=torch.float64))
        return {
            client: without_label_prior(model, counts[client], total, bias)
            if client in counts
            else model
            for client, model in clients.models.items()
        }

    def _ask(
        self,
        current: nn.Module,
        own: Mapping[int, StateDict],
        steps: Sequence[Step],
        clients: Clients,
    ) -> Any:
        config = {"steps": steps_to_json(steps)}
        shared = {"merged": current.state_dict()} if self.question is LAYER_SUMS else {}
        requests = {
            client: Request({**shared, "own": model}, config) for client, model in own.items()
        }
        return clients.ask(self.question, requests, lambda each: read_sums(each, current, steps))

    def _with_statistics(
        self, fitted: Finished, current: nn.Module, clients: Clients, asked: Sequence[int]
    ) -> Finished:
        """Return the fitted model with BatchNorm layers as training would leave them."""
        state = {key: current.state_dict()[key].detach().clone() for key in fitted.state_dict}
        costs = fitted.costs
        if BatchNorm().bind(self.model, None) is not None:
            answers = ask_statistics(current, state, clients, asked, frozen=True)
            costs = total_costs([costs, {BatchNorm.name: answers.cost}])
            if answers.by_client:
                found = recentred(current, pool_statistics(answers.by_client.values()))
                state = {key: found[key] for key in state}
        return replace(fitted, state_dict=like(fitted.state_dict, state), costs=costs)
