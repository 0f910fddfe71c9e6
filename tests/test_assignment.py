"""Assignment against brute force."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_rebasin.assignment import assign


@settings(deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_no_permutation_is_better(n: int, seed: int) -> None:
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = assign(matrix)
    best = max(sum(matrix[i, p[i]] for i in range(n)) for p in permutations(range(n)))
    torch.testing.assert_close(matrix[torch.arange(n), found].sum(), best)


def test_equal_units_stay_where_they_are() -> None:
    assert assign(torch.ones(5, 5)).tolist() == [0, 1, 2, 3, 4]
    assert assign(torch.zeros(0, 0)).tolist() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_diverged_model_is_named(value: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        assign(matrix)


def test_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"square, it has shape \(2, 3\)"):
        assign(torch.zeros(2, 3))
