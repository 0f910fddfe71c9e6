"""Runs the finishing steps on one aggregated model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord
from flwr.supercore import log
from torch import nn

from fl_rebasin.flower.aggregation import is_usable
from fl_rebasin.flower.log_text import printable
from fl_rebasin.flower.round_clients import RoundClients
from fl_rebasin.merging.batchnorm import BatchNorm
from fl_rebasin.merging.clients import Costs
from fl_rebasin.merging.finishing_step import Finish, FinishingStep


@dataclass(frozen=True)
class BoundStep:
    """A finishing step bound to the architecture of the run.

    Attributes:
        name: name of the step.
        finish: runs the step.
    """

    name: str
    finish: Finish


@dataclass(frozen=True)
class Variant:
    """A model after some of the finishing steps.

    Attributes:
        name: the steps that it has been through, `+NAME` each; BatchNorm first has no name.
        arrays: the model.
        costs: what the last step cost.
        applied: whether the last step worked.
        recalibrate: whether the model needs BatchNorm statistics, since the last step failed.
    """

    name: str
    arrays: ArrayRecord
    costs: Costs
    applied: bool = True
    recalibrate: bool = False


@dataclass(frozen=True)
class Finishing:
    """The finishing steps of a run, bound to its architecture.

    Attributes:
        steps: the steps in order; those without anything to do for the architecture are left out.
        baseline: what an aggregated model needs without these steps: BatchNorm statistics, if any.
        needs_models: whether a step needs the clients' aligned models.
        keep_all: whether to return the model after each step, or only the last one.
    """

    steps: Sequence[BoundStep]
    baseline: BoundStep | None
    needs_models: bool
    keep_all: bool

    @classmethod
    def bind(
        cls, steps: Sequence[FinishingStep], model: nn.Module, inputs: Any, *, keep_all: bool
    ) -> Finishing:
        """Bind steps to an architecture.

        Raises:
            TypeError: an item is not a finishing step.
            ValueError: a step does not fit the architecture.
        """
        recalibration = _bound([BatchNorm()] if steps else [], model, inputs)
        return cls(
            _bound(steps, model, inputs),
            recalibration[0] if recalibration else None,
            any(step.needs_models for step in steps),
            keep_all,
        )

    def apply(
        self, arrays: ArrayRecord, clients: RoundClients, number: int
    ) -> tuple[list[Variant], list[Costs]]:
        """Run the steps on an aggregated model.

        A step that does not work, because no client answers, is skipped. If it would have set the
        BatchNorm statistics, the model gets those of the baseline instead.

        Args:
            arrays: the aggregated model.
            clients: the round's clients.
            number: number of the round.

        Returns:
            The models to choose from, and what the questions to the clients cost.
        """
        plain = current = Variant("", arrays, {})
        recalibrated = False
        fallback: Variant | None = None
        models: list[Variant] = []
        costs: list[Costs] = []
        if self.keep_all and (not self.steps or self.steps[0].name != BatchNorm.name):
            fallback = self._recalibrated(plain, clients, number)
            models, costs = [fallback], [fallback.costs]
        for step in self.steps:
            after = _after(step, current, clients, number)
            costs.append(after.costs)
            if after.applied:
                current = after
                models.append(after)
                recalibrated |= BatchNorm.name in after.costs
            elif after.recalibrate and not recalibrated:
                if current is not plain or fallback is None:
                    fallback = self._recalibrated(current, clients, number)
                    costs.append(fallback.costs)
                    models.append(fallback)
                current, recalibrated = fallback, True
        return (models or [plain]) if self.keep_all else [current], costs

    def _recalibrated(self, model: Variant, clients: RoundClients, number: int) -> Variant:
        """Return a model with the BatchNorm statistics that it needs, if it needs any."""
        if self.baseline is None:
            return model
        return replace(_after(self.baseline, model, clients, number), name=model.name)


def _bound(steps: Sequence[FinishingStep], model: nn.Module, inputs: Any) -> list[BoundStep]:
    bound = []
    for step in steps:
        if isinstance(step, type) or not callable(getattr(step, "bind", None)):
            raise TypeError(f"finish holds {step!r}: give finishing steps such as BatchNorm()")
        finish = step.bind(model, inputs)
        if finish is not None:
            bound.append(BoundStep(step.name, finish))
    return bound


def _after(step: BoundStep, variant: Variant, clients: RoundClients, number: int) -> Variant:
    """Return a model after one step; unchanged if the result is not finite."""
    state = variant.arrays.to_torch_state_dict()
    result = step.finish(state, clients)
    if result.report:
        log(INFO, "%s", result.report)
    for problem in result.problems:
        log(WARNING, "%s", printable(problem))
    if result.state_dict is state or not result.applied:
        return replace(
            variant, costs=result.costs, applied=result.applied, recalibrate=result.recalibrate
        )
    arrays = ArrayRecord(dict(result.state_dict))
    if not is_usable(arrays, number):
        recalibrate = step.name != BatchNorm.name
        return replace(variant, costs=result.costs, applied=False, recalibrate=recalibrate)
    first = step.name == BatchNorm.name and not variant.name
    name = variant.name + ("" if first else f"+{step.name}")
    return Variant(name, arrays, result.costs)
