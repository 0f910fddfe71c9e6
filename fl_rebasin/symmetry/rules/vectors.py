"""Products with vectors, norms, variances, distances: summed axes may be in any order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.rules.pointwise import broadcast
from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.rules.reductions import reduce
from fl_rebasin.symmetry.terms import UNIT, Term
from fl_rebasin.symmetry.unify import mix, unify, unify_elementwise


def mv(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`(n, k) @ (k,)`."""
    rows, columns = axes = trace.axes(args[0])
    mix(axes, [1])
    unify(columns, trace.axes(args[1])[0])
    trace.assign(out, [rows])
    return True


def addmv(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`bias + (n, k) @ (k,)`; the bias broadcasts."""
    mv(trace, func, args[1:], kwargs, out)
    for term in trace.axes(args[0]):
        unify_elementwise([term], trace.axes(out))
    return True


def addr(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`bias + (n, 1) * (m,)`; the bias broadcasts."""
    axes, bias = [*trace.axes(args[1]), *trace.axes(args[2])], trace.axes(args[0])
    unify_elementwise([*[UNIT] * (2 - len(bias)), *bias], axes)
    trace.assign(out, axes)
    return True


def dot(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Dot product, or the norm of a difference: a sum over corresponding positions."""
    broadcast(trace, args[:2])
    trace.assign(out, [])
    return True


def trilinear(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Three tensors with inserted axes of size 1 are multiplied and summed over some axes."""
    common: list[Term] = [UNIT] * (args[0].ndim + len(args[3]))
    for tensor, added in zip(args[:3], args[3:6], strict=True):
        rest = iter(trace.axes(tensor))
        axes = [UNIT if dim in added else next(rest) for dim in range(len(common))]
        mix(axes, args[6])
        unify_elementwise(common, axes)
        common = [
            term if known.size == 1 else known for known, term in zip(common, axes, strict=True)
        ]
    trace.assign(out, [term for dim, term in enumerate(common) if dim not in args[6]])
    return True


def variance(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Variance or standard deviation, with or without the mean, over the axes in argument 1."""
    return args[0].ndim > 0 and reduce(trace, func, args, kwargs, out)


def norm(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Norm of any order over the axes in argument 2, or over all axes."""
    return variance(trace, func, (args[0], *args[2:3]), kwargs, out)


def renorm(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Scales each slice along one axis by its norm: every axis passes through."""
    axes = trace.axes(args[0])
    kept = args[2] % len(axes)
    mix(axes, [dim for dim in range(len(axes)) if dim != kept])
    trace.assign(out, axes)
    return True


def weight_norm(trace: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """`v * (g / norm(v))`: the gain and both results (weight and norms) follow `v`."""
    axes, gain = trace.axes(args[0]), trace.axes(args[1])
    kept = (args[2] if len(args) > 2 else 0) % len(axes)
    if len(gain) != len(axes) or out[1].shape != args[1].shape:
        return False
    mix(axes, [dim for dim in range(len(axes)) if dim != kept])
    unify_elementwise(axes, gain)
    trace.assign(out[0], axes)
    trace.assign(out[1], [UNIT if term.size == 1 else axes[dim] for dim, term in enumerate(gain)])
    return True


def distances(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`(..., n, k)` and `(..., m, k)` give `(..., n, m)`; the leading axes broadcast."""
    left, right = ([*[UNIT] * (out.ndim - tensor.ndim), *trace.axes(tensor)] for tensor in args[:2])
    for axes in (left, right):
        mix(axes, [len(axes) - 1])
    unify_elementwise(left[:-2], right[:-2])
    unify(left[-1], right[-1], along=left[:-2])
    batch = [
        other if one.size == 1 else one for one, other in zip(left[:-2], right[:-2], strict=True)
    ]
    trace.assign(out, [*batch, left[-2], right[-2]])
    return True


VECTORS: dict[str, Rule] = {
    "mv": mv,
    "addmv": addmv,
    "addr": addr,
    **dict.fromkeys(("dot", "vdot", "dist"), dot),
    "_trilinear": trilinear,
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), variance),
    **dict.fromkeys(("norm", "linalg_vector_norm"), norm),
    "renorm": renorm,
    "_weight_norm_interface": weight_norm,
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist"), distances),
}
