"""The merging methods that a simulation compares with naive averaging."""

from __future__ import annotations

from typing import Any

from experiment.errors import UserError

LABEL_COUNTS = "label-counts"
"""Metric of the training replies: the number of training images of each class."""

GUARD = "rebasin+guard"
"""The method for which clients hold out images."""

_FITTED = {"least_squares": "layerwise", "label_counts": LABEL_COUNTS}

METHODS: dict[str, dict[str, Any]] = {
    "rebasin-activation+bn": {"matching": "activations"},
    "rebasin-ste+bn": {"matching": "straight-through"},
    "naive+lsq": {"matching": "none", **_FITTED},
    "rebasin+lsq": {"matching": "activations-then-weights", **_FITTED},
    GUARD: {"matching": "activations-then-weights", **_FITTED, "guard": True},
}
"""Options of `ReBasinStrategy` for each method that the user can choose."""

ALWAYS = ("naive", "naive+bn", "rebasin", "rebasin+bn")
"""The methods of every run."""

CONTINUED = ("naive+bn", "rebasin+bn", "naive+lsq", "rebasin+lsq", GUARD)
"""The methods that take part in later rounds; the others differ from them only in the matching."""


def chosen_methods(names: list[str]) -> tuple[str, ...]:
    """Return the chosen methods, without those of every run; `["all"]` stands for all of them.

    Raises:
        UserError: A name is unknown or repeated.
    """
    if names == ["all"]:
        return tuple(METHODS)
    known = (*ALWAYS, *METHODS)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--methods {unknown[0]} is unknown: use all, or any of {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UserError(f"--methods {' '.join(names)} repeats a name: list each name once")
    return tuple(name for name in METHODS if name in names)
