"""Operators that treat every place alike: axes at the same place are the same axis."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fl_rebasin.rules.protocol import Rule, Trace
from fl_rebasin.unify import UNIT, Term, Unknown, unify


def broadcast(trace: Trace, tensors: list[Tensor]) -> tuple[Term, ...]:
    """Unify the axes of tensors as PyTorch broadcasts them, and return the common axes."""
    ndim = max(tensor.ndim for tensor in tensors)
    common: list[Term] = [UNIT] * ndim
    for tensor in tensors:
        for place, term in enumerate(trace.axes(tensor), start=ndim - tensor.ndim):
            if term.size == 1:
                continue
            if common[place].size == 1:
                common[place] = term
            else:
                unify(common[place], term)
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
    """Tensors with the same value everywhere: each of their axes is free."""
    trace.assign(out, [Unknown(size) for size in out.shape])
    return True


POINTWISE: dict[str, Rule] = {
    **dict.fromkeys(
        # Dropout's mask has no order of its own: it is exchangeable in distribution.
        ("clone", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "copy_",
         "dropout", "native_dropout", "bernoulli", "bernoulli_",
         "fill_", "zero_", "threshold_backward"),
        pointwise,
    ),
    **dict.fromkeys(
        ("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like",
         "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor"),
        constant,
    ),
}  # fmt: skip
