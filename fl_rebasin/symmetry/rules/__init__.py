"""One rule per operator: how axes pass through it. Each file holds one family of operators.

A rule is called with the tracer, the operator, its arguments and its result. It states equations
between axes (`unify`), pins those whose order matters (`pin`), assigns the axes of the result, and
returns True. If it returns False, or if an operator has no rule, every axis of every tensor that
the operator reads or writes is pinned.
"""

from fl_rebasin.symmetry.rules.complexes import COMPLEXES
from fl_rebasin.symmetry.rules.gates import GATES
from fl_rebasin.symmetry.rules.indexing import INDEXING
from fl_rebasin.symmetry.rules.linear import LINEAR
from fl_rebasin.symmetry.rules.norms import NORMS
from fl_rebasin.symmetry.rules.ordering import ORDERING
from fl_rebasin.symmetry.rules.patches import PATCHES
from fl_rebasin.symmetry.rules.pointwise import POINTWISE, pointwise
from fl_rebasin.symmetry.rules.rearranging import REARRANGING
from fl_rebasin.symmetry.rules.reductions import REDUCTIONS
from fl_rebasin.symmetry.rules.shapes import SHAPES
from fl_rebasin.symmetry.rules.sparse import SPARSE
from fl_rebasin.symmetry.rules.spatial import SPATIAL
from fl_rebasin.symmetry.rules.vectors import VECTORS

RULES = {
    **POINTWISE,
    **LINEAR,
    **NORMS,
    **SPATIAL,
    **SHAPES,
    **REDUCTIONS,
    **INDEXING,
    **REARRANGING,
    **PATCHES,
    **ORDERING,
    **VECTORS,
    **GATES,
    **SPARSE,
    **COMPLEXES,
}

__all__ = ["RULES", "pointwise"]
