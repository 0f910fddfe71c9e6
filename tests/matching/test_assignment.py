"""Linear assignment against brute force and another solver."""

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import best_block_gain, block_gain
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fl_rebasin.matching.assignment import assign, assign_again, assign_blocks

Draw = Callable[..., Tensor]


def drawing(seed: int) -> Draw:
    """A function that draws normal float64 tensors of a shape."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw


@settings(deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_no_permutation_is_better(n: int, seed: int) -> None:
    matrix = drawing(seed)(n, n)
    found = assign(matrix)
    best = max(sum(matrix[i, p[i]] for i in range(n)) for p in permutations(range(n)))
    torch.testing.assert_close(matrix[torch.arange(n), found].sum(), best)


KINDS: dict[str, Callable[[int, Draw], Tensor]] = {
    "normal": lambda n, draw: draw(n, n),
    "ties": lambda n, draw: draw(n, n).round(),
    "of-units": lambda n, draw: draw(n, 40).relu() @ draw(40, n),
    "low-rank": lambda n, draw: draw(n, 1) @ draw(1, n),
    "large": lambda n, draw: 1e30 * draw(n, n),
    "small": lambda n, draw: 1e-30 * draw(n, n),
    "shifted": lambda n, draw: 1e3 + draw(n, n),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 30, 100, 257])
def test_the_gain_equals_that_of_another_solver(n: int, kind: str, dtype: torch.dtype) -> None:
    """Without prices, then three times with the prices of the previous, similar problem."""
    draw = drawing(n)
    matrix = KINDS[kind](n, draw)
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
        matrix = matrix[:, order]  # The next problem starts from this assignment.


def test_prices_make_most_units_cheapest_in_their_own_place() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(200, 60, generator=generator) @ torch.randn(60, 200, generator=generator)
    order, prices = assign_again(matrix, None)
    solved = matrix[:, order]
    for _ in range(3):
        order, prices = assign_again(solved, prices)
        assert order.tolist() == list(range(200))
    assert prices is not None
    costs = -solved / solved.abs().max()
    without_prices, with_prices = (
        float((each.diagonal() <= each.amin(1) + 1e-4).double().mean())
        for each in (costs, costs - torch.from_numpy(prices))
    )
    assert without_prices < 0.7
    assert with_prices > 0.95


def test_equal_units_stay_in_place() -> None:
    assert assign(torch.ones(5, 5)).tolist() == [0, 1, 2, 3, 4]
    assert assign(torch.zeros(0, 0)).tolist() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_rejected(value: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        assign(matrix)


def test_a_matrix_that_is_not_square_is_rejected() -> None:
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
    draw = drawing(seed)
    gain = draw(count, count)
    within = {str(place): draw(count, count, size, size) for place, size in enumerate(units)}
    gain_before, within_before = gain.clone(), {k: v.clone() for k, v in within.items()}
    blocks, orders = assign_blocks(gain, within)
    found = block_gain(
        gain, within, blocks.tolist(), {name: order.tolist() for name, order in orders.items()}
    )
    assert found == pytest.approx(best_block_gain(gain, within))
    assert {name: tuple(order.shape) for name, order in orders.items()} == {
        str(place): (count, size) for place, size in enumerate(units)
    }
    # The arguments are unchanged.
    assert torch.equal(gain, gain_before)
    assert all(torch.equal(within[name], within_before[name]) for name in within)


def test_blocks_that_are_equal_up_to_rounding_stay_in_place() -> None:
    noise = 1e-15 * torch.arange(6, dtype=torch.float64).flip(0)
    units = torch.ones(3, 3, 2, 2) + noise.reshape(3, 2)[:, None, None]
    blocks, orders = assign_blocks(1 + torch.outer(noise[:3], noise[:3] / 1e-15), {"units": units})
    assert blocks.tolist() == [0, 1, 2]
    assert orders["units"].tolist() == [[0, 1]] * 3


def test_units_decide_which_blocks_fit() -> None:
    """Block 1 fits place 0 only if its units are exchanged."""
    within = torch.zeros(2, 2, 2, 2)
    within[0, 1] = within[1, 0] = torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    blocks, orders = assign_blocks(2 * torch.eye(2), {"units": within})
    assert blocks.tolist() == [1, 0]
    assert orders["units"].tolist() == [[1, 0], [1, 0]]
