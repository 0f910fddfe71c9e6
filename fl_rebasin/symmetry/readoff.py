"""Solved equations between axes -> a permutation spec with named groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fl_rebasin.symmetry.axes import Axis, Cat, Fixed, Group, Parted, Prod
from fl_rebasin.symmetry.spec import PermutationSpec
from fl_rebasin.symmetry.unify import (
    Join,
    Product,
    Term,
    Unknown,
    Varying,
    join,
    leaves,
    limit,
    limit_to,
    pin,
    resolve,
    same,
)


def read_off(terms: Mapping[str, tuple[Term, ...]], learnable: Sequence[str]) -> PermutationSpec:
    """Turn the terms of a state dict's axes into groups, axis expressions and reasons."""
    counted = {leaf for key in learnable for term in terms[key] for leaf in leaves(term)}
    for each in terms.values():
        for leaf in {leaf for term in each for leaf in leaves(term)} - counted:
            pin(leaf, "on no parameter")
    _settle(list(terms.values()))
    names: dict[Unknown, Group] = {}
    taken: set[str] = set()
    pinned: dict[str, str] = {}

    def group(unknown: Unknown, stem: str) -> Group:
        if unknown not in names:
            within = None
            if unknown.along:
                (blocks,) = unknown.along
                assert isinstance(blocks, Unknown)
                within = group(blocks, stem).name
            name, count = stem, 1
            while name in taken:
                count += 1
                name = f"{stem}#{count}"
            taken.add(name)
            names[unknown] = Group(name, unknown.size, within)
        return names[unknown]

    def axis(term: Term, key: str, dim: int) -> Axis:
        if term.size < 2:
            return Fixed(term.size)
        match resolve(term):
            case Unknown(size=size, reason=str(reason)):
                pinned.setdefault(f"{key}[{dim}]", reason)
                return Fixed(size)
            case Unknown() as unknown:
                return group(unknown, key.rpartition(".")[0] or key)
            case Join(parts):
                return _cat([axis(part, key, dim) for part in parts])
            case Product(factors):
                return Prod(tuple(axis(part, key, dim) for part in factors))
            case Varying(cases):
                return _parted(
                    _across(terms[key], dim),
                    [(place.size, axis(each, key, dim)) for place, each in cases],
                )

    # A group takes its name from the layer that puts it out, so first axes are named first.
    for key in [*learnable, *terms]:
        if terms[key]:
            axis(terms[key][0], key, 0)
    axes = {
        key: tuple(axis(term, key, dim) for dim, term in enumerate(each))
        for key, each in terms.items()
    }
    return PermutationSpec(
        axes,
        {group.name: group.size for group in names.values()},
        pinned,
        tuple(learnable),
        {group.name: group.within for group in names.values() if group.within is not None},
    )


def _across(terms: Sequence[Term], dim: int) -> int | None:
    """Return the axis along whose parts another axis of a tensor varies; None if there is none."""
    varying = resolve(terms[dim])
    assert isinstance(varying, Varying)
    places = join([place for place, _ in varying.cases])
    for number, other in enumerate(map(resolve, terms)):
        if number != dim and isinstance(other, Join) and same(other, places):
            return number
    return None


def _parted(across: int | None, cases: list[tuple[int, Axis]]) -> Axis:
    """Return an axis in parts; neighbouring parts with the same axis are one."""
    assert across is not None, cases
    merged: list[tuple[int, Axis]] = []
    for size, axis in cases:
        if merged and merged[-1][1] == axis:
            merged[-1] = merged[-1][0] + size, axis
        else:
            merged.append((size, axis))
    return merged[0][1] if len(merged) == 1 else Parted(across, tuple(merged))


def _cat(parts: Sequence[Axis]) -> Axis:
    """Concatenate; fixed parts side by side are one."""
    merged: list[Axis] = []
    for part in parts:
        if isinstance(part, Fixed) and merged and isinstance(merged[-1], Fixed):
            merged[-1] = Fixed(merged[-1].size + part.size)
        else:
            merged.append(part)
    return merged[0] if len(merged) == 1 else Cat(tuple(merged))


def _settle(tensors: Sequence[tuple[Term, ...]]) -> None:
    """Give up what an axis expression cannot say, until every tensor's axes can be written down.

    Units may lie within the blocks of one group, which stands on the same axis or makes up another
    axis of the same tensor; an axis may be another one in each part of another axis.
    """
    done = False
    while not done:
        done = True
        for terms in tensors:
            before = [_signature(term) for term in terms]
            limit_to(terms)
            for dim in range(len(terms)):
                now = [resolve(term) for term in terms]
                _simplify(now, dim, now[dim], ())
            done = done and before == [_signature(term) for term in terms]


def _signature(term: Term) -> Any:
    """Return something that changes whenever an axis does."""
    match resolve(term):
        case Unknown() as unknown:
            return id(unknown), unknown.reason is None, tuple(map(id, unknown.along))
        case Varying(cases):
            return "|", [(_signature(place), _signature(each)) for place, each in cases]
        case Join(parts):
            return "+", [_signature(part) for part in parts]
        case Product(factors):
            return "*", [_signature(part) for part in factors]


def _simplify(
    terms: Sequence[Term], dim: int, term: Term, around: tuple[tuple[Term, ...], ...]
) -> None:
    """Simplify what stands on one axis, inside the products `around` it."""
    match term:
        case Varying(cases) if (
            not around and term is terms[dim] and _across(terms, dim) is not None
        ):
            for _, each in cases:
                limit(each, lambda leaf: False)
        case Varying():
            limit(term, lambda leaf: False)
        case Join(parts):
            for part in parts:
                _simplify(terms, dim, part, around)
        case Product(factors):
            for part in factors:
                _simplify(terms, dim, part, (*around, factors))
        case Unknown(along=along) if along:
            kept: Unknown | None = None
            for outer in along:
                assert isinstance(outer, Unknown)
                here = [factors for factors in around if outer in factors]
                elsewhere = any(
                    outer is across or (isinstance(across, Product) and outer in across.factors)
                    for place, across in enumerate(map(resolve, terms))
                    if place != dim
                )
                if not (here or elsewhere) or outer.along:
                    continue
                if outer.reason is None:
                    kept = outer
                elif here and here[0][0] is outer:
                    # In blocks that stay, the units are groups of their own.
                    places = [Unknown(1, outer.reason, outer=True) for _ in range(outer.size)]
                    outer.bound = join(places)
                    return
            limit(term, lambda leaf: leaf is kept)
