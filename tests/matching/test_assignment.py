"""Assignment against brute force."""

from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fl_rebasin.matching.assignment import assign, assign_again, assign_blocks


@settings(deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_no_permutation_is_better(n: int, seed: int) -> None:
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = assign(matrix)
    best = max(sum(matrix[i, p[i]] for i in range(n)) for p in permutations(range(n)))
    torch.testing.assert_close(matrix[torch.arange(n), found].sum(), best)


KINDS = {
    "normal": lambda shape, draw: draw(*shape),
    "ties": lambda shape, draw: draw(*shape).round(),
    "of-units": lambda shape, draw: draw(shape[0], 40).relu() @ draw(40, shape[1]),
    "low-rank": lambda shape, draw: draw(shape[0], 1) @ draw(1, shape[1]),
    "large": lambda shape, draw: 1e30 * draw(*shape),
    "small": lambda shape, draw: 1e-30 * draw(*shape),
    "shifted": lambda shape, draw: 1e3 + draw(*shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 30, 100, 257])
def test_the_sum_is_that_of_another_solver(n: int, kind: str, dtype: torch.dtype) -> None:
    """From nothing, and again and again with the prices of a problem that was like it."""
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrix = KINDS[kind]((n, n), draw)
    prices = None
    for change in (0.0, 0.01, 0.1, 1.0):
        noise = change * draw(n, n) * matrix.std(unbiased=False)
        matrix = (matrix + noise).to(dtype).double()
        order, prices = assign_again(matrix.to(dtype), prices)
        assert order.sort().values.tolist() == list(range(n))
        rows, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
        best = float(matrix.numpy()[rows, columns].sum())
        found = float(matrix[torch.arange(n), order].sum())
        rounding = 2e-6 if dtype is torch.float32 else 1e-12
        assert found >= best - rounding * n * float(matrix.abs().max())
        matrix = matrix[:, order]  # The units go where they were assigned to.


def test_prices_leave_less_to_do() -> None:
    """With the prices of its own solution nearly every unit is cheapest where it is."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(200, 60, generator=generator) @ torch.randn(60, 200, generator=generator)
    order, prices = assign_again(matrix, None)
    assert prices is not None
    moved = matrix[:, order]
    for _ in range(3):
        still, prices = assign_again(moved, prices)
        assert still.tolist() == list(range(200))
    costs = -moved / moved.abs().max()
    as_it_is, with_prices = (
        float((each.diagonal() <= each.amin(1) + 1e-4).double().mean())
        for each in (costs, costs - torch.from_numpy(prices))
    )
    assert as_it_is < 0.7
    assert with_prices > 0.95


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


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.sampled_from([(1, (2,)), (2, (3,)), (3, (2,)), (2, (2, 3)), (3, (2, 1)), (3, ())]),
    seed=st.integers(0, 10**6),
)
def test_no_permutation_of_blocks_and_of_the_units_within_is_better(
    sizes: tuple[int, tuple[int, ...]], seed: int
) -> None:
    count, units = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gain = draw(count, count)
    within = {str(place): draw(count, count, size, size) for place, size in enumerate(units)}
    given_gain, given_within = gain.clone(), {k: v.clone() for k, v in within.items()}
    blocks, orders = assign_blocks(gain, within)

    def value(blocks: list[int], orders: dict[str, list[list[int]]]) -> float:
        total = sum(float(gain[place, block]) for place, block in enumerate(blocks))
        for name, rows in orders.items():
            for place, block in enumerate(blocks):
                pair = within[name][place, block]
                total += sum(float(pair[k, unit]) for k, unit in enumerate(rows[place]))
        return total

    best = max(
        value(list(order), dict(zip(within, map(list, rows), strict=True)))
        for order in permutations(range(count))
        for rows in product(*(product(permutations(range(size)), repeat=count) for size in units))
    )
    found = value(blocks.tolist(), {name: order.tolist() for name, order in orders.items()})
    assert found == pytest.approx(best)
    assert {name: tuple(order.shape) for name, order in orders.items()} == {
        str(place): (count, size) for place, size in enumerate(units)
    }
    # What is given stays.
    assert torch.equal(gain, given_gain)
    assert all(torch.equal(within[name], given_within[name]) for name in within)


def test_equal_blocks_stay_where_they_are() -> None:
    """Up to rounding."""
    noise = 1e-15 * torch.arange(6, dtype=torch.float64).flip(0)
    units = torch.ones(3, 3, 2, 2) + noise.reshape(3, 2)[:, None, None]
    blocks, orders = assign_blocks(1 + torch.outer(noise[:3], noise[:3] / 1e-15), {"units": units})
    assert blocks.tolist() == [0, 1, 2]
    assert orders["units"].tolist() == [[0, 1]] * 3


def test_units_decide_about_their_blocks() -> None:
    """Block 1 fits place 0 only with its units turned round."""
    within = torch.zeros(2, 2, 2, 2)
    within[0, 1] = within[1, 0] = torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    blocks, orders = assign_blocks(2 * torch.eye(2), {"units": within})
    assert blocks.tolist() == [1, 0]
    assert orders["units"].tolist() == [[1, 0], [1, 0]]
