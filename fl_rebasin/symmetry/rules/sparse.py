"""Products with a sparse matrix, COO or CSR: the axes are those of the dense product."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.rules.linear import addmm, matmul
from fl_rebasin.symmetry.rules.pointwise import pointwise
from fl_rebasin.symmetry.rules.protocol import Rule, Trace


def mm_reduce(trace: Trace, func: Any, args: Any, kwargs: Any, out: tuple[Tensor, ...]) -> bool:
    """A product that takes the mean, maximum or minimum over the stored entries, not the sum."""
    # The second result, the index of the largest entry, is read by the backward pass alone.
    if not matmul(trace, func, args[:2], {}, out[0]):
        return False
    axes = trace.axes(out[0])
    trace.assign(out[1], axes if out[1].shape == out[0].shape else trace.axes(out[1]))
    return True


SPARSE: dict[str, Rule] = {
    "_sparse_addmm": addmm,
    "_sparse_mm_reduce_impl": mm_reduce,
    **dict.fromkeys(("_coalesce", "_to_dense", "_to_sparse", "_to_sparse_csr"), pointwise),
}
