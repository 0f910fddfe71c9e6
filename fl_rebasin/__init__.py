"""Permutation-aligned model merging for federated learning with Flower.

`ReBasinStrategy` and the other names that need Flower are in `fl_rebasin.flower`, and offered
here too; they are imported on first use, so that the core works without Flower.
"""

from typing import TYPE_CHECKING, Any

from fl_rebasin.activations import match_activations
from fl_rebasin.batchnorm import recalibrate_batchnorm
from fl_rebasin.derive import derive_spec
from fl_rebasin.heads import class_aware_head
from fl_rebasin.least_squares import fit_least_squares
from fl_rebasin.matching import Match, match_weights
from fl_rebasin.merging import Merge, interpolate, merge_many
from fl_rebasin.metrics import Barrier, barrier
from fl_rebasin.spec import Permutation, PermutationSpec, SpecError
from fl_rebasin.stored import spec_from_json, spec_to_json
from fl_rebasin.straight_through import match_straight_through

if TYPE_CHECKING:
    from fl_rebasin.flower import ReBasinStrategy

__all__ = [
    "Barrier",
    "Match",
    "Merge",
    "Permutation",
    "PermutationSpec",
    "ReBasinStrategy",
    "SpecError",
    "barrier",
    "class_aware_head",
    "derive_spec",
    "fit_least_squares",
    "interpolate",
    "match_activations",
    "match_straight_through",
    "match_weights",
    "merge_many",
    "recalibrate_batchnorm",
    "spec_from_json",
    "spec_to_json",
]


def __getattr__(name: str) -> Any:
    if name == "ReBasinStrategy":
        from fl_rebasin.flower import ReBasinStrategy

        return ReBasinStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
