"""The merging methods that a simulation compares with naive averaging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiment.errors import UserError
from fl_rebasin.flower import (
    ActivationMatching,
    BatchNorm,
    Guard,
    JointHead,
    LeastSquares,
    StraightThrough,
    WeightMatching,
)

LABEL_COUNTS = "label-counts"
"""Metric of the training replies: the number of training images of each class."""

GUARD = "rebasin+guard"
"""The method for which clients hold out images."""

BEST_BODY = "best-body+head"
"""A control: the joint head on the body of one client's model, for the client that is best."""

UNTRAINED_BODY = "untrained-body+head"
"""A control: the joint head on the initial model, which has never been trained."""


@dataclass(frozen=True)
class Method:
    """A merging method: options of `ReBasinStrategy`."""

    align: WeightMatching | ActivationMatching | StraightThrough | None
    finish: Sequence[BatchNorm | LeastSquares | JointHead] = (BatchNorm(),)
    guard: Guard | None = None


_ALIGN = ActivationMatching(then_weights=True)
_FIT = (LeastSquares(label_counts=LABEL_COUNTS),)

ALWAYS = {"naive+bn": Method(None), "rebasin+bn": Method(WeightMatching())}
"""The methods of every run; `naive` and `rebasin` are their results without BatchNorm."""

METHODS = {
    "rebasin-activation+bn": Method(ActivationMatching()),
    "rebasin-ste+bn": Method(StraightThrough()),
    "naive+lsq": Method(None, _FIT),
    "rebasin+lsq": Method(_ALIGN, _FIT),
    "naive+head": Method(None, (BatchNorm(), JointHead())),
    "rebasin+head": Method(_ALIGN, (BatchNorm(), JointHead())),
    "rebasin+lsq+head": Method(_ALIGN, (*_FIT, JointHead())),
    BEST_BODY: Method(None, (BatchNorm(), JointHead())),
    UNTRAINED_BODY: Method(None, (BatchNorm(), JointHead())),
    GUARD: Method(_ALIGN, _FIT, Guard()),
}
"""The methods that the user can choose."""

CONTINUED = (*ALWAYS, "naive+lsq", "rebasin+lsq", "naive+head", "rebasin+lsq+head", GUARD)
"""The methods that take part in later rounds."""


def chosen_methods(names: list[str]) -> tuple[str, ...]:
    """Return the chosen methods, without those of every run; `["all"]` stands for all of them.

    Raises:
        UserError: A name is unknown or repeated.
    """
    if names == ["all"]:
        return tuple(METHODS)
    known = ("naive", "rebasin", *ALWAYS, *METHODS)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--methods {unknown[0]} is unknown: use all, or any of {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UserError(f"--methods {' '.join(names)} repeats a name: list each name once")
    return tuple(name for name in METHODS if name in names)
