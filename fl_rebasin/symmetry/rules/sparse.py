"""Products with a sparse matrix, COO or CSR (`mm` and `addmm` of these are dense names)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.rules.linear import addmm, matmul
from fl_rebasin.symmetry.rules.pointwise import pointwise
from fl_rebasin.symmetry.rules.protocol import Rule, Trace


def mm_reduce(trace: Trace, func: Any, args: Any, kwargs: Any, out: tuple[Tensor, ...]) -> bool:
    """A product whose sum is a mean, a maximum or a minimum over the stored entries."""
    # The second result, which entry was the largest, is for the backward pass only.
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
