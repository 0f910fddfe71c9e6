"""The solver of equations between axes: which axes of which tensors move together.

Operators state equations between the axes of their tensors, and `unify` solves them as a type
checker does, by binding unknowns to terms. It pins both sides where their structures do not fit:
the solver may lose freedom, but is never wrong.

Axes that vary along another axis (see `terms`) become the same axis in all blocks as soon as an
operator does not keep the blocks apart: `limit` says along which axes they may still vary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias

from fl_rebasin.symmetry.cutting import cut, factor
from fl_rebasin.symmetry.terms import (
    Join,
    Product,
    Term,
    Unknown,
    Varying,
    leaves,
    pin,
    resolve,
    restrict,
)

Allowed: TypeAlias = Callable[[Unknown], bool]
"""Whether an axis may vary along an unknown."""

MISFIT = "axes of different structure are combined"


def unify(left: Term, right: Term, along: Iterable[Term] = ()) -> None:
    """Make two axes move together, or pin both where their structures do not fit.

    Args:
        left: axis of one tensor.
        right: axis of another tensor.
        along: axes that both tensors have, that the operator treats elementwise, and that are
            already unified: the result may vary along these alone.
    """
    aligned = {leaf for term in along for leaf in leaves(term)}
    _unify(left, right, lambda leaf: leaf in aligned)


def unify_elementwise(left: Sequence[Term], right: Sequence[Term]) -> None:
    """Unify the axes of two tensors that are combined elementwise; axes of size 1 broadcast."""
    pairs = [
        (one, other)
        for one, other in zip(left, right, strict=True)
        if one.size != 1 and other.size != 1
    ]
    # An axis comes before those that vary along it.
    pairs.sort(key=lambda pair: max(map(_depth, pair)))
    for one, other in pairs:
        unify(one, other, along=[term for term, _ in pairs])


def unify_unused(term: Term, used: Collection[Unknown]) -> None:
    """Give the parts of an axis that no operator uses the units of a part that one uses."""
    match resolve(term):
        case Join(parts) | Product(parts):
            for part in parts:
                unify_unused(part, used)
        case Varying(cases):
            alive = [each for _, each in cases if any(leaf in used for leaf in leaves(each))]
            for _, each in cases:
                if alive and each not in alive:
                    unify(each, alive[0])


def mix(terms: Sequence[Term], dims: Iterable[int]) -> None:
    """Record that an operator mixes values along some axes: no other axis may vary along them.

    Args:
        terms: the axes of a tensor.
        dims: which of them are mixed, as by a sum or a sort.
    """
    mixed = set(dims)
    gone = {leaf for dim in mixed for leaf in leaves(terms[dim])}
    for dim, term in enumerate(terms):
        if dim not in mixed:
            limit(term, lambda leaf: leaf not in gone)


def limit(term: Term, allowed: Allowed) -> None:
    """Let an axis vary only along allowed axes, and along factors of the same product."""
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
            if all(allowed(leaf) for part, _ in cases for leaf in leaves(part)):
                for _, each in cases:
                    limit(each, allowed)
                return
            first = cases[0][1]
            for _, other in cases[1:]:
                _unify(first, other, allowed)
            limit(first, allowed)


def limit_to_tensor(terms: Sequence[Term]) -> None:
    """Let the axes of one tensor vary only along each other.

    An axis that occurs twice in the tensor does not count: which of the two would be meant?
    """
    if all(isinstance(term, Unknown) and not term.bound and not term.along for term in terms):
        return
    present = Counter(leaf for term in terms for leaf in set(leaves(term)))
    for term in terms:
        limit(term, lambda leaf: present[leaf] == 1)


def _depth(term: Term) -> int:
    """Return the number of axes that an axis varies along."""
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
    """Bind unknowns so that two axes are the same; return False where they do not fit."""
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
    if isinstance(left, Unknown):
        _bind(left, right, allowed)
        return True
    if isinstance(left, Product) and isinstance(right, Product):
        size = min(left.factors[0].size, right.factors[0].size)
        return _solve_halves(factor(left, size), factor(right, size), allowed, inner=True)
    size = min(part.parts[0].size for part in (left, right) if isinstance(part, Join))
    return _solve_halves(cut(left, size), cut(right, size), allowed, inner=False)


def _bind(left: Unknown, right: Term, allowed: Allowed) -> None:
    """Bind an unknown to another term; if it is pinned, pin that term."""
    if isinstance(right, Unknown):
        if right.reason is None:
            left, right = right, left
        # If either is pinned, `right` is now.
        theirs = set(right.along)
        right.along = tuple(outer for outer in left.along if outer in theirs)
        limit(right, allowed)
        right.outer |= left.outer
        left.bound = right
    elif left.reason is None:
        own = set(left.along)
        limit(right, lambda leaf: leaf in own and allowed(leaf))
        left.bound = right
    else:
        pin(right, left.reason)


def _solve_halves(
    left: tuple[Term, Term] | None, right: tuple[Term, Term] | None, allowed: Allowed, inner: bool
) -> bool:
    """Solve for two pairs of halves; `inner`: the second lies within the blocks of the first."""
    if left is None or right is None:
        return False
    if not _solve(left[0], right[0], allowed):
        return False
    if inner:
        blocks = set(leaves(left[0]))
        return _solve(left[1], right[1], lambda leaf: leaf in blocks or allowed(leaf))
    return _solve(left[1], right[1], allowed)


def _solve_cases(left: Varying, right: Term, allowed: Allowed) -> bool:
    """Solve part by part if the operator keeps the parts apart; else all cases are the same."""
    if all(allowed(leaf) for part, _ in left.cases for leaf in leaves(part)):
        parts = [part for part, _ in left.cases]
        return all(
            _solve(each, restrict(right, parts, number), allowed)
            for number, (_, each) in enumerate(left.cases)
        )
    limit(left, allowed)
    return _solve(left.cases[0][1], right, allowed)
