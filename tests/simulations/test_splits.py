"""Laws of the client splits: each image goes to one client, as the rule says."""

import re
from contextlib import suppress

import numpy as np
import pytest
from experiment.errors import UserError
from experiment.splits import Split, evaluation_parts, parse_split, split_indices
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

BALANCED_LABELS = np.tile(np.arange(10), 200)  # 200 images of each of 10 classes


def split_balanced(split: str, num_clients: int = 2, seed: int = 0) -> list[NDArray[np.int64]]:
    return split_indices(BALANCED_LABELS, split, num_clients, 10, np.random.default_rng(seed))


def class_counts(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.bincount(BALANCED_LABELS[indices], minlength=10)


@st.composite
def split_names(draw: st.DrawFn) -> str:
    percent = draw(st.integers(1, 99))
    alpha = draw(st.floats(1e-3, 1e6))
    return draw(st.sampled_from(["iid", f"{percent}-{100 - percent}", f"dirichlet:{alpha}"]))


@given(
    labels=st.lists(st.integers(0, 6), min_size=8, max_size=60),
    split=split_names(),
    num_clients=st.integers(2, 8),
    seed=st.integers(0, 2**32),
)
def test_each_image_goes_to_exactly_one_client(
    labels: list[int], split: str, num_clients: int, seed: int
) -> None:
    array = np.array(labels)
    try:
        parts = split_indices(array, split, num_clients, 7, np.random.default_rng(seed))
    except UserError:
        # With few images and a small ALPHA, a client may get none.
        assume(False)
    assert len(parts) == num_clients
    assert all(len(part) > 0 for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@pytest.mark.parametrize("split", ["iid", "20-80", "50-50", "dirichlet:0.5"])
@pytest.mark.parametrize("num_clients", [2, 3, 5, 10])
def test_all_images_are_divided(split: str, num_clients: int) -> None:
    parts = split_balanced(split, num_clients)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(BALANCED_LABELS)))
    assert all(np.all(np.diff(part) > 0) for part in parts)


@pytest.mark.parametrize("split", ["iid", "20-80", "dirichlet:0.5"])
def test_only_the_seed_determines_the_split(split: str) -> None:
    first, again, other = (split_balanced(split, seed=seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("split", "percent"), [("20-80", 20), ("20/80", 20), ("70-30", 70)])
def test_two_clients_have_the_percentages(split: str, percent: int) -> None:
    first, second = (class_counts(part) for part in split_balanced(split))
    assert first[:5].sum() == 10 * percent
    assert first[5:].sum() == 10 * (100 - percent)
    assert second[:5].sum() == 10 * (100 - percent)
    assert second[5:].sum() == 10 * percent


def test_slash_is_a_synonym() -> None:
    for dash, slash in zip(split_balanced("20-80"), split_balanced("20/80"), strict=True):
        assert np.array_equal(dash, slash)


def test_even_and_odd_clients_share_the_parts_of_two_clients() -> None:
    parts = [class_counts(part) for part in split_balanced("20-80", 5)]
    sizes = [int(part.sum()) for part in parts]
    assert sum(sizes[0::2]) == sum(sizes[1::2]) == 1000
    assert max(sizes[0::2]) - min(sizes[0::2]) <= 1
    assert max(sizes[1::2]) - min(sizes[1::2]) <= 1
    for part in parts[0::2]:
        assert part[:5].sum() < 0.3 * part.sum()
    for part in parts[1::2]:
        assert part[:5].sum() > 0.7 * part.sum()


@given(num_clients=st.integers(2, 10))
def test_50_50_clients_share_no_class(num_clients: int) -> None:
    held = [np.flatnonzero(class_counts(part)) for part in split_balanced("50-50", num_clients)]
    assert np.array_equal(np.concatenate(held), np.arange(10))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_50_50_halves_the_classes_between_two_clients() -> None:
    first, second = (class_counts(part) for part in split_balanced("50-50"))
    assert first.tolist() == [200] * 5 + [0] * 5
    assert second.tolist() == [0] * 5 + [200] * 5


@pytest.mark.parametrize("num_clients", [2, 3, 7])
def test_iid_parts_are_equal_and_mixed(num_clients: int) -> None:
    parts = split_balanced("iid", num_clients)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for part in parts:
        expected = len(part) / 10
        assert np.all(np.abs(class_counts(part) - expected) < 5 * np.sqrt(expected))


@pytest.mark.parametrize(
    ("alpha", "expected"),
    # The expected largest of 4 shares: 1/4 for large ALPHA, 1 for small ALPHA, and
    # (1 + 1/2 + 1/3 + 1/4) / 4 for ALPHA = 1, the uniform distribution.
    [("1000000", 0.25), ("1", 0.5208), ("0.001", 1.0)],
)
def test_alpha_sets_how_evenly_a_class_is_shared(alpha: str, expected: float) -> None:
    largest_shares = []
    for seed in range(40):
        with suppress(UserError):  # With a small ALPHA, a client may get no images.
            parts = split_balanced(f"dirichlet:{alpha}", 4, seed)
            counts = np.array([class_counts(part) for part in parts])
            largest_shares.append(counts.max(axis=0).mean() / 200)
    assert len(largest_shares) > 20
    assert np.mean(largest_shares) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("iid", Split("iid")),
        ("50-50", Split("disjoint")),
        ("50/50", Split("disjoint")),
        ("20-80", Split("percent", 20)),
        ("1/99", Split("percent", 1)),
        ("dirichlet:0.5", Split("dirichlet", 0.5)),
        ("dirichlet:1e-3", Split("dirichlet", 0.001)),
    ],
)
def test_rules_are_parsed(text: str, split: Split) -> None:
    assert parse_split(text) == split


@pytest.mark.parametrize(
    "split", ["", "IID", "20:80", "-20-120", "1000-20", "20-80-0", "dirichlet"]
)
def test_error_for_an_unknown_split_lists_the_known_ones(split: str) -> None:
    words = f"unknown split {split!r}: use 20-80 .* 50-50 .* iid, dirichlet:ALPHA or all"
    with pytest.raises(UserError, match=words):
        parse_split(split)


def test_percentages_must_add_up() -> None:
    with pytest.raises(UserError, match="'20-70' adds up to 90, not 100: use, for example, 20-80"):
        parse_split("20-70")


@pytest.mark.parametrize("split", ["0-100", "100/0"])
def test_error_for_0_percent_suggests_50_50(split: str) -> None:
    with pytest.raises(UserError, match=f"{split!r}: use 50-50 for clients without"):
        parse_split(split)


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf", "1e7", "", "much"])
def test_error_names_an_invalid_alpha(alpha: str) -> None:
    words = re.escape(f"'dirichlet:{alpha}': ALPHA must be above 0 and at most 1e+06")
    with pytest.raises(UserError, match=words):
        parse_split(f"dirichlet:{alpha}")


@pytest.mark.parametrize("num_clients", [1, 0, -3])
def test_fewer_than_two_clients_is_an_error(num_clients: int) -> None:
    with pytest.raises(UserError, match=rf"{num_clients} client.*: use at least 2"):
        split_balanced("iid", num_clients)


def test_more_clients_than_images_is_an_error() -> None:
    with pytest.raises(UserError, match=r"2001 clients .* 2000 images: use fewer clients"):
        split_balanced("iid", 2001)


def test_more_clients_than_classes_is_an_error_without_shared_classes() -> None:
    with pytest.raises(UserError, match=r"11 clients .* 10 classes: use at most 10 clients"):
        split_balanced("50-50", 11)


def test_error_names_a_client_without_images() -> None:
    words = r"'dirichlet:0.001' leaves client \d+ of 20 without images: .* larger ALPHA"
    with pytest.raises(UserError, match=words):
        split_balanced("dirichlet:0.001", 20)


@pytest.mark.parametrize("split", ["iid", "20-80", "50-50", "dirichlet:0.5"])
def test_accuracy_is_reported_for_two_halves(split: str) -> None:
    parts = evaluation_parts(split, 100)
    assert list(parts) == ["classes 0-49", "classes 50-99"]
    assert np.array_equal(parts["classes 0-49"], np.arange(50))
    assert np.array_equal(parts["classes 50-99"], np.arange(50, 100))
    assert list(evaluation_parts(split, 10)) == ["classes 0-4", "classes 5-9"]


def test_accuracy_parts_of_an_unknown_split_are_an_error() -> None:
    with pytest.raises(UserError, match="unknown split 'odd'"):
        evaluation_parts("odd", 10)
