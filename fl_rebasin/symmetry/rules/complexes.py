"""Complex numbers and Fourier transforms: parts and frequencies keep their order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.rules.new_axes import with_new_axes
from fl_rebasin.symmetry.rules.pointwise import pointwise
from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.terms import Unknown, pin
from fl_rebasin.symmetry.unify import mix

REAL_AND_IMAGINARY = "real and imaginary part"


def view_as_complex(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The last axis holds the two parts of each number."""
    axes = trace.axes(args[0])
    pin(axes[-1], REAL_AND_IMAGINARY)
    mix(axes, [len(axes) - 1])
    trace.assign(out, axes[:-1])
    return True


def view_as_real(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A new last axis holds the two parts of each number."""
    trace.assign(out, [*trace.axes(args[0]), Unknown(2, REAL_AND_IMAGINARY)])
    return True


def fourier(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A transformed axis becomes one of frequencies; the other axes pass through."""
    axes = trace.axes(args[0])
    trace.assign(out, with_new_axes(axes, args[1], out.shape, "Fourier transform"))
    return True


COMPLEXES: dict[str, Rule] = {
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
    **dict.fromkeys(("_conj", "_neg_view", "complex", "polar"), pointwise),
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), fourier),
}
