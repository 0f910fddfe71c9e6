"""Permutation-aligned model merging for federated learning with Flower."""

from fl_rebasin.spec import Permutation, PermutationSpec, SpecError
from fl_rebasin.trace import derive_spec
__all__ = ["Permutation", "PermutationSpec", "SpecError", "derive_spec"]
