"""Finishing steps: what is done to the merged model with the clients' help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

from torch import nn

from fl_rebasin.merging.clients import Clients, Costs
from fl_rebasin.state_dicts import StateDict


@dataclass(frozen=True)
class Finished:
    """The result of a finishing step.

    Attributes:
        state_dict: the model.
        costs: what the questions to the clients cost.
        report: one line for the log; empty for none.
        problems: what did not work, one line each.
        applied: whether the step worked; if not, the model is unchanged.
        recalibrate: whether the unchanged model still needs BatchNorm statistics.
    """

    state_dict: StateDict
    costs: Costs = field(default_factory=dict)
    report: str = ""
    problems: tuple[str, ...] = ()
    applied: bool = True
    recalibrate: bool = False


Finish: TypeAlias = Callable[[StateDict, Clients], Finished]
"""A step bound to an architecture: maps the merged model to the finished one."""


class FinishingStep(Protocol):
    """A step with its options: a small frozen object, checked when it is made.

    Attributes:
        name: name in metrics and in the guard's candidates.
        needs_models: whether it needs the clients' aligned models.
    """

    name: ClassVar[str]
    needs_models: ClassVar[bool]

    def bind(self, model: nn.Module, example_inputs: Any) -> Finish | None:
        """Return the step for an architecture, or None if it has nothing to do there.

        Args:
            model: a module of the architecture, any weights; not changed.
            example_inputs: inputs that the module runs on: a tensor, a tuple of positional
                arguments or a mapping of keyword arguments.

        Raises:
            ValueError: the step cannot work with this architecture.
        """
