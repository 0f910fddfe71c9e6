"""From solved equations between axes to a permutation spec with named groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fl_rebasin.symmetry.axes import Axis, Cat, Fixed, Group, Parted, Prod
from fl_rebasin.symmetry.spec import PermutationSpec
from fl_rebasin.symmetry.terms import (
    Join,
    Product,
    Term,
    Unknown,
    Varying,
    join,
    leaves,
    pin,
    resolve,
    same,
)
from fl_rebasin.symmetry.unify import limit, limit_to_tensor


def terms_to_spec(
    terms: Mapping[str, tuple[Term, ...]], learnable: Sequence[str]
) -> PermutationSpec:
    """Turn the terms of a state dict's axes into groups, axis expressions and pin reasons.

    Args:
        terms: for each key of the state dict the term of each axis.
        learnable: keys of the parameters that count in the matching objective.
    """
    counted = {leaf for key in learnable for term in terms[key] for leaf in leaves(term)}
    for each in terms.values():
        for leaf in {leaf for term in each for leaf in leaves(term)} - counted:
            pin(leaf, "only in buffers")
    _make_expressible(list(terms.values()))
    namer = _Namer()
    # A group is named after the layer whose outputs it permutes, so first axes are named first.
    for key in [*learnable, *terms]:
        if terms[key]:
            namer.axis(terms[key], key, 0)
    axes = {
        key: tuple(namer.axis(each, key, dim) for dim in range(len(each)))
        for key, each in terms.items()
    }
    groups = list(namer.groups.values())
    return PermutationSpec(
        axes,
        {group.name: group.size for group in groups},
        namer.pinned,
        tuple(learnable),
        {group.name: group.within for group in groups if group.within is not None},
    )


class _Namer:
    """Turns terms into axis expressions, and names the groups in them.

    Attributes:
        groups: the group of each unknown.
        pinned: axes that may not move, as `"key[dim]"`, each with its reason.
    """

    def __init__(self) -> None:
        self.groups: dict[Unknown, Group] = {}
        self.pinned: dict[str, str] = {}
        self._names: set[str] = set()

    def axis(self, terms: Sequence[Term], key: str, dim: int) -> Axis:
        """Return the expression of one axis of the tensor with some key."""
        return self._expression(terms[dim], terms, key, dim)

    def _expression(self, term: Term, terms: Sequence[Term], key: str, dim: int) -> Axis:
        if term.size < 2:
            return Fixed(term.size)
        match resolve(term):
            case Unknown(size=size, reason=str(reason)):
                self.pinned.setdefault(f"{key}[{dim}]", reason)
                return Fixed(size)
            case Unknown() as unknown:
                return self._group(unknown, key.rpartition(".")[0] or key)
            case Join(parts):
                return _cat([self._expression(part, terms, key, dim) for part in parts])
            case Product(factors):
                return Prod(tuple(self._expression(part, terms, key, dim) for part in factors))
            case Varying(cases):
                return _parted(
                    _across(terms, dim),
                    [(part.size, self._expression(each, terms, key, dim)) for part, each in cases],
                )

    def _group(self, unknown: Unknown, stem: str) -> Group:
        """Return the group of an unknown; a new one is named after the layer `stem`."""
        if unknown not in self.groups:
            within = None
            if unknown.along:
                (blocks,) = unknown.along
                assert isinstance(blocks, Unknown)
                within = self._group(blocks, stem).name
            name, count = stem, 1
            while name in self._names:
                count += 1
                name = f"{stem}#{count}"
            self._names.add(name)
            self.groups[unknown] = Group(name, unknown.size, within)
        return self.groups[unknown]


def _across(terms: Sequence[Term], dim: int) -> int | None:
    """Return the axis between whose parts another axis of the tensor differs; None without one."""
    varying = resolve(terms[dim])
    assert isinstance(varying, Varying)
    parts = join([part for part, _ in varying.cases])
    for number, other in enumerate(map(resolve, terms)):
        if number != dim and isinstance(other, Join) and same(other, parts):
            return number
    return None


def _parted(across: int | None, cases: list[tuple[int, Axis]]) -> Axis:
    """Return an axis in parts; adjacent parts with the same axis become one."""
    assert across is not None, cases
    merged: list[tuple[int, Axis]] = []
    for size, axis in cases:
        if merged and merged[-1][1] == axis:
            merged[-1] = merged[-1][0] + size, axis
        else:
            merged.append((size, axis))
    return merged[0][1] if len(merged) == 1 else Parted(across, tuple(merged))


def _cat(parts: Sequence[Axis]) -> Axis:
    """Concatenate axes; adjacent fixed ones become one."""
    merged: list[Axis] = []
    for part in parts:
        if isinstance(part, Fixed) and merged and isinstance(merged[-1], Fixed):
            merged[-1] = Fixed(merged[-1].size + part.size)
        else:
            merged.append(part)
    return merged[0] if len(merged) == 1 else Cat(tuple(merged))


def _make_expressible(tensors: Sequence[tuple[Term, ...]]) -> None:
    """Give up freedom that axis expressions cannot describe, until nothing changes.

    Expressions can describe units within the blocks of one group, if the group is on the same axis
    or makes up another axis of the tensor; and an axis that differs between the parts of another.
    """
    done = False
    while not done:
        done = True
        for terms in tensors:
            before = [_signature(term) for term in terms]
            limit_to_tensor(terms)
            for dim in range(len(terms)):
                now = [resolve(term) for term in terms]
                _simplify(now, dim, now[dim], ())
            done = done and before == [_signature(term) for term in terms]


def _signature(term: Term) -> Any:
    """Return a value that changes whenever a term does."""
    match resolve(term):
        case Unknown() as unknown:
            return id(unknown), unknown.reason is None, tuple(map(id, unknown.along))
        case Varying(cases):
            return "|", [(_signature(part), _signature(each)) for part, each in cases]
        case Join(parts):
            return "+", [_signature(part) for part in parts]
        case Product(factors):
            return "*", [_signature(part) for part in factors]


def _simplify(
    terms: Sequence[Term], dim: int, term: Term, enclosing: tuple[tuple[Term, ...], ...]
) -> None:
    """Simplify a term on one axis of a tensor.

    Args:
        terms: the resolved terms of all axes.
        dim: the axis.
        term: the term, or a part of the term, of that axis.
        enclosing: the factors of each product that the term is part of.
    """
    match term:
        case Varying(cases) if (
            not enclosing and term is terms[dim] and _across(terms, dim) is not None
        ):
            for _, each in cases:
                limit(each, lambda leaf: False)
        case Varying():
            limit(term, lambda leaf: False)
        case Join(parts):
            for part in parts:
                _simplify(terms, dim, part, enclosing)
        case Product(factors):
            for part in factors:
                _simplify(terms, dim, part, (*enclosing, factors))
        case Unknown() if term.along:
            _simplify_blocks(terms, dim, term, enclosing)


def _simplify_blocks(
    terms: Sequence[Term], dim: int, unknown: Unknown, enclosing: tuple[tuple[Term, ...], ...]
) -> None:
    """Let units vary along one axis of blocks that an expression can name, or along none."""
    kept: Unknown | None = None
    for outer in unknown.along:
        assert isinstance(outer, Unknown)
        here = [factors for factors in enclosing if outer in factors]
        elsewhere = any(
            outer is other or (isinstance(other, Product) and outer in other.factors)
            for number, other in enumerate(map(resolve, terms))
            if number != dim
        )
        if not (here or elsewhere) or outer.along:
            continue
        if outer.reason is None:
            kept = outer
        elif here and here[0][0] is outer:
            # The units of each block that may not move are a group of their own.
            positions = [Unknown(1, outer.reason, outer=True) for _ in range(outer.size)]
            outer.bound = join(positions)
            return
    limit(unknown, lambda leaf: leaf is kept)
