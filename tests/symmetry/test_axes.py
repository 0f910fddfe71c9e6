"""The axis algebra against loops over single places, and matching of blocks by brute force."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fl_rebasin import Permutation, PermutationSpec, SpecError
from fl_rebasin.matching.coordinate_descent import Matcher
from fl_rebasin.symmetry.axes import (
    Axis,
    Cat,
    Fixed,
    Group,
    Parted,
    Prod,
    cut_axis,
    groups_of,
    move_tensor,
    pieces,
)

HEADS = Group("heads", 3)
UNITS = Group("units", 2, within="heads")
WIDE = Group("wide", 4, within="heads")
PLAIN = Group("plain", 5)

LAYOUTS: dict[str, tuple[Axis, ...]] = {
    "plain": (PLAIN, Fixed(2)),
    "blocks": (Prod((HEADS, UNITS)), Fixed(2)),
    "blocks-last": (PLAIN, Prod((HEADS, WIDE))),
    "units-before-blocks": (Prod((UNITS, HEADS)), Fixed(2)),
    "two-within": (Prod((HEADS, UNITS, WIDE)),),
    "partly-within": (Prod((HEADS, Cat((Fixed(2), UNITS)))), PLAIN),
    "plain-between": (Prod((HEADS, Group("between", 3), UNITS)),),
    "beside": (Cat((Prod((HEADS, UNITS)), PLAIN, Prod((HEADS, WIDE)))),),
    "across": (HEADS, WIDE),
    "across-few": (HEADS, Prod((UNITS, Fixed(2)))),
    "across-product": (Prod((HEADS, UNITS)), WIDE, Fixed(2)),
    "across-backwards": (WIDE, Fixed(2), Prod((Fixed(2), HEADS))),
    "parted": (Cat((PLAIN, Fixed(2))), Parted(0, ((5, Group("a", 4)), (2, Group("b", 4))))),
    "parted-inside": (
        Parted(1, ((2, PLAIN), (3, Cat((Group("c", 2), Fixed(3)))))),
        Cat((Fixed(2), Group("d", 3))),
    ),
}  # fmt: skip
LAYOUT = pytest.mark.parametrize("name", LAYOUTS)


def spec_of(axes: Sequence[Axis]) -> PermutationSpec:
    groups = [HEADS, *(group for axis in axes for group in groups_of(axis))]
    return PermutationSpec(
        axes={"w": tuple(axes)},
        groups={group.name: group.size for group in groups},
        pinned={},
        learnable=("w",),
        within={group.name: group.within for group in groups if group.within},
    )


def source(axes: Sequence[Axis], dim: int, place: tuple[int, ...], permutation: Permutation) -> int:
    """Where the value at a place comes from along one axis: read off the definition, one by one."""
    blocks = {}
    for axis, where in zip(axes, place, strict=True):
        if isinstance(axis, Parted):
            continue
        for group, number in positions(axis, where):
            blocks.setdefault(group.name, number)

    def old(axis: Axis, where: int) -> int:
        match axis:
            case Group(name, _, None):
                return int(permutation[name][where])
            case Group(name, _, within):
                return int(permutation[name][blocks[str(within)], where])
            case Fixed():
                return where
            case Cat(parts):
                offset = 0
                for part in parts:
                    if where < offset + part.size:
                        return offset + old(part, where - offset)
                    offset += part.size
            case Prod(factors):
                total, stride = 0, axis.size
                for part in factors:
                    stride //= part.size
                    total += old(part, where // stride % part.size) * stride
                return total
            case Parted(across, cases):
                offset = 0
                for size, part in cases:
                    if place[across] < offset + size:
                        return old(part, where)
                    offset += size
        raise AssertionError(axis)

    return old(axes[dim], place[dim])


def positions(axis: Axis, where: int) -> list[tuple[Group, int]]:
    match axis:
        case Group():
            return [(axis, where)]
        case Cat(parts):
            offset = 0
            for part in parts:
                if where < offset + part.size:
                    return positions(part, where - offset)
                offset += part.size
        case Prod(factors):
            found, stride = [], axis.size
            for part in factors:
                stride //= part.size
                found += positions(part, where // stride % part.size)
            return found
    return []


def filled(axes: Sequence[Axis], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn([a.size for a in axes], generator=generator, dtype=torch.float64)


@LAYOUT
def test_every_value_comes_from_where_the_definition_says(name: str) -> None:
    axes = LAYOUTS[name]
    spec, tensor = spec_of(axes), filled(axes, 0)
    permutation = spec.random(torch.Generator().manual_seed(1))
    moved = spec.apply(permutation, {"w": tensor})["w"]
    for place in itertools.product(*(range(size) for size in tensor.shape)):
        origin = tuple(source(axes, dim, place, permutation) for dim in range(len(axes)))
        assert moved[place] == tensor[origin], place


@LAYOUT
def test_moving_twice_is_moving_by_the_composition(name: str) -> None:
    axes = LAYOUTS[name]
    spec, state = spec_of(axes), {"w": filled(axes, 0)}
    first, second = (spec.random(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    twice = spec.apply(second, spec.apply(first, state))["w"]
    assert torch.equal(spec.apply(second.compose(first), state)["w"], twice)
    assert torch.equal(
        spec.apply(second.invert(), {"w": twice})["w"], spec.apply(first, state)["w"]
    )
    assert second.compose(second.invert()).is_identity
    assert second.invert().compose(second).is_identity


@LAYOUT
def test_pieces_hold_every_value_once(name: str) -> None:
    axes = LAYOUTS[name]
    tensor = filled(axes, 0)
    found = list(pieces(tensor, axes))
    assert sum(piece.numel() for piece, _ in found) == tensor.numel()
    values = torch.cat([piece.reshape(-1) for piece, _ in found])
    assert torch.equal(values.sort().values, tensor.reshape(-1).sort().values)
    for piece, atoms in found:
        assert tuple(piece.shape) == tuple(atom.size for atom in atoms)
        assert all(isinstance(atom, Group | Fixed) for atom in atoms)


def test_one_order_may_be_given_for_all_blocks() -> None:
    spec = spec_of(LAYOUTS["blocks"])
    tensor = filled(LAYOUTS["blocks"], 0)
    still = spec.identity().indices
    one = spec.apply(Permutation({**still, "units": torch.tensor([1, 0])}), {"w": tensor})["w"]
    assert torch.equal(one, tensor.unflatten(0, (3, 2)).flip(1).flatten(0, 1))
    with pytest.raises(SpecError, match="units: not a permutation of 2 units"):
        spec.apply(Permutation({**still, "units": torch.tensor([[1, 0]])}), {"w": tensor})
    with pytest.raises(SpecError, match="units: not a permutation of 2 units"):
        spec.apply(Permutation({**still, "units": torch.zeros(3, 2).long()}), {"w": tensor})


def test_groups_that_a_permutation_does_not_name_stay() -> None:
    axes = LAYOUTS["across-product"]
    tensor = filled(axes, 0)
    moved = move_tensor(tensor, axes, {"heads": torch.tensor([2, 0, 1])})
    assert torch.equal(moved, tensor.unflatten(0, (3, 2))[[2, 0, 1]].flatten(0, 1))


@pytest.mark.parametrize("name", ["blocks", "units-before-blocks", "across-few"])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_matched_with_what_is_within_as_well_as_by_brute_force(
    name: str, seed: int
) -> None:
    axes = LAYOUTS[name]
    spec, target, start = spec_of(axes), filled(axes, seed), filled(axes, seed + 50)
    (inner,) = spec.within
    orders = list(itertools.permutations(range(spec.groups[inner])))
    best = max(
        float((target * move_tensor(start, axes, {"heads": torch.tensor(heads),
                                                  inner: torch.tensor(within)})).sum())
        for heads in itertools.permutations(range(3))
        for within in itertools.product(orders, repeat=3)
    )  # fmt: skip
    matcher = Matcher(spec, {"w": target}, {"w": start})
    matcher.step("heads")
    assert matcher.objective == pytest.approx(best, rel=1e-12)
    assert torch.equal(spec.apply(matcher.permutation, {"w": start})["w"], matcher.weights["w"])


def test_cut_axis_takes_whole_units_only() -> None:
    axis = Cat((PLAIN, Fixed(4), HEADS))
    assert cut_axis(axis, 0, 5) == PLAIN
    assert cut_axis(axis, 5, 2) == Fixed(2)
    assert cut_axis(axis, 6, 6) == Cat((Fixed(3), HEADS))
    with pytest.raises(ValueError, match="cuts through the units"):
        cut_axis(axis, 4, 3)
