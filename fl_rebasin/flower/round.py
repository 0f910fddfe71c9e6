"""What one round starts from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fl_rebasin.matching.certificate import Reference
from fl_rebasin.matching.objective import check_finite, weights_of
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.spec import PermutationSpec


@dataclass(frozen=True)
class Round:
    """One round of training.

    Attributes:
        number: number of the round, from 1.
        spec: spec of all models.
        arrays: the global model that the round starts from.
        global_model: the same as a state dict.
        grid: the ServerApp's grid.
    """

    number: int
    spec: PermutationSpec
    arrays: ArrayRecord
    global_model: StateDict
    grid: Grid

    @classmethod
    def begin(cls, number: int, spec: PermutationSpec, arrays: ArrayRecord, grid: Grid) -> Round:
        """Return the round that starts from a global model.

        Raises:
            SpecError: the model does not fit the spec, or holds NaN or infinite values.
        """
        global_model = arrays.to_torch_state_dict()
        check_finite(spec, global_model, "global model")
        return cls(number, spec, arrays, global_model, grid)

    @cached_property
    def reference(self) -> Reference:
        """The learnable tensors of the global model, with what is computed about them once."""
        return Reference(self.spec, weights_of(self.spec, self.global_model))
