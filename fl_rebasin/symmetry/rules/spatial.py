"""Pooling and resizing: batch and channel pass through, positions keep their order."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.terms import Unknown, pin

POSITION = "position in an image"
KERNEL = "kernel position"


def _spatial(ndim: int) -> Rule:
    """Return the rule for operators on images with `ndim` axes of positions."""

    def rule(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        axes = trace.axes(args[0])
        for term in axes[-ndim:]:
            pin(term, POSITION)
        for result in tree_leaves(out):
            if isinstance(result, Tensor):
                positions = [Unknown(n, POSITION) for n in result.shape[-ndim:]]
                trace.assign(result, [*axes[:-ndim], *positions])
        return True

    return rule


_KINDS = (
    "avg_pool",
    "_adaptive_avg_pool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "max_pool",
    "upsample_nearest",
    "_upsample_nearest_exact",
    "reflection_pad",
    "replication_pad",
)
SPATIAL: dict[str, Rule] = {
    **{f"{kind}{n}d": _spatial(n) for kind in _KINDS for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _spatial(n) for n in (2, 3)},
    **{f"upsample_{kind}2d": _spatial(2) for kind in ("bilinear", "bicubic")},
    **{f"_upsample_{kind}2d_aa": _spatial(2) for kind in ("bilinear", "bicubic")},
    "upsample_linear1d": _spatial(1),
    "upsample_trilinear3d": _spatial(3),
}
