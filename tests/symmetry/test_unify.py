"""The solver of equations between axes: what it binds and what it pins."""

import math

from hypothesis import given
from hypothesis import strategies as st

from fl_rebasin.symmetry.cutting import cut, factor, reshape
from fl_rebasin.symmetry.terms import Join, Product, Unknown, join, leaves, pin, product, resolve
from fl_rebasin.symmetry.unify import MISFIT, unify


def sizes(term: object) -> object:
    """Return the structure of an axis, written with sizes."""
    match resolve(term):  # type: ignore[arg-type]
        case Join(parts):
            return ["+", *map(sizes, parts)]
        case Product(factors):
            return ["*", *map(sizes, factors)]
        case Unknown(size=size):
            return size


def reasons(term: object) -> set[str | None]:
    return {leaf.reason for leaf in leaves(term)}  # type: ignore[arg-type]


def test_two_unknowns_become_one() -> None:
    one, other = Unknown(5), Unknown(5)
    unify(one, other)
    assert resolve(one) is resolve(other)


def test_a_pinned_axis_pins_the_other_side_with_its_reason() -> None:
    structure = join([Unknown(2), product([Unknown(3), Unknown(2)])])
    unify(Unknown(8, "because"), structure)
    assert reasons(structure) == {"because"}


def test_concatenations_are_cut_where_either_is() -> None:
    left, right = join([Unknown(2), Unknown(6)]), join([Unknown(5), Unknown(3)])
    unify(left, right)
    assert sizes(left) == sizes(right) == ["+", 2, 3, 3]
    assert list(leaves(left)) == list(leaves(right))


def test_products_are_factored_where_either_is() -> None:
    left, right = product([Unknown(2), Unknown(6)]), product([Unknown(4), Unknown(3)])
    unify(left, right)
    assert sizes(left) == sizes(right) == ["*", 2, 2, 3]
    assert list(leaves(left)) == list(leaves(right))


def test_a_concatenation_and_a_product_unify_along_the_first_factor() -> None:
    left = join([product([Unknown(2), Unknown(3)]), Unknown(9)])
    right = product([Unknown(5), Unknown(3)])
    unify(left, right)
    assert reasons(left) == reasons(right) == {None}
    assert len({*leaves(left)} | {*leaves(right)}) == 3


def test_structures_that_do_not_fit_are_pinned_on_both_sides() -> None:
    left, right = product([Unknown(2), Unknown(3)]), product([Unknown(3), Unknown(2)])
    unify(left, right)
    assert reasons(left) == reasons(right) == {MISFIT}


def test_units_are_never_split() -> None:
    assert cut(product([Unknown(2), Unknown(3)]), 2) is None
    assert factor(join([Unknown(2), product([Unknown(2), Unknown(2)])]), 3) is not None
    assert factor(join([Unknown(2), product([Unknown(2), Unknown(3)])]), 2) is None
    assert factor(Unknown(7), 2) is None


def test_the_first_reason_is_kept() -> None:
    axis = Unknown(3)
    pin(axis, "first")
    pin(axis, "second")
    assert reasons(axis) == {"first"}


@given(st.lists(st.integers(1, 4), max_size=4))
def test_reshape_keeps_sizes_and_order(shape: list[int]) -> None:
    """Axes that are merged into one and split again are the same axes."""
    axes = [Unknown(size) for size in shape]
    (flat,) = reshape(axes, [math.prod(shape)], "split")
    again = reshape([flat], shape, "split")
    assert [term.size for term in again] == shape
    for before, after in zip(axes, again, strict=True):
        # An axis of size 1 has no order, so its identity does not matter.
        assert before.size == 1 or list(leaves(before)) == list(leaves(after))
        assert reasons(after) <= {None}


@given(st.integers(1, 24), st.data())
def test_factoring_an_unknown_shows_in_every_axis_bound_to_it(
    size: int, data: st.DataObject
) -> None:
    axis = Unknown(size)
    same = Unknown(size)
    unify(same, axis)
    outer = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    pair = factor(axis, outer)
    assert pair is not None
    assert pair[0].size == outer
    assert size == 1 or list(leaves(product(pair))) == list(leaves(same))
