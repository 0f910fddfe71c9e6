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
from fl_rebasin.flower.clients import RoundClients
from fl_rebasin.flower.questions import printable
from fl_rebasin.merging.batchnorm import BatchNorm
from fl_rebasin.merging.clients import Costs
from fl_rebasin.merging.finishing import Finish, FinishingStep


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


def bind_steps(
    steps: Sequence[FinishingStep], model: nn.Module, example_inputs: Any
) -> list[BoundStep]:
    """Return the steps that have something to do for an architecture.

    Raises:
        TypeError: an item is not a finishing step.
        ValueError: a step does not fit the architecture.
    """
    bound = []
    for step in steps:
        if isinstance(step, type) or not callable(getattr(step, "bind", None)):
            raise TypeError(f"finish holds {step!r}: give finishing steps such as BatchNorm()")
        finish = step.bind(model, example_inputs)
        if finish is not None:
            bound.append(BoundStep(step.name, finish))
    return bound


def finished(
    steps: Sequence[BoundStep], arrays: ArrayRecord, clients: RoundClients, server_round: int
) -> Iterator[Variant]:
    """Yield an aggregated model after each step.

    Args:
        steps: the steps in order.
        arrays: the aggregated model.
        clients: the round's clients.
        server_round: number of the round.
    """
    current = Variant("", arrays, {})
    for step in steps:
        current = _after(step, current, clients, server_round)
        yield current


def _after(step: BoundStep, variant: Variant, clients: RoundClients, server_round: int) -> Variant:
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
    if not is_usable(arrays, server_round):
        return Variant(name, variant.arrays, result.costs, applied=False)
    return Variant(name, arrays, result.costs, result.applied)


def variants(
    steps: Sequence[BoundStep],
    baseline: Sequence[BoundStep],
    arrays: ArrayRecord,
    clients: RoundClients,
    server_round: int,
) -> Iterator[Variant]:
    """Yield the models that a guard can choose from: the baseline, and the model after each step.

    Args:
        steps: the steps in order.
        baseline: what an aggregated model needs without these steps: BatchNorm statistics, if any.
        arrays: the aggregated model.
        clients: the round's clients.
        server_round: number of the round.
    """
    if not steps or steps[0].name != BatchNorm.name:
        plain = Variant("", arrays, {})
        yield next(finished(baseline, arrays, clients, server_round), plain)
    yield from finished(steps, arrays, clients, server_round)
