"""Replacing axes whose order counts: pinned in the argument, new ones in the result."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fl_rebasin.symmetry.terms import Term, Unknown, pin
from fl_rebasin.symmetry.unify import mix


def with_new_axes(
    axes: Sequence[Term], dims: Collection[int], shape: Sequence[int], reason: str
) -> list[Term]:
    """Pin some axes of an argument, and return the axes of a result that replaces these.

    Args:
        axes: axes of the argument.
        dims: which of them to pin; they may be negative.
        shape: shape of the result.
        reason: why these axes are pinned.
    """
    replaced = {dim % len(axes) for dim in dims}
    mix(axes, replaced)
    for dim in replaced:
        pin(axes[dim], reason)
    return [
        Unknown(size, reason) if dim in replaced else term
        for dim, (term, size) in enumerate(zip(axes, shape, strict=True))
    ]
