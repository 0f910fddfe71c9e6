"""Unknown axes and their unification: how a trace finds out which axes move together.

Every axis of every tensor starts as an `Unknown`. Operators state equations between axes;
`unify` solves them the way a type checker does, by binding unknowns to structure. Where two
structures do not fit, both sides are pinned: the solver may lose freedom, never correctness.

An axis may *vary along* another axis of the same tensor: the units within a head are permuted in
each head on their own, so their axis is a different one in each block of the axis of heads. Where
such axes meet in an operator that does not keep the blocks apart, they become one for all blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(eq=False)
class Unknown:
    """An axis of `size` places: free, bound to a structure, or pinned for a reason.

    `along`: the axes in whose blocks it may be a different one. `outer`: whether others vary along
    it, so that its cuts have to be remembered even if it is pinned.
    """

    size: int
    reason: str | None = None
    bound: Term | None = None
    along: tuple[Term, ...] = ()
    outer: bool = False


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


@dataclass(frozen=True, eq=False)
class Varying:
    """Another axis in each part of an axis that is cut: pairs of a part and the axis there."""

    cases: tuple[tuple[Term, Term], ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.cases[0][1].size)


Term: TypeAlias = Unknown | Join | Product | Varying
Allowed: TypeAlias = Callable[[Unknown], bool]

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
    for each in map(resolve, factors):
        if each.size != 1:
            flat += each.factors if isinstance(each, Product) else (each,)
    if len(flat) == 1:
        return flat[0]
    if flat and isinstance(flat[0], Join):
        # What is another axis in each part of the first factor makes a concatenation of products.
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
    """Return the axis that is another one in each part; plain where it is the same in all."""
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


def resolve(term: Term) -> Term:
    """Replace bound unknowns by what they are bound to, all the way down."""
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
    """Follow a chain of bindings, and shorten it for the next time."""
    chain: list[Unknown] = []
    end: Term = unknown
    while isinstance(end, Unknown) and end.bound is not None:
        chain.append(end)
        end = end.bound
    found = _settle(end) if isinstance(end, Unknown) else resolve(end)
    for link in chain:
        link.bound = found
    return found


def _settle(unknown: Unknown) -> Term:
    """Bring `along` of an unbound unknown up to date; where that was cut, take it apart."""
    if not unknown.along:
        return unknown
    if unknown.reason is not None:
        unknown.along = ()
        return unknown
    outers: list[Term] = []
    for outer in map(resolve, unknown.along):
        outers += outer.factors if isinstance(outer, Product) else (outer,)
    for place, outer in enumerate(outers):
        if isinstance(outer, Join):
            others = outers[:place], outers[place + 1 :]
            cases: list[tuple[Term, Term]] = []
            for number, part in enumerate(outer.parts):
                before, after = (
                    [restrict(o, outer.parts, number) for o in some] for some in others
                )
                along = (*before, part, *after)
                cases.append((part, Unknown(unknown.size, along=along)))
            unknown.bound = varying(cases)
            return unknown.bound
    unknown.along = tuple(o for o in outers if isinstance(o, Unknown) and o.size != 1)
    for outer in unknown.along:
        assert isinstance(outer, Unknown)
        outer.outer = True
    return unknown


def leaves(term: Term) -> Iterator[Unknown]:
    """Yield the unbound unknowns of an axis, left to right."""
    match resolve(term):
        case Unknown() as unknown:
            yield unknown
        case Join(parts) | Product(parts):
            for part in parts:
                yield from leaves(part)
        case Varying(cases):
            for _, each in cases:
                yield from leaves(each)


def _varies_along(term: Term, whole: Collection[Unknown]) -> bool:
    """Whether a resolved axis has cases for the parts of another one."""
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
    """Return what an axis is within one of the pieces that another axis was cut into."""
    term = resolve(term)
    match term:
        case Unknown():
            return term
        case Join(parts):
            return join([restrict(each, pieces, number) for each in parts])
        case Product(factors):
            return product([restrict(each, pieces, number) for each in factors])
        case Varying(cases):
            start = sum(piece.size for piece in pieces[:number])
            end = start + pieces[number].size
            every = {leaf for piece in pieces for leaf in leaves(piece)}
            concerned = [not every.isdisjoint(leaves(place)) for place, _ in cases]
            total = sum(place.size for (place, _), own in zip(cases, concerned, strict=True) if own)
            if total != sum(piece.size for piece in pieces):
                return term
            inside: list[tuple[Term, Term]] = []
            offset = 0
            for (place, each), own in zip(cases, concerned, strict=True):
                # Places are told by where they are: two may have the same units.
                if not own:
                    inside.append((place, restrict(each, pieces, number)))
                    continue
                if offset < end and start < offset + place.size:
                    within = offset >= start and offset + place.size <= end
                    inside.append(
                        (place if within else pieces[number], restrict(each, pieces, number))
                    )
                offset += place.size
            return varying(inside)


def pin(term: Term, reason: str) -> None:
    """Forbid every unit of an axis to move; the first reason stays."""
    for unknown in leaves(term):
        unknown.reason = unknown.reason or reason


def limit(term: Term, allowed: Allowed) -> None:
    """Let an axis vary only along allowed axes, and along what stands in the same product."""
    term = resolve(term)
    match term:
        case Unknown():
            term.along = tuple(
                outer
                for outer in term.along
                if isinstance(outer, Unknown)
                and allowed(outer)
                and all(isinstance(o, Unknown) and allowed(o) for o in outer.along)
            )
        case Join(parts):
            for part in parts:
                limit(part, allowed)
        case Product(factors):
            inside = Counter(leaves(term))
            for each in factors:
                limit(each, lambda leaf: inside[leaf] == 1 or allowed(leaf))
        case Varying(cases):
            if all(allowed(leaf) for place, _ in cases for leaf in leaves(place)):
                for _, each in cases:
                    limit(each, allowed)
                return
            first = cases[0][1]
            for _, other in cases[1:]:
                _unify(first, other, allowed)
            limit(first, allowed)


def limit_to(terms: Sequence[Term]) -> None:
    """Let the axes of one tensor vary only along each other.

    An axis that stands twice in a tensor does not tell which of the two is meant.
    """
    if all(isinstance(term, Unknown) and not term.bound and not term.along for term in terms):
        return
    present = Counter(leaf for term in terms for leaf in set(leaves(term)))
    for term in terms:
        limit(term, lambda leaf: present[leaf] == 1)


def fresh(shape: Sequence[int]) -> tuple[Unknown, ...]:
    """Return new axes, each of which may vary along those before it."""
    axes: list[Unknown] = []
    for size in shape:
        axes.append(Unknown(size, along=tuple(axes), outer=True))
    return tuple(axes)


def same_in_unused(term: Term, used: Collection[Unknown]) -> None:
    """Let an axis be in parts that nobody uses what it is in a part that is used."""
    match resolve(term):
        case Join(parts) | Product(parts):
            for part in parts:
                same_in_unused(part, used)
        case Varying(cases):
            alive = [each for _, each in cases if any(leaf in used for leaf in leaves(each))]
            for _, each in cases:
                if alive and each not in alive:
                    unify(each, alive[0])


def mix(terms: Sequence[Term], dims: Iterable[int]) -> None:
    """Say that an operator mixes values along some axes: the others must not vary along them."""
    mixed = set(dims)
    gone = {leaf for dim in mixed for leaf in leaves(terms[dim])}
    for dim, term in enumerate(terms):
        if dim not in mixed:
            limit(term, lambda leaf: leaf not in gone)


def unify(left: Term, right: Term, along: Iterable[Term] = ()) -> None:
    """Make two axes move together, or pin both where their structures do not fit.

    Args:
        left: axis of one tensor.
        right: axis of another tensor.
        along: axes that both tensors have and that the operator takes place by place, already
            unified: the result may vary along these only.
    """
    aligned = {leaf for term in along for leaf in leaves(term)}
    _unify(left, right, lambda leaf: leaf in aligned)


def unify_places(left: Sequence[Term], right: Sequence[Term]) -> None:
    """Unify the axes of two tensors that are taken place by place; axes of size 1 broadcast."""
    pairs = [
        (one, other)
        for one, other in zip(left, right, strict=True)
        if one.size != 1 and other.size != 1
    ]
    # An axis comes before those that vary along it.
    pairs.sort(key=lambda pair: max(map(_depth, pair)))
    for one, other in pairs:
        unify(one, other, along=[term for term, _ in pairs])


def _depth(term: Term) -> int:
    """Along how many axes an axis varies."""
    match resolve(term):
        case Unknown(along=along):
            return len(along)
        case Join(parts) | Product(parts):
            return max(map(_depth, parts), default=0)
        case Varying(cases):
            return 1 + max(_depth(each) for _, each in cases)


def _unify(left: Term, right: Term, allowed: Allowed) -> None:
    if not _solve(left, right, allowed):
        pin(left, MISFIT)
        pin(right, MISFIT)


def _solve(left: Term, right: Term, allowed: Allowed) -> bool:
    left, right = resolve(left), resolve(right)
    if left.size != right.size:
        return False
    if left is right:
        limit(left, allowed)
        return True
    if left.size == 1:
        if isinstance(left, Unknown) and isinstance(right, Unknown):
            left.bound = right
            right.outer |= left.outer
        return True
    if isinstance(right, Varying) and not isinstance(left, Varying):
        left, right = right, left
    if isinstance(left, Varying):
        return _solve_cases(left, right, allowed)
    if not isinstance(left, Unknown) and isinstance(right, Unknown):
        left, right = right, left
    match left, right:
        case Unknown(), Unknown():
            if right.reason is None:
                left, right = right, left
            # Now `right` carries the reason, if either does.
            theirs = set(right.along)
            right.along = tuple(outer for outer in left.along if outer in theirs)
            limit(right, allowed)
            right.outer |= left.outer
            left.bound = right
            return True
        case Unknown(reason=None), _:
            own = set(left.along)
            limit(right, lambda leaf: leaf in own and allowed(leaf))
            left.bound = right
            return True
        case Unknown(reason=reason), _:
            assert reason is not None
            pin(right, reason)
            return True
        case Product(factors=ours), Product(factors=theirs):
            size = min(ours[0].size, theirs[0].size)
            return _solve_halves(factor(left, size), factor(right, size), allowed, inner=True)
        case _:
            size = min(part.parts[0].size for part in (left, right) if isinstance(part, Join))
            return _solve_halves(cut(left, size), cut(right, size), allowed, inner=False)


def _solve_halves(
    left: tuple[Term, Term] | None, right: tuple[Term, Term] | None, allowed: Allowed, inner: bool
) -> bool:
    if left is None or right is None:
        return False
    if not _solve(left[0], right[0], allowed):
        return False
    if inner:
        # The second factors lie within the blocks of the first.
        inside = set(leaves(left[0]))
        return _solve(left[1], right[1], lambda leaf: leaf in inside or allowed(leaf))
    return _solve(left[1], right[1], allowed)


def _solve_cases(left: Varying, right: Term, allowed: Allowed) -> bool:
    """Solve for each part where the parts are kept apart; else all cases are the same axis."""
    if all(allowed(leaf) for place, _ in left.cases for leaf in leaves(place)):
        places = [place for place, _ in left.cases]
        return all(
            _solve(each, restrict(right, places, number), allowed)
            for number, (_, each) in enumerate(left.cases)
        )
    limit(left, allowed)
    return _solve(left.cases[0][1], right, allowed)


def cut(term: Term, size: int) -> tuple[Term, Term] | None:
    """Cut an axis into its first `size` places and the rest; None where a unit would be torn."""
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
                    torn = cut(part, size - offset)
                    if torn is None:
                        return None
                    return join([*parts[:index], torn[0]]), join([torn[1], *parts[index + 1 :]])
                offset += part.size
            return None
        case Product(factors):
            inner = math.prod(f.size for f in factors[1:])
            if size % inner:
                return cut(term, size) if _keep_blocks_in_order(term) else None
            torn = cut(factors[0], size // inner)
            if torn is None:
                return None
            first, second = (
                product([half, *(restrict(each, torn, number) for each in factors[1:])])
                for number, half in enumerate(torn)
            )
            return first, second
        case Varying(cases):
            return _by_case(cases, lambda each: cut(each, size))


def _keep_blocks_in_order(term: Product) -> bool:
    """Make a product a concatenation, by giving up that its outermost blocks may move."""
    blocks = term.factors[0]
    if not isinstance(blocks, Unknown):
        return False
    blocks.bound = join([Unknown(1, along=blocks.along, outer=True) for _ in range(blocks.size)])
    # Where nothing varies along the blocks they are all alike, and it stays a product.
    return isinstance(resolve(term), Join)


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
    """Write a concatenation as blocks of some size, each of which is an axis of its own."""
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
    halves = [halve(each) for _, each in cases]
    if None in halves:
        return None
    both = [
        [(place, half[side]) for (place, _), half in zip(cases, filter(None, halves), strict=True)]
        for side in (0, 1)
    ]
    return varying(both[0]), varying(both[1])


def reshape(terms: Sequence[Term], shape: Sequence[int], reason: str) -> tuple[Term, ...]:
    """Carry axes through a row-major reshape; axes that cannot be followed are pinned."""
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
