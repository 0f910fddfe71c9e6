"""Cutting, factoring and reshaping axes: concatenations and products appear where needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fl_rebasin.symmetry.terms import (
    UNIT,
    Join,
    Product,
    Term,
    Unknown,
    Varying,
    join,
    pin,
    product,
    resolve,
    restrict,
    varying,
)


def cut(term: Term, size: int) -> tuple[Term, Term] | None:
    """Cut an axis into its first `size` positions and the rest; None if that splits a unit."""
    term = resolve(term)
    match term:
        case Unknown(reason=reason):
            halves = tuple(
                Unknown(part, reason, along=term.along, outer=term.outer)
                for part in (size, term.size - size)
            )
            if reason is None or term.outer:
                term.bound = join(halves)
            return halves[0], halves[1]
        case Join(parts):
            offset = 0
            for index, part in enumerate(parts):
                if offset == size:
                    return join(parts[:index]), join(parts[index:])
                if offset + part.size > size:
                    halved = cut(part, size - offset)
                    if halved is None:
                        return None
                    return (
                        join([*parts[:index], halved[0]]),
                        join([halved[1], *parts[index + 1 :]]),
                    )
                offset += part.size
            return None
        case Product(factors):
            inner = math.prod(f.size for f in factors[1:])
            if size % inner:
                return cut(term, size) if _keep_blocks_in_order(term) else None
            pair = cut(factors[0], size // inner)
            if pair is None:
                return None
            first, second = (
                product([half, *(restrict(each, pair, number) for each in factors[1:])])
                for number, half in enumerate(pair)
            )
            return first, second
        case Varying(cases):
            return _by_case(cases, lambda each: cut(each, size))


def _keep_blocks_in_order(term: Product) -> bool:
    """Turn a product into a concatenation by pinning the order of its outermost blocks.

    Returns:
        Whether it worked.
    """
    blocks = term.factors[0]
    if not isinstance(blocks, Unknown):
        return False
    blocks.bound = join([Unknown(1, along=blocks.along, outer=True) for _ in range(blocks.size)])
    # If nothing varies along the blocks, they are all the same and the term stays a product.
    return isinstance(resolve(term), Join)


def factor(term: Term, outer: int) -> tuple[Term, Term] | None:
    """Split an axis into `outer` blocks of equal size; None where its structure forbids it.

    Returns:
        The axis of the blocks, and the axis within each block.
    """
    term = resolve(term)
    if outer == 0 or term.size % outer:
        return None
    if outer == 1:
        return UNIT, term
    if outer == term.size:
        return term, UNIT
    match term:
        case Unknown(reason=None):
            blocks = Unknown(outer, along=term.along, outer=True)
            pair = blocks, Unknown(term.size // outer, along=(*term.along, blocks))
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
                    inner = factor(part, outer // done) if outer % done == 0 else None
                    if inner is None:
                        return factor(term, outer) if _keep_blocks_in_order(term) else None
                    return (
                        product([*factors[:index], inner[0]]),
                        product([inner[1], *factors[index + 1 :]]),
                    )
                done *= part.size
            return None
        case Join():
            return _factor_join(term, term.size // outer)
        case Varying(cases):
            return _by_case(cases, lambda each: factor(each, outer))


def _factor_join(term: Term, size: int) -> tuple[Term, Term] | None:
    """Split a concatenation into blocks of some size, each with an axis of its own."""
    cases: list[tuple[Term, Term]] = []
    rest: Term | None = term
    while rest is not None:
        first = rest.parts[0] if isinstance(rest, Join) else rest
        halves: tuple[Term, Term | None] | None
        if first.size % size == 0:
            pair = factor(first, first.size // size)
            halves = (first, None) if rest is first else cut(rest, first.size)
        else:
            halves = (rest, None) if rest.size == size else cut(rest, size)
            pair = None if halves is None else (UNIT, halves[0])
        if pair is None or halves is None:
            return None
        blocks, within = pair
        cases.append((blocks if blocks.size > 1 else Unknown(1, outer=True), within))
        rest = halves[1]
    return join([blocks for blocks, _ in cases]), varying(cases)


def _by_case(
    cases: Sequence[tuple[Term, Term]], halve: Callable[[Term], tuple[Term, Term] | None]
) -> tuple[Term, Term] | None:
    """Halve the axis of each case; None if one of them cannot be halved."""
    halves = [halve(each) for _, each in cases]
    if None in halves:
        return None
    both = [
        [(part, half[side]) for (part, _), half in zip(cases, filter(None, halves), strict=True)]
        for side in (0, 1)
    ]
    return varying(both[0]), varying(both[1])


def reshape(terms: Sequence[Term], shape: Sequence[int], reason: str) -> tuple[Term, ...]:
    """Return the axes after a row-major reshape; axes that cannot be followed are pinned.

    Args:
        terms: the axes before.
        shape: sizes of the axes after.
        reason: why an axis that cannot be followed is pinned.
    """
    if 0 not in shape and terms and shape and terms[0].size == shape[0]:
        return terms[0], *reshape(terms[1:], shape[1:], reason)
    if 0 not in shape and terms and shape and terms[-1].size == shape[-1]:
        return *reshape(terms[:-1], shape[:-1], reason), terms[-1]
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
