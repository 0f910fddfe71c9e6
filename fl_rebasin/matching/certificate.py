"""A proof, in time proportional to the parameters, that models need no alignment.

Of each unit all tensors are taken together, as one vector. If every unit of a model a lies nearer
to its own unit of a reference b than half that unit's distance to the next unit of b, no
permutation of a group brings a closer: by the triangle inequality
`|a_i - b_p(i)| >= |a_p(i) - b_p(i)|` for all p, summed over i. How far the reference's units are
apart is found once for all models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fl_rebasin.symmetry.axes import named_pieces
from fl_rebasin.symmetry.spec import PermutationSpec

LARGEST_MARGIN = 1e3
"""Margins beyond say no more: the models agree."""
ROUNDING = 1e-5
"""What rounding may do to a squared distance, as a share of the squared lengths."""

WIDTH = 512
"""Weights of a unit in one tensor that are looked at first."""
TINY = 1e-12

Family = tuple[str, ...]
"""A group; or blocks and a group within them, whose units are taken together."""


def _families(spec: PermutationSpec, names: Sequence[str]) -> Iterator[tuple[Family, list[int]]]:
    """Yield the families of units on the axes of one part of a tensor, each with its axes."""
    blocks = {spec.within[name]: place for place, name in enumerate(names) if name in spec.within}
    for place, name in enumerate(names):
        if name in spec.within:
            yield (spec.within[name], name), [names.index(spec.within[name]), place]
        elif name and name not in blocks:
            yield (name,), [place]


def _rows(part: Tensor, places: Sequence[int], width: int | None) -> Tensor:
    """Return a part of a tensor with one row a unit, of about `width` weights."""
    moved = part.movedim(list(places), list(range(len(places))))
    if width is not None and moved.ndim > len(places):
        most = max(1, width // max(1, math.prod(moved.shape[len(places) + 1 :])))
        moved = moved.narrow(len(places), 0, min(most, moved.shape[len(places)]))
    count = math.prod(moved.shape[: len(places)])
    return moved.reshape(count, moved.numel() // count if count else 0)


def _parts(
    spec: PermutationSpec, key: str, tensor: Tensor
) -> Iterator[tuple[Tensor, list[tuple[Family, list[int]]]]]:
    """Yield the parts of a tensor that any units are on, with their families."""
    for part, names in named_pieces(tensor, spec.axes[key]):
        if any(names):
            yield part, list(_families(spec, names))


def _tied(spec: PermutationSpec, model: Mapping[str, Tensor]) -> set[Family]:
    """Return the families on two axes of one tensor, of which the proof does not hold."""
    found = set()
    for key in model:
        for _, families in _parts(spec, key, model[key]):
            each = [family for family, _ in families]
            found |= {family for family in each if each.count(family) > 1}
            units = [family for family in each if len(family) == 2]
            if len({family[0] for family in units}) < len(units):
                found |= {*units}
    return found


def unit_gaps(
    spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    precision: torch.dtype,
    width: int | None = None,
) -> dict[Family, Tensor]:
    """Return of each unit the distance to the next one of its family, by the lower end.

    Args:
        spec: spec of the reference.
        reference: learnable tensors.
        precision: dtype of all products.
        width: look at about so many weights of a unit in each tensor; the distance is at least
            what these say. By default at all.
    """
    products: dict[Family, Tensor] = {}
    for key, tensor in reference.items():
        for part, families in _parts(spec, key, tensor.to(precision)):
            for family, places in families:
                rows = _rows(part, places, width)
                if family in products:
                    products[family].addmm_(rows, rows.T)
                else:
                    products[family] = rows @ rows.T
    gaps = {}
    for family, product in products.items():
        lengths = product.diagonal().clone()
        squares = (lengths[:, None] + lengths) * (1 - ROUNDING) - 2 * product
        squares.fill_diagonal_(float("inf"))
        gaps[family] = squares.amin(1).clamp_min(0).sqrt()
    return gaps


def unit_distances(
    spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    precision: torch.dtype,
) -> dict[Family, Tensor]:
    """Return the distance of each unit of a model from the reference's own, by the upper end."""
    squares: dict[Family, Tensor] = {}
    largest = max((tensor.numel() for tensor in reference.values()), default=0)
    scratch = torch.empty(largest, dtype=precision, device=_device(reference))
    # Squares below the smallest normal number are lost: no more than one of these for each weight.
    lost = torch.finfo(precision).tiny * sum(tensor.numel() for tensor in reference.values())
    for key, tensor in reference.items():
        change = scratch[: tensor.numel()].view(tensor.shape)
        torch.sub(model[key].to(precision), tensor.to(precision), out=change).square_()
        for part, families in _parts(spec, key, change):
            for family, places in families:
                sums = _summed(part, places)
                squares[family] = squares[family] + sums if family in squares else sums
    return {family: (each + lost).sqrt() for family, each in squares.items()}


def _device(model: Mapping[str, Tensor]) -> torch.device | None:
    return next((tensor.device for tensor in model.values()), None)


def _summed(part: Tensor, places: Sequence[int]) -> Tensor:
    """Return the sum of each unit, over contiguous axes where it goes."""
    first, last = min(places), max(places)
    if last - first + 1 == len(places):
        # Leading axes first: what follows them lies side by side.
        part = part.flatten(0, first - 1).sum(0) if first else part
        part = part.flatten(len(places)).sum(-1) if part.ndim > len(places) else part
        return (part.T if places[0] > places[-1] else part).reshape(-1)
    rest = [place for place in range(part.ndim) if place not in places]
    return (part.sum(rest).T if places[0] > places[-1] else part.sum(rest)).reshape(-1)


class Reference:
    """A model that others lie around; how far its units are apart is found when asked, and once.

    Args:
        spec: its spec.
        tensors: its learnable tensors.
    """

    def __init__(self, spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.tensors = tensors

    @cached_property
    def precision(self) -> torch.dtype:
        """Dtype of all products."""
        double = any(value.dtype == torch.float64 for value in self.tensors.values())
        return torch.float64 if double else torch.float32

    @cached_property
    def tied(self) -> set[Family]:
        """Families of which the proof does not hold."""
        return _tied(self.spec, self.tensors)

    @cached_property
    def gaps_by_few(self) -> dict[Family, Tensor]:
        """Distances to the next unit, as far as some of the weights tell."""
        return unit_gaps(self.spec, self.tensors, self.precision, WIDTH)

    @cached_property
    def gaps(self) -> dict[Family, Tensor]:
        """Distances to the next unit."""
        return unit_gaps(self.spec, self.tensors, self.precision)


def margins(
    reference: Reference, models: Iterable[Mapping[str, Tensor]], shares: Sequence[float]
) -> dict[str, float]:
    """Return for each group how far models are from needing any alignment.

    Args:
        reference: a model that they all lie around, such as the global one.
        models: their learnable tensors, looked at one model at a time.
        shares: their weights, which sum to 1.

    Returns:
        For each group the factor by which all distances from the reference could grow, at most
        `LARGEST_MARGIN`. From 1 on no permutation of the group brings any model closer to the mean
        of the others, nor the mean of all closer to the reference; below, one may. 0 for a group
        that stands on two axes of one tensor. A lower bound: unless more is needed, a part of the
        weights is looked at.
    """
    spec = reference.spec
    away = [unit_distances(spec, reference.tensors, model, reference.precision) for model in models]
    tied = dict.fromkeys(reference.tied, 0.0)
    least = _least(reference.gaps_by_few, away, shares) | tied
    if min(least.values(), default=1.0) < 1:
        least = _least(reference.gaps, away, shares) | tied
    found = dict.fromkeys(spec.groups, LARGEST_MARGIN)
    for family, margin in least.items():
        for name in family:
            found[name] = min(found[name], margin)
    return found


def uncertified_groups(room: Mapping[str, float]) -> list[str]:
    """Return the groups of which margins do not prove that their units are where they belong."""
    return [name for name, margin in room.items() if margin < 1]


def _least(
    gaps: Mapping[Family, Tensor], away: Sequence[Mapping[Family, Tensor]], shares: Sequence[float]
) -> dict[Family, float]:
    """Return the smallest margin of each family.

    With d the distance of a model's unit from the reference's, e the mean of those of the others,
    and D the gap: the model's unit is at most d + e from the others' mean, whose units are at
    least D - e - max(e) apart. That suffices if 2 (d + e) <= D - e - max(e).
    """
    least = {}
    for family, gap in gaps.items():
        total = sum(share * each[family] for share, each in zip(shares, away, strict=True))
        smallest = LARGEST_MARGIN
        for share, each in zip(shares, away, strict=True):
            if not len(gap):
                continue
            others = (total - share * each[family]).clamp_min(0) / max(1 - share, TINY)
            need = 2 * each[family] + 3 * others + others.max()
            # What overflowed proves nothing.
            smallest = min(smallest, float((gap / need).nan_to_num(0.0).min()))
        least[family] = smallest
    return least
