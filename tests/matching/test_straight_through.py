"""Straight-through matching against the losses of all permutations and against Algorithm 2."""

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import assert_same, generic, random_order, spec_of, state_of
from oracles import Batches, algorithm_2, midpoint_loss
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

from fl_rebasin import Permutation, PermutationSpec, SpecError, derive_spec, match_weights
from fl_rebasin.matching.straight_through import match_straight_through
from fl_rebasin.matching.weights import Match


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


def match_modules(
    spec: PermutationSpec,
    reference: nn.Module,
    other: nn.Module,
    batches: Sequence[Any],
    **options: Any,
) -> Match:
    return match_straight_through(
        spec, reference, reference.state_dict(), other.state_dict(), batches, **options
    )


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("norm", [False, True])
def test_the_result_is_never_worse_than_the_start(norm: bool, seed: int | None) -> None:
    left, right, batches = trained(1, norm=norm), trained(2, norm=norm), blobs()
    spec = derive_spec(left, torch.zeros(2, 2))
    start = None if seed is None else random_order(spec, seed)
    first = match_weights(spec, left.state_dict(), right.state_dict()).permutation
    match = match_modules(spec, left, right, batches, epochs=3, learning_rate=0.1, start=start)
    before = midpoint_loss(spec, left, right, first if start is None else start, batches)
    after = midpoint_loss(spec, left, right, match.permutation, batches)
    assert after <= before * (1 + 1e-6)
    if start is not None:
        assert after < before - 0.1  # A random start leaves much to gain.


@pytest.mark.parametrize("seeds", [(4, 10), (4, 12), (3, 11)])
def test_the_best_of_all_permutations_is_found_if_the_weights_mislead(
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
    match = match_modules(spec, left, right, batches, epochs=20, learning_rate=0.1)
    assert tuple(match.permutation["0"].tolist()) == best


def test_more_epochs_are_never_worse() -> None:
    """The best of all epochs is kept, not the last one that beats the start."""
    batches = blobs()
    for seeds in ((1, 2), (4, 14), (8, 18)):
        left, right = (trained(seed, width=6) for seed in seeds)
        spec = derive_spec(left, torch.zeros(2, 2))
        start = random_order(spec, 0)
        losses = []
        for epochs in range(5):
            found = match_modules(
                spec, left, right, batches, epochs=epochs, learning_rate=0.5, start=start
            )
            losses.append(midpoint_loss(spec, left, right, found.permutation, batches))
        assert losses == sorted(losses, reverse=True)


def test_without_epochs_the_result_is_the_start(
    pair: tuple[PermutationSpec, nn.Module, nn.Module],
) -> None:
    spec, left, right = pair
    start = random_order(spec, 3)
    match = match_modules(spec, left, right, blobs(), epochs=0, start=start)
    assert match.permutation == start
    assert match.sweeps == 0
    by_weights = match_weights(spec, left.state_dict(), right.state_dict())
    match = match_modules(spec, left, right, blobs(), epochs=0)
    assert match.permutation == by_weights.permutation
    assert match.similarity == pytest.approx(by_weights.similarity)
    assert match.similarity_before == pytest.approx(by_weights.similarity_before)


def test_one_epoch_follows_algorithm_2() -> None:
    """If the oracle's permutation is better than the start, the result must be the same."""
    compared = 0
    for seed in (4, 7, 8):
        left, right, batches = trained(seed, width=6), trained(seed + 10, width=6), blobs()
        spec = derive_spec(left, torch.zeros(2, 2))
        expected = algorithm_2(spec, left, right, batches, rate=0.3)
        first = match_weights(spec, left.state_dict(), right.state_dict()).permutation
        losses = [midpoint_loss(spec, left, right, p, batches) for p in (first, expected)]
        found = match_modules(spec, left, right, batches, learning_rate=0.3)
        assert found.permutation == (expected if losses[1] < losses[0] else first)
        compared += losses[1] < losses[0]
    assert compared


PLANTED = (
    "mlp",
    "residual-batchnorm",
    "tied-shared",
    "lstm-last-step",
    "attention-separate",
    "weight-norm",
    "spectral-norm",
)


@pytest.mark.parametrize("name", PLANTED)
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
    match = match_modules(spec, model, other, [(inputs, labels)], epochs=2, loss=F.mse_loss)
    assert match.permutation.compose(planted).is_identity
    assert match.similarity == pytest.approx(1)
    for each, state in zip((model, other), states, strict=True):
        assert_same(state_of(each), state, rtol=0, atol=0)


def test_every_weight_is_learned_and_tied_weights_once() -> None:
    """The free weights are the parameters given to the optimiser."""
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
        match_modules(
            spec, model, model, [(tokens, torch.zeros(2, 4, 11).double())], loss=F.mse_loss
        )
    expected = list(model.parameters())
    assert len(given) == len(expected) == len(spec.learnable)
    # Adam's first step is 1e-3 in every direction with a gradient.
    moved = [float((a - b).detach().abs().max()) for a, b in zip(given, expected, strict=True)]
    assert moved == pytest.approx([1e-3] * len(moved), rel=1e-2)


def test_arguments_are_unchanged_and_random_numbers_are_not_used() -> None:
    left, right = trained(1, norm=True), trained(2, norm=True)
    left.insert(3, nn.Dropout(0.5))
    right.insert(3, nn.Dropout(0.5))
    left.train()
    left[1].eval()
    spec, batches = derive_spec(left, torch.zeros(2, 2)), blobs()
    states, modes = [state_of(left), state_of(right)], [m.training for m in left.modules()]
    copies = [{key: value.clone() for key, value in state.items()} for state in states]
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(match_straight_through(spec, left, *states, batches, epochs=2))
            assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
    # The weights of the module do not matter.
    assert match_straight_through(spec, right, *states, batches, epochs=2) == found[0]
    for state, copied in zip((*states, state_of(left)), (*copies, copies[0]), strict=True):
        assert_same(state, copied, rtol=0, atol=0)
    assert [m.training for m in left.modules()] == modes
    assert all(p.requires_grad and p.is_leaf for p in left.parameters())
    assert not any(each._forward_hooks for each in left.modules())


def test_a_start_may_give_one_order_for_all_blocks() -> None:
    entry = ZOO["attention-separate"]
    spec, model = spec_of(entry), generic(entry, 1)
    inputs, labels = entry.inputs().double(), torch.zeros(()).double()
    identity = spec.identity()
    start = Permutation(
        {
            name: index[0] if name in spec.within else index
            for name, index in identity.indices.items()
        }
    )
    match = match_modules(
        spec, model, model, [(inputs, labels)], start=start, loss=lambda x, y: x.square().mean() + y
    )
    assert match.permutation == identity


def test_a_batch_of_one_sample_is_left_out_with_batchnorm() -> None:
    left, right, batches = trained(1, norm=True), trained(2, norm=True), blobs()
    spec = derive_spec(left, torch.zeros(2, 2))
    single = (batches[0][0][:1], batches[0][1][:1])
    expected = match_modules(spec, left, right, batches, epochs=2)
    found = match_modules(spec, left, right, [*batches, single], epochs=2)
    assert found.permutation == expected.permutation
    with pytest.raises(ValueError, match="no batch of two or more samples"):
        match_modules(spec, left, right, [single])
    # Without BatchNorm, one sample is enough.
    left, right = trained(1), trained(2)
    spec = derive_spec(left, torch.zeros(2, 2))
    match_modules(spec, left, right, [single])


def test_an_error_of_the_model_is_raised() -> None:
    class Picky(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            if bool((inputs > 1e3).any()):
                raise ValueError("out of range")
            return super().forward(inputs)

    model = nn.Sequential(Picky(2, 5), nn.ReLU(), nn.Linear(5, 2))
    spec = derive_spec(model, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="out of range"):
        match_modules(
            spec, model, model, [(torch.full((2, 2), 1e4), torch.zeros(2, dtype=torch.int64))]
        )


def test_invalid_batches_are_rejected(pair: tuple[PermutationSpec, nn.Module, nn.Module]) -> None:
    spec, left, right = pair
    inputs, labels = blobs()[0]
    with pytest.raises(ValueError, match="no batch to learn the permutation from"):
        match_modules(spec, left, right, [])
    with pytest.raises(ValueError, match="the loss of the merged model is NaN or infinite"):
        match_modules(spec, left, right, [(inputs * float("nan"), labels)])
    for batch, kind in ((inputs[:2], "Tensor"), ((inputs,), "tuple"), ([inputs] * 3, "list")):
        with pytest.raises(ValueError, match=f"batches of inputs and labels, got a {kind}"):
            match_modules(spec, left, right, [batch])  # type: ignore[list-item]


@pytest.mark.parametrize("side", ["reference", "other"])
def test_invalid_models_are_rejected(
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


def test_a_start_for_another_spec_is_rejected(
    pair: tuple[PermutationSpec, nn.Module, nn.Module],
) -> None:
    spec, left, right = pair
    wrong = Permutation({"0": torch.arange(7)})
    with pytest.raises(SpecError, match="0: not a permutation of 8 units"):
        match_modules(spec, left, right, blobs(), start=wrong)
