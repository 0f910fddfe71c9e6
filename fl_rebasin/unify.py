"""Unknown axes and their unification: how a trace finds out which axes move together.

Every axis of every tensor starts as an `Unknown`. Operators state equations between axes;
`unify` solves them the way a type checker does, by binding unknowns to structure. Where two
structures do not fit, both sides are pinned: the solver may lose freedom, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(eq=False)
class Unknown:
    """An axis of `size` places: free, bound to a structure, or pinned for a reason."""

    size: int
    reason: str | None = None
    bound: Term | None = None


@dataclass(frozen=True, eq=False)
class Join:
    """Parts one after another (two or more, none itself a `Join`)."""

    parts: tuple[Term, ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum(part.size for part in self.parts))


@dataclass(frozen=True, eq=False)
class Product:
    """Row-major product of factors (none itself a `Product`); no factor is the axis of size 1."""

    factors: tuple[Term, ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", math.prod(factor.size for factor in self.factors))


Term: TypeAlias = Unknown | Join | Product

UNIT = Product(())
MISFIT = "axes of unlike structure meet"


def join(parts: Sequence[Term]) -> Term:
    """Concatenate axes; empty parts vanish."""
    flat: list[Term] = []
    for part in map(resolve, parts):
        if part.size:
            flat += part.parts if isinstance(part, Join) else (part,)
    if not flat:
        return Unknown(0, reason="empty axis")
    return flat[0] if len(flat) == 1 else Join(tuple(flat))


def product(factors: Sequence[Term]) -> Term:
    """Multiply axes, the last one running fastest; axes of size 1 vanish."""
    flat: list[Term] = []
    for factor in map(resolve, factors):
        if factor.size != 1:
            flat += factor.factors if isinstance(factor, Product) else (factor,)
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def resolve(term: Term) -> Term:
    """Replace bound unknowns by what they are bound to, all the way down."""
    match term:
        case Unknown():
            return _resolve_unknown(term)
        case Join(parts):
            return join(parts)
        case Product(factors):
            return product(factors)


def _resolve_unknown(unknown: Unknown) -> Term:
    """Follow a chain of bindings, and shorten it for the next time."""
    chain: list[Unknown] = []
    end: Term = unknown
    while isinstance(end, Unknown) and end.bound is not None:
        chain.append(end)
        end = end.bound
    if isinstance(end, Unknown):
        found: Term = UNIT if end.size == 1 else end
    else:
        found = resolve(end)
    for link in chain:
        link.bound = found
    return found


def leaves(term: Term) -> Iterator[Unknown]:
    """Yield the unbound unknowns of an axis, left to right."""
    match resolve(term):
        case Unknown() as unknown:
            yield unknown
        case Join(parts) | Product(parts):
            for part in parts:
                yield from leaves(part)


def pin(term: Term, reason: str) -> None:
    """Forbid every unit of an axis to move; the first reason stays."""
    for unknown in leaves(term):
        unknown.reason = unknown.reason or reason


def unify(left: Term, right: Term) -> None:
    """Make two axes move together, or pin both where their structures do not fit."""
    left, right = resolve(left), resolve(right)
    if left is right:
        return
    if not _solve(left, right):
        pin(left, MISFIT)
        pin(right, MISFIT)


def _solve(left: Term, right: Term) -> bool:
    left, right = resolve(left), resolve(right)
    if left.size != right.size:
        return False
    if left is right or left.size == 1:
        return True
    if not isinstance(left, Unknown) and isinstance(right, Unknown):
        left, right = right, left
    match left, right:
        case Unknown(), Unknown():
            if right.reason is None:
                left, right = right, left
            # Now `right` carries the reason, if either does.
            left.bound = right
            return True
        case Unknown(reason=None), _:
            left.bound = right
            return True
        case Unknown(reason=reason), _:
            assert reason is not None
            pin(right, reason)
            return True
        case Product(factors=ours), Product(factors=theirs):
            size = min(ours[0].size, theirs[0].size)
            return _solve_halves(factor(left, size), factor(right, size))
        case _:
            size = min(part.parts[0].size for part in (left, right) if isinstance(part, Join))
            return _solve_halves(cut(left, size), cut(right, size))


def _solve_halves(left: tuple[Term, Term] | None, right: tuple[Term, Term] | None) -> bool:
    if left is None or right is None:
        return False
    return _solve(left[0], right[0]) and _solve(left[1], right[1])


def cut(term: Term, size: int) -> tuple[Term, Term] | None:
    """Cut an axis into its first `size` places and the rest; None where a unit would be torn."""
    term = resolve(term)
    match term:
        case Unknown(reason=None):
            halves = Unknown(size), Unknown(term.size - size)
            term.bound = join(halves)
            return halves
        case Unknown(reason=reason):
            return Unknown(size, reason), Unknown(term.size - size, reason)
        case Join(parts):
            offset = 0
            for index, part in enumerate(parts):
                if offset == size:
                    return join(parts[:index]), join(parts[index:])
                if offset + part.size > size:
                    torn = cut(part, size - offset)
                    if torn is None:
                        return None
                    return join([*parts[:index], torn[0]]), join([torn[1], *parts[index + 1 :]])
                offset += part.size
            return None
        case Product(factors):
            inner = math.prod(f.size for f in factors[1:])
            if size % inner:
                return None
            torn = cut(factors[0], size // inner)
            if torn is None:
                return None
            return product([torn[0], *factors[1:]]), product([torn[1], *factors[1:]])


def factor(term: Term, outer: int) -> tuple[Term, Term] | None:
    """Write an axis as `outer` blocks of equal size; None where its structure forbids it."""
    term = resolve(term)
    if outer == 0 or term.size % outer:
        return None
    if outer == 1:
        return UNIT, term
    if outer == term.size:
        return term, UNIT
    match term:
        case Unknown(reason=None):
            pair = Unknown(outer), Unknown(term.size // outer)
            term.bound = product(pair)
            return pair
        case Unknown(reason=reason):
            return Unknown(outer, reason), Unknown(term.size // outer, reason)
        case Product(factors):
            done = 1
            for index, part in enumerate(factors):
                if done == outer:
                    return product(factors[:index]), product(factors[index:])
                if done * part.size > outer:
                    if outer % done:
                        return None
                    inner = factor(part, outer // done)
                    if inner is None:
                        return None
                    return (
                        product([*factors[:index], inner[0]]),
                        product([inner[1], *factors[index + 1 :]]),
                    )
                done *= part.size
            return None
        case Join():
            return None


def reshape(terms: Sequence[Term], shape: Sequence[int], reason: str) -> tuple[Term, ...]:
    """Carry axes through a row-major reshape; axes that cannot be followed are pinned."""
    whole: Term = product(terms)
    out: list[Term] = []
    rest = math.prod(shape)
    for size in shape:
        rest = rest // size if size else 0
        pair = factor(whole, size) if size else None
        if pair is None:
            pin(whole, reason)
            pair = Unknown(size, reason), Unknown(rest, reason)
        out.append(pair[0])
        whole = pair[1]
    return tuple(out)
