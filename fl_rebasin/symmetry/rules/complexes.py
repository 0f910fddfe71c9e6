"""Complex numbers and Fourier transforms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fl_rebasin.symmetry.rules.ordering import renew
from fl_rebasin.symmetry.rules.pointwise import pointwise
from fl_rebasin.symmetry.rules.protocol import Rule, Trace
from fl_rebasin.symmetry.unify import Unknown, mix, pin

PARTS = "real and imaginary part"


def view_as_complex(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """The last axis holds the two parts of each number."""
    axes = trace.axes(args[0])
    pin(axes[-1], PARTS)
    mix(axes, [len(axes) - 1])
    trace.assign(out, axes[:-1])
    return True


def view_as_real(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """A new last axis holds the two parts of each number."""
    trace.assign(out, [*trace.axes(args[0]), Unknown(2, PARTS)])
    return True


def fourier(trace: Trace, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
    """Positions become frequencies; the axes that are not transformed pass through."""
    axes = trace.axes(args[0])
    trace.assign(out, renew(axes, args[1], out.shape, "Fourier transform"))
    return True


COMPLEXES: dict[str, Rule] = {
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
    **dict.fromkeys(("_conj", "_neg_view", "complex", "polar"), pointwise),
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), fourier),
}
