"""Permutation-aligned model merging for federated learning with Flower.

Names that need Flower are in `fl_rebasin.flower`. Of these, `ReBasinStrategy` is available here
too; it is imported on first use, so that the core works without Flower.
"""

from typing import TYPE_CHECKING, Any

from fl_rebasin.matching.activations import match_activations
from fl_rebasin.matching.straight_through import match_straight_through
from fl_rebasin.matching.weights import Match, match_weights
from fl_rebasin.merging.batchnorm import BatchNorm, recalibrate_batchnorm
from fl_rebasin.merging.heads import ClassAwareHead, class_aware_head
from fl_rebasin.merging.joint_head import JointHead, fit_joint_head
from fl_rebasin.merging.least_squares import LeastSquares, RegMean, Repair, fit_least_squares
from fl_rebasin.merging.merge_many import Merge, merge_many
from fl_rebasin.metrics import Barrier, barrier
from fl_rebasin.state_dicts import interpolate
from fl_rebasin.symmetry.derive import derive_spec
from fl_rebasin.symmetry.serialization import spec_from_json, spec_to_json
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec, SpecError

if TYPE_CHECKING:
    from fl_rebasin.flower import ReBasinStrategy

__all__ = [
    "Barrier",
    "BatchNorm",
    "ClassAwareHead",
    "JointHead",
    "LeastSquares",
    "Match",
    "Merge",
    "Permutation",
    "PermutationSpec",
    "ReBasinStrategy",
    "RegMean",
    "Repair",
    "SpecError",
    "barrier",
    "class_aware_head",
    "derive_spec",
    "fit_joint_head",
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
