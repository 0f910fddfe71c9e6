"""Straight-through matching against the losses of all permutations, measured independently."""

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from helpers import assert_same, generic, spec_of, state_of
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

from fl_rebasin import Permutation, PermutationSpec, SpecError, derive_spec, match_weights
from fl_rebasin.matching.straight_through import match_straight_through

Batches = list[tuple[Any, Tensor]]


def blobs(count: int = 64, seed: int = 0, classes: int = 4) -> Batches:
    """Points around the corners of a square, in batches of 16."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    angles = labels * (2 * torch.pi / classes)
    points = torch.stack([angles.cos(), angles.sin()], 1)
    points = points + 0.4 * torch.randn(count, 2, generator=generator)
    return list(zip(points.split(16), labels.split(16), strict=True))


def trained(seed: int, width: int = 8, norm: bool = False) -> nn.Module:
    return copy.deepcopy(_trained(seed, width, norm))


@functools.cache
def _trained(seed: int, width: int, norm: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(2, width),
            nn.BatchNorm1d(width) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Linear(width, 4),
        )
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(25):
        for inputs, labels in blobs():
            optimiser.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimiser.step()
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[PermutationSpec, nn.Module, nn.Module]:
    left, right = trained(1), trained(2)
    return derive_spec(left, torch.zeros(2, 2)), left, right


def midpoint_loss(
    spec: PermutationSpec,
    left: nn.Module,
    right: nn.Module,
    permutation: Permutation,
    batches: Batches,
) -> float:
    """Oracle: average the state dicts, load them, normalise by batches, sum the batches' losses."""
    moved, middle = spec.apply(permutation, right.state_dict()), copy.deepcopy(left).eval()
    middle.load_state_dict(
        {
            key: (value + moved[key]) / 2 if value.is_floating_point() else value
            for key, value in left.state_dict().items()
        }
    )
    for module in middle.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    with torch.no_grad():
        return sum(float(F.cross_entropy(middle(x), y)) for x, y in batches)


def random_order(spec: PermutationSpec, seed: int) -> Permutation:
    return spec.random(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("norm", [False, True])
def test_the_result_is_never_worse_than_the_start(norm: bool, seed: int | None) -> None:
    left, right, batches = trained(1, norm=norm), trained(2, norm=norm), blobs()
    spec = derive_spec(left, torch.zeros(2, 2))
    start = None if seed is None else random_order(spec, seed)
    first = match_weights(spec, left.state_dict(), right.state_dict()).permutation
    match = match_straight_through(
        spec,
        left,
        left.state_dict(),
        right.state_dict(),
        batches,
        epochs=3,
        learning_rate=0.1,
        start=start,
    )
    before = midpoint_loss(spec, left, right, first if start is None else start, batches)
    after = midpoint_loss(spec, left, right, match.permutation, batches)
    assert after <= before * (1 + 1e-6)
    if start is not None:
        assert after < before - 0.1  # A random order is easily beaten.


@pytest.mark.parametrize("seeds", [(4, 10), (4, 12), (3, 11)])
def test_the_best_of_all_permutations_is_found_where_weights_mislead(
    seeds: tuple[int, int],
) -> None:
    left, right, batches = *(trained(seed, width=4) for seed in seeds), blobs()
    spec = derive_spec(left, torch.zeros(2, 2))
    losses = {
        order: midpoint_loss(spec, left, right, Permutation({"0": torch.tensor(order)}), batches)
        for order in itertools.permutations(range(4))
    }
    by_weights = match_weights(spec, left.state_dict(), right.state_dict()).permutation
    best = min(losses, key=losses.__getitem__)
    assert tuple(by_weights["0"].tolist()) != best
    match = match_straight_through(
        spec, left, left.state_dict(), right.state_dict(), batches, epochs=20, learning_rate=0.1
    )
    assert tuple(match.permutation["0"].tolist()) == best


def test_more_epochs_are_never_worse() -> None:
    """Of all epochs the best is kept, not the last that beats the start."""
    batches = blobs()
    for seeds in ((1, 2), (4, 14), (8, 18)):
        left, right = (trained(seed, width=6) for seed in seeds)
        spec = derive_spec(left, torch.zeros(2, 2))
        start = random_order(spec, 0)
        losses = []
        for epochs in range(5):
            found = match_straight_through(
                spec,
                left,
                left.state_dict(),
                right.state_dict(),
                batches,
                epochs=epochs,
                learning_rate=0.5,
                start=start,
            )
            losses.append(midpoint_loss(spec, left, right, found.permutation, batches))
        assert losses == sorted(losses, reverse=True)


def test_the_start_is_taken_as_it_is(
    pair: tuple[PermutationSpec, nn.Module, nn.Module],
) -> None:
    spec, left, right = pair
    start = random_order(spec, 3)
    match = match_straight_through(
        spec, left, left.state_dict(), right.state_dict(), blobs(), epochs=0, start=start
    )
    assert match.permutation == start
    assert match.sweeps == 0
    by_weights = match_weights(spec, left.state_dict(), right.state_dict())
    match = match_straight_through(
        spec, left, left.state_dict(), right.state_dict(), blobs(), epochs=0
    )
    assert match.permutation == by_weights.permutation
    assert match.similarity == pytest.approx(by_weights.similarity)
    assert match.similarity_before == pytest.approx(by_weights.similarity_before)


def two_steps(
    spec: PermutationSpec, left: nn.Module, right: nn.Module, batches: Batches, rate: float
) -> Permutation:
    """Oracle: Algorithm 2 by hand for a few batches, with state dicts and `match_weights`."""
    free = {k: v.clone() for k, v in left.state_dict().items()}
    rates = {k: (torch.zeros_like(v), torch.zeros_like(v)) for k, v in free.items()}
    permutation = match_weights(spec, left.state_dict(), right.state_dict()).permutation
    for step, (inputs, labels) in enumerate(batches, start=1):
        permutation = match_weights(spec, free, right.state_dict(), permutation).permutation
        moved = spec.apply(permutation, right.state_dict())
        middle = copy.deepcopy(left)
        middle.load_state_dict({k: (v + moved[k]) / 2 for k, v in left.state_dict().items()})
        middle.zero_grad()
        F.cross_entropy(middle(inputs), labels).backward()
        for key, parameter in middle.named_parameters():
            assert parameter.grad is not None
            slope = parameter.grad / 2
            mean, square = rates[key]
            mean.mul_(0.9).add_(0.1 * slope)
            square.mul_(0.999).add_(0.001 * slope**2)
            scale = (square / (1 - 0.999**step)).sqrt() + 1e-8
            free[key] = free[key] - rate * mean / (1 - 0.9**step) / scale
    return permutation


def test_an_epoch_is_algorithm_2() -> None:
    """Where the last permutation is better than the first, it must be that of the oracle."""
    compared = 0
    for seed in (4, 7, 8):
        left, right, batches = trained(seed, width=6), trained(seed + 10, width=6), blobs()
        spec = derive_spec(left, torch.zeros(2, 2))
        expected = two_steps(spec, left, right, batches, rate=0.3)
        first = match_weights(spec, left.state_dict(), right.state_dict()).permutation
        losses = [midpoint_loss(spec, left, right, p, batches) for p in (first, expected)]
        found = match_straight_through(
            spec, left, left.state_dict(), right.state_dict(), batches, learning_rate=0.3
        )
        assert found.permutation == (expected if losses[1] < losses[0] else first)
        compared += losses[1] < losses[0]
    assert compared


@pytest.mark.parametrize(
    "name",
    ["mlp", "residual-batchnorm", "tied-shared", "lstm-last-step", "attention-separate",
     "weight-norm", "spectral-norm"],
)  # fmt: skip
def test_a_planted_permutation_is_undone(name: str) -> None:
    entry = ZOO[name]
    spec, model = spec_of(entry), generic(entry, 1)
    other = copy.deepcopy(model)
    planted = random_order(spec, 0)
    other.load_state_dict(spec.apply(planted, model.state_dict()))
    inputs = entry.inputs()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    shape = model.eval()(inputs).shape
    labels = torch.zeros(shape, dtype=torch.float64)
    states = [state_of(each) for each in (model, other)]
    # Any loss will do.
    match = match_straight_through(
        spec,
        model,
        model.state_dict(),
        other.state_dict(),
        [(inputs, labels)],
        epochs=2,
        loss=F.mse_loss,
    )
    assert match.permutation.compose(planted).is_identity
    assert match.similarity == pytest.approx(1)
    for each, state in zip((model, other), states, strict=True):
        assert_same(state_of(each), state, rtol=0, atol=0)


def test_every_weight_is_learned_those_with_two_names_once() -> None:
    """The free weights are what the optimiser is given."""
    entry = ZOO["tied-shared"]
    spec, model = spec_of(entry), generic(entry, 1)
    given: list[Tensor] = []
    adam = torch.optim.Adam

    class Spy(adam):
        def __init__(self, parameters: Any, **options: Any) -> None:
            given.extend(parameters := list(parameters))
            super().__init__(parameters, **options)

    tokens = entry.inputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", Spy)
        match_straight_through(
            spec,
            model,
            model.state_dict(),
            model.state_dict(),
            [(tokens, torch.zeros(2, 4, 11).double())],
            loss=F.mse_loss,
        )
    expected = list(model.parameters())
    assert len(given) == len(expected) == len(spec.learnable)
    # One step of 1e-3 in each direction in which the loss has a slope.
    moved = [float((a - b).detach().abs().max()) for a, b in zip(given, expected, strict=True)]
    assert moved == pytest.approx([1e-3] * len(moved), rel=1e-2)


def test_the_models_are_as_before_and_chance_has_no_part() -> None:
    left, right = trained(1, norm=True), trained(2, norm=True)
    left.insert(3, nn.Dropout(0.5))
    right.insert(3, nn.Dropout(0.5))
    left.train()
    right.eval()
    right[1].train()
    spec, start = derive_spec(left, torch.zeros(2, 2)), None
    batches = blobs()
    before = [(state_of(m), [each.training for each in m.modules()]) for m in (left, right)]
    chance = torch.get_rng_state()
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(
            match_straight_through(
                spec, left, left.state_dict(), right.state_dict(), batches, epochs=2, start=start
            )
        )
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    match_straight_through(spec, left, left.state_dict(), right.state_dict(), batches)
    assert torch.equal(torch.get_rng_state(), expected)
    torch.set_rng_state(chance)
    assert found[0] == found[1]
    for model, (state, modes) in zip((left, right), before, strict=True):
        assert_same(state_of(model), state, rtol=0, atol=0)
        assert [each.training for each in model.modules()] == modes
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())
        assert not any(each._forward_hooks for each in model.modules())


def test_a_start_within_blocks_may_be_given_once_for_all() -> None:
    entry = ZOO["attention-separate"]
    spec, model = spec_of(entry), generic(entry, 1)
    inputs, labels = entry.inputs().double(), torch.zeros(()).double()
    still = spec.identity()
    start = Permutation(
        {name: still[name][0] if name in spec.within else still[name] for name in still.indices}
    )
    match = match_straight_through(
        spec,
        model,
        model.state_dict(),
        model.state_dict(),
        [(inputs, labels)],
        start=start,
        loss=lambda x, y: x.square().mean() + y,
    )
    assert match.permutation == still


def test_a_batch_of_one_sample_is_left_out_by_batchnorm() -> None:
    left, right, batches = trained(1, norm=True), trained(2, norm=True), blobs()
    spec = derive_spec(left, torch.zeros(2, 2))
    single = (batches[0][0][:1], batches[0][1][:1])
    expected = match_straight_through(
        spec, left, left.state_dict(), right.state_dict(), batches, epochs=2
    )
    found = match_straight_through(
        spec, left, left.state_dict(), right.state_dict(), [*batches, single], epochs=2
    )
    assert found.permutation == expected.permutation
    with pytest.raises(ValueError, match="no batch of two or more samples"):
        match_straight_through(spec, left, left.state_dict(), right.state_dict(), [single])
    # Without BatchNorm one sample is as good as two.
    left, right = trained(1), trained(2)
    spec = derive_spec(left, torch.zeros(2, 2))
    match_straight_through(spec, left, left.state_dict(), right.state_dict(), [single])


def test_an_error_of_the_model_is_not_swallowed() -> None:
    class Picky(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            if bool((inputs > 1e3).any()):
                raise ValueError("out of range")
            return super().forward(inputs)

    model = nn.Sequential(Picky(2, 5), nn.ReLU(), nn.Linear(5, 2))
    spec = derive_spec(model, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="out of range"):
        match_straight_through(
            spec,
            model,
            model.state_dict(),
            model.state_dict(),
            [(torch.full((2, 2), 1e4), torch.zeros(2, dtype=torch.int64))],
        )


def test_bad_batches_are_named(pair: tuple[PermutationSpec, nn.Module, nn.Module]) -> None:
    spec, left, right = pair
    inputs, labels = blobs()[0]
    with pytest.raises(ValueError, match="no batch to learn the permutation from"):
        match_straight_through(spec, left, left.state_dict(), right.state_dict(), [])
    with pytest.raises(ValueError, match="the loss of the merged model is NaN or infinite"):
        match_straight_through(
            spec, left, left.state_dict(), right.state_dict(), [(inputs * float("nan"), labels)]
        )
    for batch, kind in ((inputs[:2], "Tensor"), ((inputs,), "tuple"), ([inputs] * 3, "list")):
        with pytest.raises(ValueError, match=f"batches of inputs and labels, got a {kind}"):
            match_straight_through(spec, left, left.state_dict(), right.state_dict(), [batch])  # type: ignore[list-item]


@pytest.mark.parametrize("side", ["reference", "other"])
def test_what_cannot_run_is_named(
    side: str, pair: tuple[PermutationSpec, nn.Module, nn.Module]
) -> None:
    spec, left, right = pair
    state = state_of(left)
    given: dict[str, Any] = {"model": left, "reference": state, "other": state_of(right)}
    with pytest.raises(TypeError, match="model must be a module of the architecture, got dict"):
        match_straight_through(spec, batches=blobs(), **{**given, "model": state})
    bad = state_of(left)
    bad["0.bias"][1] = float("inf")
    for start in (None, spec.identity()):
        with pytest.raises(SpecError, match=f"{side}: 0.bias holds NaN"):
            match_straight_through(spec, batches=blobs(), start=start, **{**given, side: bad})


def test_a_start_of_another_spec_is_named(
    pair: tuple[PermutationSpec, nn.Module, nn.Module],
) -> None:
    spec, left, right = pair
    wrong = Permutation({"0": torch.arange(7)})
    with pytest.raises(SpecError, match="0: not a permutation of 8 units"):
        match_straight_through(
            spec, left, left.state_dict(), right.state_dict(), blobs(), start=wrong
        )
