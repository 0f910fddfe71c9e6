"""One rule an operator: how axes pass through it. One operator family a file.

A rule is called with the tracer, the operator, its arguments and its result; it states equations
between axes (`unify`, `pin`), assigns the axes of the result, and returns True. Returning False,
like having no rule at all, pins everything that the operator touches.
"""

from fl_rebasin.symmetry.rules.complexes import COMPLEXES
from fl_rebasin.symmetry.rules.gates import GATES
from fl_rebasin.symmetry.rules.indexing import INDEXING
from fl_rebasin.symmetry.rules.linear import LINEAR
from fl_rebasin.symmetry.rules.norms import NORMS
from fl_rebasin.symmetry.rules.ordering import ORDERING
from fl_rebasin.symmetry.rules.pointwise import POINTWISE, pointwise
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
    **ORDERING,
    **VECTORS,
    **GATES,
    **SPARSE,
    **COMPLEXES,
}

__all__ = ["RULES", "pointwise"]
