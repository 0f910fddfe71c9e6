"""What the finishing steps make of one aggregated model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord
from flwr.supercore import log
from torch import nn

from fl_rebasin.flower.aggregation import is_usable
from fl_rebasin.flower.questions import printable
from fl_rebasin.flower.round_clients import RoundClients
from fl_rebasin.merging.batchnorm import BatchNorm
from fl_rebasin.merging.clients import Costs
from fl_rebasin.merging.finishing_step import Finish, FinishingStep


@dataclass(frozen=True)
class BoundStep:
    """A finishing step bound to the architecture of the run.

    Attributes:
        name: name of the step.
        finish: does it.
    """

    name: str
    finish: Finish


@dataclass(frozen=True)
class Variant:
    """A model on its way through the finishing steps.

    Attributes:
        name: the steps that it has been through, `+NAME` each; BatchNorm statistics are not named.
        arrays: the model.
        costs: what the last step cost.
        applied: whether the last step worked.
    """

    name: str
    arrays: ArrayRecord
    costs: Costs
    applied: bool = True


@dataclass(frozen=True)
class Finishing:
    """The finishing steps of a run, bound to its architecture.

    Attributes:
        steps: the steps in order; those without anything to do for the architecture are left out.
        baseline: what an aggregated model needs without these steps: BatchNorm statistics, if any.
        needs_models: whether a step needs the clients' aligned models.
        keep_all: whether all models on the way may be chosen, or only the last one.
    """

    steps: Sequence[BoundStep]
    baseline: Sequence[BoundStep]
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
        baseline = [BatchNorm()] if steps else []
        return cls(
            _bound(steps, model, inputs),
            _bound(baseline, model, inputs),
            any(step.needs_models for step in steps),
            keep_all,
        )

    def apply(
        self, arrays: ArrayRecord, clients: RoundClients, number: int
    ) -> tuple[list[Variant], list[Costs]]:
        """Run the steps on an aggregated model.

        Args:
            arrays: the aggregated model.
            clients: the round's clients.
            number: number of the round.

        Returns:
            The models to choose from, and what the questions to the clients cost.
        """
        plain = Variant("", arrays, {})
        found = list(_after_each(self.steps, plain, clients, number))
        if not self.keep_all:
            return (found or [plain])[-1:], [variant.costs for variant in found]
        if not self.steps or self.steps[0].name != BatchNorm.name:
            found = [*(list(_after_each(self.baseline, plain, clients, number)) or [plain]), *found]
        usable = [variant for variant in found if variant.applied or not variant.name]
        return usable, [variant.costs for variant in found]


def _bound(steps: Sequence[FinishingStep], model: nn.Module, inputs: Any) -> list[BoundStep]:
    bound = []
    for step in steps:
        if isinstance(step, type) or not callable(getattr(step, "bind", None)):
            raise TypeError(f"finish holds {step!r}: give finishing steps such as BatchNorm()")
        finish = step.bind(model, inputs)
        if finish is not None:
            bound.append(BoundStep(step.name, finish))
    return bound


def _after_each(
    steps: Sequence[BoundStep], variant: Variant, clients: RoundClients, number: int
) -> Iterator[Variant]:
    """Yield a model after each of some steps."""
    for step in steps:
        variant = _after(step, variant, clients, number)
        yield variant


def _after(step: BoundStep, variant: Variant, clients: RoundClients, number: int) -> Variant:
    """Return a model after one step; unchanged if the result is not finite."""
    state = variant.arrays.to_torch_state_dict()
    result = step.finish(state, clients)
    if result.report:
        log(INFO, "%s", result.report)
    for problem in result.problems:
        log(WARNING, "%s", printable(problem))
    name = variant.name + ("" if step.name == BatchNorm.name else f"+{step.name}")
    if result.state_dict is state:
        return Variant(name, variant.arrays, result.costs, result.applied)
    arrays = ArrayRecord(dict(result.state_dict))
    if not is_usable(arrays, number):
        return Variant(name, variant.arrays, result.costs, applied=False)
    return Variant(name, arrays, result.costs, result.applied)
