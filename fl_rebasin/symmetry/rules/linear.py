"""Matrix products and convolutions: contracted axes are equal, output axes are the weight's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.cutting import factor
from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.rules.spatial import KERNEL, POSITION
from fl_rebasin.symmetry.terms import Term, Unknown, pin, product
from fl_rebasin.symmetry.unify import mix, unify, unify_elementwise


def matmul(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`(..., n, k) @ (..., k, m)`, with or without a batch axis."""
    left, right = trace.axes(args[0]), trace.axes(args[1])
    unify_elementwise(left[:-2], right[:-2])
    mix(left, [len(left) - 1])
    mix(right, [len(right) - 2])
    unify(left[-1], right[-2], along=left[:-2])
    trace.assign(out, [*left[:-1], right[-1]])
    return True


def addmm(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`bias + (n, k) @ (k, m)`; the bias broadcasts."""
    if not matmul(trace, func, args[1:], kwargs, out):
        return False
    axes = trace.axes(out)
    for bias, term in zip(reversed(trace.axes(args[0])), reversed(axes), strict=False):
        if bias.size != 1:
            unify(bias, term)
    return True


def convolution(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Any convolution, grouped, depthwise or transposed; positions keep their order."""
    transposed, groups = args[6], args[8]
    image, weight = trace.axes(args[0]), trace.axes(args[1])
    for kernel in weight[2:]:
        pin(kernel, KERNEL)
    for position in image[2:]:
        pin(position, POSITION)
    result: Term
    if groups == 1:
        inner = 0 if transposed else 1
        contracted, result = weight[inner], weight[1 - inner]
        mix(image, [1])
        mix(weight, [inner])
        unify(image[1], contracted)
    else:
        # Block g of the input meets block g of the weight alone: blocks move together, and each
        # block has its own order of units.
        inputs, outer = factor(image[1], groups), factor(weight[0], groups)
        if inputs is None or outer is None:
            return False
        mix([image[0], inputs[1], *image[2:]], [1])
        unify(inputs[0], outer[0])
        unify(inputs[1], outer[1] if transposed else weight[1], along=inputs[:1])
        result = product([inputs[0], weight[1]]) if transposed else weight[0]
    if args[2] is not None:
        unify(result, trace.axes(args[2])[0])
    positions = [Unknown(size, POSITION) for size in out.shape[2:]]
    trace.assign(out, [image[0], result, *positions])
    return True


LINEAR: dict[str, Rule] = {
    "mm": matmul,
    "bmm": matmul,
    "addmm": addmm,
    "baddbmm": addmm,
    "convolution": convolution,
}
