"""The axis algebra against its definition, and matching of blocks against brute force."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from axes_oracle import source
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
    "joined": (Cat((Prod((HEADS, UNITS)), PLAIN, Prod((HEADS, WIDE)))),),
    "across": (HEADS, WIDE),
    "across-few": (HEADS, Prod((UNITS, Fixed(2)))),
    "across-product": (Prod((HEADS, UNITS)), WIDE, Fixed(2)),
    "across-backwards": (WIDE, Fixed(2), Prod((Fixed(2), HEADS))),
    "parted": (Cat((PLAIN, Fixed(2))), Parted(0, ((5, Group("a", 4)), (2, Group("b", 4))))),
    "parted-inside": (
        Parted(1, ((2, PLAIN), (3, Cat((Group("c", 2), Fixed(3)))))),
        Cat((Fixed(2), Group("d", 3))),
    ),
}
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


def filled(axes: Sequence[Axis], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn([a.size for a in axes], generator=generator, dtype=torch.float64)


@LAYOUT
def test_every_value_moves_as_the_definition_says(name: str) -> None:
    axes = LAYOUTS[name]
    spec, tensor = spec_of(axes), filled(axes, 0)
    permutation = spec.random(torch.Generator().manual_seed(1))
    moved = spec.apply(permutation, {"w": tensor})["w"]
    for place in itertools.product(*(range(size) for size in tensor.shape)):
        origin = tuple(source(axes, dim, place, permutation) for dim in range(len(axes)))
        assert moved[place] == tensor[origin], place


@LAYOUT
def test_applying_two_permutations_is_applying_their_composition(name: str) -> None:
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
def test_pieces_contain_every_value_once(name: str) -> None:
    axes = LAYOUTS[name]
    tensor = filled(axes, 0)
    found = list(pieces(tensor, axes))
    assert sum(piece.numel() for piece, _ in found) == tensor.numel()
    values = torch.cat([piece.reshape(-1) for piece, _ in found])
    assert torch.equal(values.sort().values, tensor.reshape(-1).sort().values)
    for piece, atoms in found:
        assert tuple(piece.shape) == tuple(atom.size for atom in atoms)
        assert all(isinstance(atom, Group | Fixed) for atom in atoms)


def test_all_blocks_may_share_one_order() -> None:
    spec = spec_of(LAYOUTS["blocks"])
    tensor = filled(LAYOUTS["blocks"], 0)
    identity = spec.identity().indices
    one = spec.apply(Permutation({**identity, "units": torch.tensor([1, 0])}), {"w": tensor})["w"]
    assert torch.equal(one, tensor.unflatten(0, (3, 2)).flip(1).flatten(0, 1))
    with pytest.raises(SpecError, match="units: not a permutation of 2 units"):
        spec.apply(Permutation({**identity, "units": torch.tensor([[1, 0]])}), {"w": tensor})
    with pytest.raises(SpecError, match="units: not a permutation of 2 units"):
        spec.apply(Permutation({**identity, "units": torch.zeros(3, 2).long()}), {"w": tensor})


def test_groups_that_a_permutation_does_not_name_are_not_moved() -> None:
    axes = LAYOUTS["across-product"]
    tensor = filled(axes, 0)
    moved = move_tensor(tensor, axes, {"heads": torch.tensor([2, 0, 1])})
    assert torch.equal(moved, tensor.unflatten(0, (3, 2))[[2, 0, 1]].flatten(0, 1))


@pytest.mark.parametrize("name", ["blocks", "units-before-blocks", "across-few"])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_and_the_units_within_are_matched_as_well_as_by_brute_force(
    name: str, seed: int
) -> None:
    axes = LAYOUTS[name]
    spec, target, start = spec_of(axes), filled(axes, seed), filled(axes, seed + 50)
    (inner,) = spec.within
    orders = list(itertools.permutations(range(spec.groups[inner])))
    candidates = (
        {"heads": torch.tensor(heads), inner: torch.tensor(within)}
        for heads in itertools.permutations(range(3))
        for within in itertools.product(orders, repeat=3)
    )
    best = max(float((target * move_tensor(start, axes, each)).sum()) for each in candidates)
    matcher = Matcher(spec, {"w": target}, {"w": start})
    matcher.step("heads")
    assert matcher.objective == pytest.approx(best, rel=1e-12)
    assert torch.equal(spec.apply(matcher.permutation, {"w": start})["w"], matcher.weights["w"])


def test_cut_axis_does_not_cut_through_units() -> None:
    axis = Cat((PLAIN, Fixed(4), HEADS))
    assert cut_axis(axis, 0, 5) == PLAIN
    assert cut_axis(axis, 5, 2) == Fixed(2)
    assert cut_axis(axis, 6, 6) == Cat((Fixed(3), HEADS))
    with pytest.raises(ValueError, match="cuts through the units"):
        cut_axis(axis, 4, 3)
