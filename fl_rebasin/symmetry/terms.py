"""Terms: what the trace knows so far about an axis of a tensor.

Each axis starts as an `Unknown`, the variable of the equations that operators state. Solving the
equations binds unknowns to other terms: to a concatenation (`Join`), to a row-major product
(`Product`), or to an axis that differs between the parts of another axis (`Varying`). What is
neither bound nor pinned at the end becomes a group of the spec.

An unknown may *vary along* another axis of the same tensor. The units within an attention head, for
example, are permuted in each head on their own, so their axis is a different one in each block of
the axis of heads. If that axis is later cut into parts, the unknown becomes a `Varying`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(eq=False)
class Unknown:
    """An axis that is free, bound to another term, or pinned.

    Attributes:
        size: number of positions.
        reason: why the axis is pinned, so that no unit of it may move; None if it is not.
        bound: the term that the axis turned out to be.
        along: axes of the same tensor in each block of which it may be a different axis.
        outer: whether other axes vary along it. It then remembers where it was cut even if it is
            pinned.
    """

    size: int
    reason: str | None = None
    bound: Term | None = None
    along: tuple[Term, ...] = ()
    outer: bool = False


@dataclass(frozen=True, eq=False)
class Join:
    """A concatenation of two or more parts, none of them a `Join`."""

    parts: tuple[Term, ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum(part.size for part in self.parts))


@dataclass(frozen=True, eq=False)
class Product:
    """A row-major product of factors, none of them a `Product` or of size 1."""

    factors: tuple[Term, ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", math.prod(factor.size for factor in self.factors))


@dataclass(frozen=True, eq=False)
class Varying:
    """An axis that is a different one in each part of another axis: pairs (part, axis there)."""

    cases: tuple[tuple[Term, Term], ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.cases[0][1].size)


Term: TypeAlias = Unknown | Join | Product | Varying

UNIT = Product(())
"""The axis of size 1."""


def join(parts: Sequence[Term]) -> Term:
    """Concatenate axes; empty ones vanish."""
    flat: list[Term] = []
    for part in map(resolve, parts):
        if part.size:
            flat += part.parts if isinstance(part, Join) else (part,)
    if not flat:
        return Unknown(0, reason="empty axis")
    return flat[0] if len(flat) == 1 else Join(tuple(flat))


def product(factors: Sequence[Term]) -> Term:
    """Multiply axes, the last one varying fastest; axes of size 1 vanish."""
    flat: list[Term] = []
    for each in map(resolve, factors):
        if each.size != 1:
            flat += each.factors if isinstance(each, Product) else (each,)
    if len(flat) == 1:
        return flat[0]
    if flat and isinstance(flat[0], Join):
        # A factor that differs between the parts of the first one: a concatenation of products.
        whole = set(leaves(flat[0]))
        if any(_varies_along(each, whole) for each in flat[1:]):
            parts = flat[0].parts
            return join(
                [
                    product([part, *(restrict(each, parts, number) for each in flat[1:])])
                    for number, part in enumerate(parts)
                ]
            )
    return Product(tuple(flat))


def varying(cases: Iterable[tuple[Term, Term]]) -> Term:
    """Return the axis with these cases, pairs (part, axis there): a plain one if all are equal."""
    flat: list[tuple[Term, Term]] = []
    for part, term in cases:
        part, term = resolve(part), resolve(term)
        if isinstance(part, Join):
            flat += [
                (piece, restrict(term, part.parts, number))
                for number, piece in enumerate(part.parts)
            ]
        else:
            flat.append((part, term))
    first = flat[0][1]
    if first.size == 1 or all(same(term, first) for _, term in flat):
        return first
    if all(leaf.reason for _, term in flat for leaf in leaves(term)):
        return first
    return Varying(tuple(flat))


def fresh(shape: Sequence[int]) -> tuple[Unknown, ...]:
    """Return new axes, each of which may vary along those before it."""
    axes: list[Unknown] = []
    for size in shape:
        axes.append(Unknown(size, along=tuple(axes), outer=True))
    return tuple(axes)


def same(one: Term, other: Term) -> bool:
    """Whether two resolved axes have the same structure over the same unknowns."""
    match one, other:
        case (Join(ours), Join(theirs)) | (Product(ours), Product(theirs)):
            return len(ours) == len(theirs) and all(map(same, ours, theirs))
        case Varying(ours), Varying(theirs):
            return len(ours) == len(theirs) and all(
                same(mine[0], yours[0]) and same(mine[1], yours[1])
                for mine, yours in zip(ours, theirs, strict=True)
            )
    return one is other


def leaves(term: Term) -> Iterator[Unknown]:
    """Yield the unbound unknowns of an axis from left to right."""
    match resolve(term):
        case Unknown() as unknown:
            yield unknown
        case Join(parts) | Product(parts):
            for part in parts:
                yield from leaves(part)
        case Varying(cases):
            for _, each in cases:
                yield from leaves(each)


def pin(term: Term, reason: str) -> None:
    """Forbid every unit of an axis to move; an earlier reason is kept."""
    for unknown in leaves(term):
        unknown.reason = unknown.reason or reason


def resolve(term: Term) -> Term:
    """Replace bound unknowns by what they are bound to, at every level."""
    match term:
        case Unknown():
            return _resolve_unknown(term)
        case Join(parts):
            return join(parts)
        case Product(factors):
            return product(factors)
        case Varying(cases):
            return varying(cases)


def _resolve_unknown(unknown: Unknown) -> Term:
    """Follow a chain of bindings, and shorten it for the next call."""
    chain: list[Unknown] = []
    end: Term = unknown
    while isinstance(end, Unknown) and end.bound is not None:
        chain.append(end)
        end = end.bound
    found = _refresh_along(end) if isinstance(end, Unknown) else resolve(end)
    for link in chain:
        link.bound = found
    return found


def _refresh_along(unknown: Unknown) -> Term:
    """Resolve the axes that an unbound unknown varies along; split it if one of them was cut."""
    if not unknown.along:
        return unknown
    if unknown.reason is not None:
        unknown.along = ()
        return unknown
    outers: list[Term] = []
    for outer in map(resolve, unknown.along):
        outers += outer.factors if isinstance(outer, Product) else (outer,)
    for index, outer in enumerate(outers):
        if isinstance(outer, Join):
            unknown.bound = _split(unknown, outer, outers[:index], outers[index + 1 :])
            return unknown.bound
    unknown.along = tuple(o for o in outers if isinstance(o, Unknown) and o.size != 1)
    for outer in unknown.along:
        assert isinstance(outer, Unknown)
        outer.outer = True
    return unknown


def _split(unknown: Unknown, cut: Join, before: list[Term], after: list[Term]) -> Term:
    """Return a new unknown for each part of one of the axes that an unknown varies along."""
    cases: list[tuple[Term, Term]] = []
    for number, part in enumerate(cut.parts):
        along = (
            *(restrict(outer, cut.parts, number) for outer in before),
            part,
            *(restrict(outer, cut.parts, number) for outer in after),
        )
        cases.append((part, Unknown(unknown.size, along=along)))
    return varying(cases)


def _varies_along(term: Term, whole: Collection[Unknown]) -> bool:
    """Whether a resolved axis has different cases for parts of an axis with these unknowns."""
    match term:
        case Unknown():
            return False
        case Join(parts) | Product(parts):
            return any(_varies_along(part, whole) for part in parts)
        case Varying(cases):
            return any(
                any(leaf in whole for leaf in leaves(part)) or _varies_along(each, whole)
                for part, each in cases
            )


def restrict(term: Term, pieces: Sequence[Term], number: int) -> Term:
    """Return what an axis is within one of the pieces into which another axis was cut."""
    term = resolve(term)
    match term:
        case Unknown():
            return term
        case Join(parts):
            return join([restrict(each, pieces, number) for each in parts])
        case Product(factors):
            return product([restrict(each, pieces, number) for each in factors])
        case Varying(cases):
            return _restrict_cases(term, cases, pieces, number)


def _restrict_cases(
    term: Varying, cases: Sequence[tuple[Term, Term]], pieces: Sequence[Term], number: int
) -> Term:
    start = sum(piece.size for piece in pieces[:number])
    end = start + pieces[number].size
    every = {leaf for piece in pieces for leaf in leaves(piece)}
    concerned = [not every.isdisjoint(leaves(part)) for part, _ in cases]
    total = sum(part.size for (part, _), own in zip(cases, concerned, strict=True) if own)
    if total != sum(piece.size for piece in pieces):
        return term
    inside: list[tuple[Term, Term]] = []
    offset = 0
    for (part, each), own in zip(cases, concerned, strict=True):
        # Offsets identify the parts: two parts may have the same units.
        if not own:
            inside.append((part, restrict(each, pieces, number)))
            continue
        if offset < end and start < offset + part.size:
            within = offset >= start and offset + part.size <= end
            inside.append((part if within else pieces[number], restrict(each, pieces, number)))
        offset += part.size
    return varying(inside)
