"""The merging methods that a simulation compares, beside naive averaging."""

from __future__ import annotations

from typing import Any

from experiment.errors import UserError

LABEL_COUNTS = "label-counts"
"""Metric of the replies: training images of each class."""

GUARD = "rebasin+guard"
"""The method for which clients hold back images."""

_FITTED = {"least_squares": "layerwise", "label_counts": LABEL_COUNTS}

METHODS: dict[str, dict[str, Any]] = {
    "rebasin-activation+bn": {"matching": "activations"},
    "rebasin-ste+bn": {"matching": "straight-through"},
    "naive+lsq": {"matching": "none", **_FITTED},
    "rebasin+lsq": {"matching": "activations-then-weights", **_FITTED},
    GUARD: {"matching": "activations-then-weights", **_FITTED, "guard": True},
}
"""Options of `ReBasinStrategy` by the name of the row; what the table always has is not here."""

ALWAYS = ("naive", "naive+bn", "rebasin", "rebasin+bn")
ORDINARY = ("naive+lsq", "rebasin+lsq", GUARD)
"""Those that go on, as arms of their own, in ordinary rounds."""


def chosen_methods(names: list[str]) -> tuple[str, ...]:
    """Return the methods to compare beside those that every table has; `all` is all of them.

    Raises:
        UserError: A name is unknown, or given twice.
    """
    if names == ["all"]:
        return tuple(METHODS)
    known = (*ALWAYS, *METHODS)
    if odd := [name for name in names if name not in known]:
        raise UserError(f"--methods {odd[0]} is unknown: use all, or some of {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UserError(f"--methods {' '.join(names)} repeats a name: give each once")
    return tuple(name for name in METHODS if name in names)
