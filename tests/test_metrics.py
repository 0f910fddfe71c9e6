"""Barrier, accuracy and calibration against closed-form and plain-Python answers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_rebasin import barrier, interpolate
from fl_rebasin.metrics import accuracy, barrier_of, expected_calibration_error, log_loss


def test_the_barrier_of_a_parabola() -> None:
    # L(x) = 1 - (x - 1)^2 is 0 at both ends of [0, 2] and 1 halfway.
    found = barrier(
        lambda state: 1 - float((state["x"] - 1).square()),
        {"x": torch.tensor(0.0, dtype=torch.float64)},
        {"x": torch.tensor(2.0, dtype=torch.float64)},
    )
    assert found.value == pytest.approx(1)
    assert found.midpoint == pytest.approx(1)
    assert len(found.lambdas) == len(found.losses) == 25
    assert found.lambdas[0] == 0
    assert found.lambdas[-1] == 1


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=9))
def test_a_barrier_is_at_least_zero_and_unchanged_by_a_linear_term(values: list[float]) -> None:
    assert barrier_of(values) >= 0
    tilted = [value + 3 * place for place, value in enumerate(values)]
    assert barrier_of(tilted) == pytest.approx(barrier_of(values), abs=1e-9)


def test_barriers_of_short_curves() -> None:
    assert barrier_of([3.0, 2.0, 1.0]) == 0
    assert barrier_of([1.0, 0.0, 1.0]) == 0
    assert barrier_of([0.0, 2.0, 1.0]) == 1.5


def test_too_few_or_an_even_number_of_points_is_rejected() -> None:
    for points in (1, 4):
        with pytest.raises(ValueError, match=f"odd number of points, at least 3, got {points}"):
            barrier(lambda state: 0.0, {}, {}, points=points)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_barrier_of_a_diverged_curve_is_infinite(value: float) -> None:
    assert barrier_of([0.0, value, 0.0]) == math.inf


def plain_calibration_error(rows: list[tuple[list[float], int]], bins: int) -> float:
    """Oracle: equation 3 of Guo et al. (2017), bin by bin."""
    total = 0.0
    for place in range(bins):
        inside = [row for row in rows if place / bins < max(row[0]) <= (place + 1) / bins]
        if inside:
            confidence = sum(max(row) for row, _ in inside) / len(inside)
            hits = sum(row.index(max(row)) == label for row, label in inside) / len(inside)
            total += len(inside) / len(rows) * abs(confidence - hits)
    return total


@settings(deadline=None)
@given(n=st.integers(1, 60), classes=st.integers(2, 6), seed=st.integers(0, 999))
def test_metrics_agree_with_plain_python(n: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = (3 * torch.randn(n, classes, generator=generator)).double().softmax(1)
    labels = torch.randint(classes, (n,), generator=generator)
    rows = list(zip(probabilities.tolist(), labels.tolist(), strict=True))
    hits = sum(row.index(max(row)) == label for row, label in rows)
    assert accuracy(probabilities, labels) == pytest.approx(hits / n)
    losses = [-math.log(row[label]) for row, label in rows]
    assert log_loss(probabilities, labels) == pytest.approx(sum(losses) / n)
    expected = plain_calibration_error(rows, bins=15)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected)


def test_complex_tensors_are_interpolated_as_they_are() -> None:
    left, right = ({"x": torch.tensor([value])} for value in (1 + 2j, 2 + 1j))
    torch.testing.assert_close(interpolate(left, right, 0.25)["x"], torch.tensor([1.25 + 1.75j]))
