"""The definition of a permuted axis, evaluated for one value at a time."""

from collections.abc import Sequence

from fl_rebasin import Permutation
from fl_rebasin.symmetry.axes import Axis, Cat, Fixed, Group, Parted, Prod


def source(axes: Sequence[Axis], dim: int, place: tuple[int, ...], permutation: Permutation) -> int:
    """Return where the value at a place comes from along one axis.

    Args:
        axes: the axes of a tensor.
        dim: one of them.
        place: an index on each axis of the permuted tensor.
        permutation: what was applied.
    """
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
    """Return the groups that one index of an axis stands for, and the unit of each."""
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
