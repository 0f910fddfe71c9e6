"""Elementwise operators: the axes of their arguments correspond one to one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.terms import UNIT, Term, fresh
from fl_rebasin.symmetry.unify import unify_elementwise


def broadcast(trace: Trace, tensors: list[Tensor]) -> tuple[Term, ...]:
    """Unify the axes of tensors as PyTorch broadcasts them, and return the common axes."""
    ndim = max(tensor.ndim for tensor in tensors)
    common: list[Term] = [UNIT] * ndim
    for tensor in tensors:
        axes = (*[UNIT] * (ndim - tensor.ndim), *trace.axes(tensor))
        unify_elementwise(common, axes)
        common = [
            term if known.size == 1 else known for known, term in zip(common, axes, strict=True)
        ]
    return tuple(common)


def pointwise(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Activations, arithmetic, comparisons, casts, copies; in place or not."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    axes = broadcast(trace, tensors)
    for result in tree_leaves(out):
        if isinstance(result, Tensor):
            if tuple(term.size for term in axes) != tuple(result.shape):
                return False
            trace.assign(result, axes)
    return True


def constant(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Tensors filled with one value: each axis is free."""
    trace.assign(out, fresh(out.shape))
    return True


COPIES = ("_to_copy", "alias", "clone", "copy_", "detach", "lift_fresh", "lift_fresh_copy")
# The entries of a dropout mask are exchangeable in distribution.
DROPOUTS = ("bernoulli", "bernoulli_", "dropout", "native_dropout")
FILLS = ("fill_", "zero_", "threshold_backward")
CONSTANTS = (
    "zeros",
    "ones",
    "full",
    "empty",
    "scalar_tensor",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
)
POINTWISE: dict[str, Rule] = {
    **dict.fromkeys((*COPIES, *DROPOUTS, *FILLS), pointwise),
    **dict.fromkeys(CONSTANTS, constant),
}
