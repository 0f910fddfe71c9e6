"""A proof that models need no alignment, in time proportional to the number of parameters.

All weights of a unit, over all tensors, form one vector. Let `a_i` be the units of a model, `b_i`
those of a reference, and `D_i` the distance from `b_i` to the nearest other unit of the reference.
If `|a_i - b_i| <= D_i / 2` for every unit, no permutation p of the group brings the model closer to
the reference, by the triangle inequality:

    |a_i - b_p(i)| >= |b_i - b_p(i)| - |a_i - b_i| >= D_i / 2 >= |a_i - b_i|

The distances between the units of the reference are computed once for all models.
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
"""Margins are capped here: the models agree."""
ROUNDING = 1e-5
"""Bound on the rounding error of a squared distance, as a share of the squared norms."""
SAMPLE_WIDTH = 512
"""Weights of a unit in one tensor that are compared first."""
TINY = 1e-12

Family = tuple[str, ...]
"""A group; or a group of blocks and a group within them, whose units are compared together."""


class Reference:
    """A model to compare others with; the distances between its units are computed once.

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
    def excluded(self) -> set[Family]:
        """Families on two axes of one tensor, to which the proof does not apply."""
        return _on_two_axes(self.spec, self.tensors)

    @cached_property
    def sampled_gaps(self) -> dict[Family, Tensor]:
        """Lower bounds of the gaps, from a sample of the weights."""
        return unit_gaps(self.spec, self.tensors, self.precision, SAMPLE_WIDTH)

    @cached_property
    def gaps(self) -> dict[Family, Tensor]:
        """Distance of each unit to the nearest other unit of its family."""
        return unit_gaps(self.spec, self.tensors, self.precision)


def margins(
    reference: Reference, models: Iterable[Mapping[str, Tensor]], shares: Sequence[float]
) -> dict[str, float]:
    """Return for each group how far models are from needing any alignment.

    Args:
        reference: a model close to all of them, such as the global model.
        models: their learnable tensors; one model is processed at a time.
        shares: their weights, which sum to 1.

    Returns:
        For each group, a factor by which all distances from the reference could grow, at most
        `LARGEST_MARGIN`. If it is at least 1, no permutation of the group brings any model closer
        to the mean of the others, nor the mean of all models closer to the reference. If it is
        below 1, some permutation may. The factor is a lower bound, from a sample of the weights if
        that is enough. It is 0 for a group on two axes of one tensor.
    """
    spec = reference.spec
    distances = [
        unit_distances(spec, reference.tensors, model, reference.precision) for model in models
    ]
    excluded = dict.fromkeys(reference.excluded, 0.0)
    smallest = _smallest_margins(reference.sampled_gaps, distances, shares) | excluded
    if min(smallest.values(), default=1.0) < 1:
        smallest = _smallest_margins(reference.gaps, distances, shares) | excluded
    found = dict.fromkeys(spec.groups, LARGEST_MARGIN)
    for family, margin in smallest.items():
        for name in family:
            found[name] = min(found[name], margin)
    return found


def uncertified_groups(margins: Mapping[str, float]) -> list[str]:
    """Return the groups whose margins do not prove that their units are in place."""
    return [name for name, margin in margins.items() if margin < 1]


def unit_gaps(
    spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    precision: torch.dtype,
    width: int | None = None,
) -> dict[Family, Tensor]:
    """Return a lower bound of the distance from each unit to the nearest other of its family.

    Args:
        spec: spec of the reference.
        reference: learnable tensors.
        precision: dtype of all products.
        width: compare only about this many weights of a unit in each tensor, which can only lower
            the distances; all weights by default.
    """
    products: dict[Family, Tensor] = {}
    for key, tensor in reference.items():
        for piece, families in _family_pieces(spec, key, tensor.to(precision)):
            for family, places in families:
                rows = _rows(piece, places, width)
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
    """Return an upper bound of the distance from each unit of a model to the reference's."""
    squares: dict[Family, Tensor] = {}
    largest = max((tensor.numel() for tensor in reference.values()), default=0)
    device = next((tensor.device for tensor in reference.values()), None)
    scratch = torch.empty(largest, dtype=precision, device=device)
    # A square below the smallest normal number may underflow: at most this much for each weight.
    lost = torch.finfo(precision).tiny * sum(tensor.numel() for tensor in reference.values())
    for key, tensor in reference.items():
        change = scratch[: tensor.numel()].view(tensor.shape)
        torch.sub(model[key].to(precision), tensor.to(precision), out=change).square_()
        for piece, families in _family_pieces(spec, key, change):
            for family, places in families:
                sums = _unit_sums(piece, places)
                squares[family] = squares[family] + sums if family in squares else sums
    return {family: (each + lost).sqrt() for family, each in squares.items()}


def _smallest_margins(
    gaps: Mapping[Family, Tensor],
    distances: Sequence[Mapping[Family, Tensor]],
    shares: Sequence[float],
) -> dict[Family, float]:
    """Return the smallest margin of each family, over its units and all models.

    Let d be the distance of a model's unit from the reference's, e the weighted mean of the other
    models' distances for that unit, and D the gap. The unit is at most d + e away from the mean of
    the others, whose units are at least D - e - max(e) apart. So the proof needs

        2 (d + e) <= D - e - max(e),    or    D / (2 d + 3 e + max(e)) >= 1

    and the left side of the second form is the margin.
    """
    smallest = {}
    for family, gap in gaps.items():
        total = sum(share * each[family] for share, each in zip(shares, distances, strict=True))
        margin = LARGEST_MARGIN
        for share, each in zip(shares, distances, strict=True):
            if not len(gap):
                continue
            others = (total - share * each[family]).clamp_min(0) / max(1 - share, TINY)
            need = 2 * each[family] + 3 * others + others.max()
            # A quotient of overflowed values proves nothing: count it as 0.
            margin = min(margin, float((gap / need).nan_to_num(0.0).min()))
        smallest[family] = margin
    return smallest


def _families(spec: PermutationSpec, names: Sequence[str]) -> Iterator[tuple[Family, list[int]]]:
    """Yield the families on the axes of one piece of a tensor, each with its axes."""
    blocks = {spec.within[name] for name in names if name in spec.within}
    for place, name in enumerate(names):
        if name in spec.within:
            yield (spec.within[name], name), [names.index(spec.within[name]), place]
        elif name and name not in blocks:
            yield (name,), [place]


def _family_pieces(
    spec: PermutationSpec, key: str, tensor: Tensor
) -> Iterator[tuple[Tensor, list[tuple[Family, list[int]]]]]:
    """Yield the pieces of a tensor with at least one group, each with its families."""
    for piece, names in named_pieces(tensor, spec.axes[key]):
        if any(names):
            yield piece, list(_families(spec, names))


def _on_two_axes(spec: PermutationSpec, model: Mapping[str, Tensor]) -> set[Family]:
    """Return the families on two axes of one tensor, to which the proof does not apply."""
    found = set()
    for key in model:
        for _, families in _family_pieces(spec, key, model[key]):
            each = [family for family, _ in families]
            found |= {family for family in each if each.count(family) > 1}
            units = [family for family in each if len(family) == 2]
            if len({family[0] for family in units}) < len(units):
                found |= {*units}
    return found


def _rows(piece: Tensor, places: Sequence[int], width: int | None) -> Tensor:
    """Return a piece of a tensor with one row for each unit, of about `width` weights."""
    moved = piece.movedim(list(places), list(range(len(places))))
    if width is not None and moved.ndim > len(places):
        most = max(1, width // max(1, math.prod(moved.shape[len(places) + 1 :])))
        moved = moved.narrow(len(places), 0, min(most, moved.shape[len(places)]))
    count = math.prod(moved.shape[: len(places)])
    return moved.reshape(count, moved.numel() // count if count else 0)


def _unit_sums(piece: Tensor, places: Sequence[int]) -> Tensor:
    """Return the sum of each unit, over contiguous axes if possible: that is faster."""
    first, last = min(places), max(places)
    if last - first + 1 == len(places):
        # Sum the leading axes first; the remaining ones are contiguous.
        piece = piece.flatten(0, first - 1).sum(0) if first else piece
        piece = piece.flatten(len(places)).sum(-1) if piece.ndim > len(places) else piece
        return (piece.T if places[0] > places[-1] else piece).reshape(-1)
    rest = [place for place in range(piece.ndim) if place not in places]
    return (piece.sum(rest).T if places[0] > places[-1] else piece.sum(rest)).reshape(-1)
