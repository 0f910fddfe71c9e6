"""Quality of the optima: planted permutations, clusters, order of clients, the textbook."""

from __future__ import annotations

import itertools
from functools import cache
from typing import get_args

import pytest
import textbook
import torch
from helpers import State, random_order, random_state, shuffled, spec_of
from oracles import pairwise_objective
from torch import Tensor, nn
from zoo import ZOO

from fl_rebasin import Permutation, PermutationSpec, derive_spec, match_weights, merge_many
from fl_rebasin.matching.many import Method
from fl_rebasin.matching.objective import inner, weights_of

METHODS = get_args(Method)


class Chain(nn.Module):
    """Residual blocks on one stream, as in an issue of the Git Re-Basin repository."""

    def __init__(self, inputs: int, width: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.first = nn.ModuleList(nn.Linear(width, hidden) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(hidden, width) for _ in range(blocks))
        self.head = nn.Linear(width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.stem(inputs)
        for first, second in zip(self.first, self.second, strict=True):
            stream = stream + second(torch.relu(first(stream)))
        return self.head(stream)


@cache
def chain(*sizes: int) -> PermutationSpec:
    return derive_spec(Chain(*sizes), torch.zeros(2, sizes[0]))


def fresh(seed: int, *sizes: int) -> State:
    torch.manual_seed(seed)
    return Chain(*sizes).state_dict()


@pytest.mark.parametrize(
    ("sizes", "count"),
    [((3, 30, 50, 1), 100), ((3, 30, 50, 3), 30), ((3, 128, 128, 9), 10)],
    ids=["one-block", "three-blocks", "nine-blocks"],
)
def test_every_permutation_planted_in_a_residual_network_is_found(
    sizes: tuple[int, ...], count: int
) -> None:
    spec = chain(*sizes)
    for seed in range(count):
        state = fresh(seed, *sizes)
        planted = random_order(spec, seed)
        match = match_weights(spec, state, spec.apply(planted, state))
        assert match.permutation == planted.invert()


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


WIDTHS = (10, 48, 48, 5)


@cache
def mlp_spec() -> PermutationSpec:
    return derive_spec(mlp(*WIDTHS), torch.zeros(2, WIDTHS[0]))


def noisy(state: State, seed: int, scale: float) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + scale * value.std() * torch.randn(value.shape, generator=generator)
        for key, value in state.items()
    }


def base(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return mlp(*WIDTHS).state_dict()


def merged_objective(spec: PermutationSpec, models: list[State], method: Method) -> float:
    """The objective after a merge."""
    merge = merge_many(spec, models, method=method)
    moved = [spec.apply(*pair) for pair in zip(merge.permutations, models, strict=True)]
    return pairwise_objective(spec, moved)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (2, 2, 2)])
def test_clusters_that_are_internally_aligned_are_merged(sizes: tuple[int, ...]) -> None:
    spec = mlp_spec()
    truth, models = [], []
    for cluster, size in enumerate(sizes):
        centre = noisy(base(), 50 + cluster, 0.8)
        order = random_order(spec, cluster)
        for place in range(size):
            truth.append(noisy(centre, 10 * cluster + place, 0.1))
            models.append(spec.apply(order, truth[-1]))
    reached = {method: merged_objective(spec, models, method) for method in METHODS}
    true = pairwise_objective(spec, truth)
    assert reached["joint"] >= true * (1 - 1e-5)
    assert reached["joint"] >= reached["reference"] * (1 - 1e-5)
    # The textbook's descent gets stuck; otherwise this test would show nothing.
    assert reached["textbook"] < 0.9 * true


def test_clusters_that_a_single_reference_would_tear_apart_move_as_a_whole() -> None:
    widths = (10, 64, 64, 64, 64, 3)
    net = mlp(*widths)
    spec = derive_spec(net, torch.zeros(2, widths[0]))
    generator = torch.Generator().manual_seed(0)

    def draw() -> State:
        return {
            key: torch.randn(value.shape, generator=generator)
            for key, value in net.state_dict().items()
        }

    models = []
    for size, scale in ((3, 1.0), (2, 1.1)):  # The reference, of largest norm, is in the small one.
        centre = draw()
        for _ in range(size):
            own = draw()
            models.append({k: scale * (0.75**0.5 * centre[k] + 0.5 * own[k]) for k in own})
    reached = {method: merge_many(spec, models, method=method).similarity for method in METHODS}
    assert reached["joint"] >= reached["hierarchical"]
    # These two are worse; otherwise this test would show nothing.
    assert reached["textbook"] < 0.97 * reached["joint"]
    assert reached["reference"] < merge_many(spec, models).similarity_before


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_clients_does_not_matter(method: Method) -> None:
    spec = mlp_spec()
    models = [base(seed) for seed in range(5)]
    unit_order_of = base(99)
    first = merge_many(spec, models, unit_order_of=unit_order_of, method=method)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3], [1, 2, 3, 4, 0]):
        again = merge_many(
            spec, [models[place] for place in order], unit_order_of=unit_order_of, method=method
        )
        assert list(again.permutations) == [first.permutations[place] for place in order]
        assert again.similarity == pytest.approx(first.similarity, abs=1e-12)


def test_the_order_of_the_units_hardly_matters() -> None:
    """Twenty unit orders of unrelated models reach the same objective within 0.2 %."""
    spec = mlp_spec()
    models = [base(seed) for seed in range(4)]
    reached = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        moved = [spec.apply(spec.random(generator), model) for model in models]
        reached.append(merged_objective(spec, moved, "joint"))
    assert max(reached) - min(reached) <= 0.002 * max(reached)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_undoes_planted_permutations(method: Method) -> None:
    spec = mlp_spec()
    copies = [shuffled(spec, base(), seed) for seed in range(5)]
    assert merge_many(spec, copies, method=method).similarity == pytest.approx(1)


def test_an_unknown_method_is_rejected() -> None:
    with pytest.raises(ValueError, match="unknown method 'all': use one of joint, reference"):
        merge_many(mlp_spec(), [base()], method="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mlp", "vgg", "residual-batchnorm", "encoder-two-layers", "unet"])
@pytest.mark.parametrize("seed", range(3))
def test_the_objective_is_as_high_as_the_textbooks(name: str, seed: int) -> None:
    """Within 3 %: these networks have few units, so local optima differ."""
    spec = spec_of(ZOO[name])
    states = [random_state(ZOO[name], seed=10 * seed + each) for each in (1, 2)]
    left, right = (weights_of(spec, state) for state in states)

    def objective(permutation: Permutation) -> float:
        return inner(left, {key: spec.move(key, right[key], permutation) for key in right})

    theirs = []
    for each in range(5):
        found, _ = textbook.match(spec, left, right, torch.Generator().manual_seed(each))
        theirs.append(objective(found))
    ours = objective(match_weights(spec, *states).permutation)
    scale = (inner(left, left) * inner(right, right)) ** 0.5
    assert ours >= sum(theirs) / len(theirs) - 0.03 * scale


def test_wide_unrelated_networks_get_as_close_as_by_the_textbook() -> None:
    spec = derive_spec(mlp(20, 256, 256, 10), torch.zeros(2, 20))
    torch.manual_seed(0)
    left, right = mlp(20, 256, 256, 10).state_dict(), mlp(20, 256, 256, 10).state_dict()
    found, _ = textbook.match(spec, left, right, torch.Generator().manual_seed(0))
    match = match_weights(spec, left, right)
    theirs, ours = (inner(left, spec.apply(each, right)) for each in (found, match.permutation))
    assert ours >= 0.9995 * theirs
