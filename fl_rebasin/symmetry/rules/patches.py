"""Windows, patches and samples of images: positions keep their order, channels pass through."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.cutting import factor
from fl_rebasin.symmetry.rules.new_axes import with_new_axes
from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.rules.spatial import KERNEL, POSITION
from fl_rebasin.symmetry.terms import Unknown, pin, product
from fl_rebasin.symmetry.unify import mix, unify

WINDOWS = "split into windows"
SQUARE = "pixel position in a square"


def unfold(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """`x.unfold(dim, size, step)`: sliding windows along one axis, which keeps its order."""
    axes = trace.axes(args[0])
    if not axes:
        return False
    terms = with_new_axes(axes, [args[1]], out.shape[:-1], WINDOWS)
    trace.assign(out, [*terms, Unknown(out.shape[-1], WINDOWS)])
    return True


def im2col(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Patches of an image: each channel becomes a block of kernel positions."""
    axes = trace.axes(args[0])
    *batch, channels, _, _ = with_new_axes(axes, [-2, -1], args[0].shape, POSITION)
    kernel = Unknown(out.shape[-2] // channels.size, KERNEL)
    trace.assign(out, [*batch, product([channels, kernel]), Unknown(out.shape[-1], POSITION)])
    return True


def col2im(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """An image is summed from patches: the adjoint of `im2col`."""
    *batch, blocks, _ = with_new_axes(trace.axes(args[0]), [-1], args[0].shape, POSITION)
    pair = factor(blocks, out.shape[-3])
    if pair is None:
        return False
    pin(pair[1], KERNEL)
    mix(pair, [1])
    positions = [Unknown(size, POSITION) for size in out.shape[-2:]]
    trace.assign(out, [*batch, pair[0], *positions])
    return True


def pixel_shuffle(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Blocks of channels become squares of pixels."""
    axes = trace.axes(args[0])
    *batch, blocks, _, _ = with_new_axes(axes, [-2, -1], args[0].shape, POSITION)
    pair = factor(blocks, out.shape[-3])
    if pair is None:
        return False
    pin(pair[1], SQUARE)
    mix(pair, [1])
    positions = [Unknown(size, POSITION) for size in out.shape[-2:]]
    trace.assign(out, [*batch, pair[0], *positions])
    return True


def pixel_unshuffle(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Squares of pixels become blocks of channels."""
    axes = trace.axes(args[0])
    *batch, channels, _, _ = with_new_axes(axes, [-2, -1], args[0].shape, POSITION)
    square = Unknown(out.shape[-3] // channels.size, SQUARE)
    positions = [Unknown(size, POSITION) for size in out.shape[-2:]]
    trace.assign(out, [*batch, product([channels, square]), *positions])
    return True


def grid_sampler(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """An image is sampled at coordinates given for each pixel of the result."""
    batch, channels, *_ = with_new_axes(
        trace.axes(args[0]), range(2, args[0].ndim), args[0].shape, POSITION
    )
    first, *pixels, coordinates = grid = trace.axes(args[1])
    pin(coordinates, "coordinates")
    mix(grid, [len(grid) - 1])
    unify(batch, first)
    trace.assign(out, [batch, channels, *pixels])
    return True


PATCHES: dict[str, Rule] = {
    "unfold": unfold,
    "im2col": im2col,
    "col2im": col2im,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), grid_sampler),
}
