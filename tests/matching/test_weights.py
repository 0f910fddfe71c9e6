"""Weight matching: planted permutations, the objective, and the similarity matrices."""

import itertools

import pytest
import torch
from helpers import assert_same, nearby, random_order, random_state, shuffled, spec_of
from torch import nn
from zoo import ZOO, Entry, each_model

from fl_rebasin import Permutation, PermutationSpec, SpecError, derive_spec, match_weights
from fl_rebasin.matching.canonical_start import start_canonical
from fl_rebasin.matching.coordinate_descent import Matcher
from fl_rebasin.matching.objective import inner, weights_of
from fl_rebasin.matching.weights import best_match
from fl_rebasin.symmetry.axes import groups_of


@each_model
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_permutation_is_undone(name: str, seed: int) -> None:
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    moved = shuffled(spec, state, seed)
    match = match_weights(spec, state, moved)
    assert match.similarity > 1 - 1e-6
    assert match.similarity_before < match.similarity
    assert_same(spec.apply(match.permutation, moved), state, rtol=0, atol=0)


@each_model
def test_a_planted_permutation_is_undone_under_noise(name: str) -> None:
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    planted = random_order(spec, 1)
    match = match_weights(spec, state, spec.apply(planted, nearby(state, 0, scale=0.05)))
    assert match.permutation.compose(planted).is_identity


def on_two_axes(spec: PermutationSpec, *groups: str) -> bool:
    """Whether any of the groups lies on two axes of one tensor."""
    return any(
        sum(found.name == group for axis in axes for found in groups_of(axis)) > 1
        for axes in spec.axes.values()
        for group in groups
    )


@each_model
def test_similarities_add_up_to_the_gain_of_every_permutation(name: str) -> None:
    """`sum_i S[i, p[i]]` is the objective after the move p, up to a constant."""
    spec = spec_of(ZOO[name])
    left, right = (weights_of(spec, random_state(ZOO[name], seed=s)) for s in (1, 2))
    generator = torch.Generator().manual_seed(0)
    for group, size in spec.groups.items():
        if on_two_axes(spec, group):
            continue  # The gain is quadratic, and the matrix its linearisation.
        matrix = Matcher(spec, left, right).similarity(group)
        identity = torch.arange(size).expand(matrix.shape[:-1])
        for _ in range(3):
            index = torch.rand(identity.shape, generator=generator).argsort(-1)
            move = Permutation({group: index})
            moved = {key: spec.move(key, value, move) for key, value in right.items()}
            gain = inner(left, moved) - inner(left, right)
            after, before = (matrix.gather(-1, each[..., None]).sum() for each in (index, identity))
            assert gain == pytest.approx(float(after - before), abs=1e-4)


@each_model
def test_the_objective_never_falls(name: str) -> None:
    spec = spec_of(ZOO[name])
    left, right = (weights_of(spec, random_state(ZOO[name], seed=s)) for s in (1, 2))
    matcher = Matcher(spec, left, right)
    objectives = [matcher.objective]
    moved = True
    while moved:
        moved = False
        for group in spec.groups:
            moved |= matcher.step(group)
            objectives.append(matcher.objective)
    slack = 1e-6 * (inner(left, left) * inner(right, right)) ** 0.5
    assert all(b >= a - slack for a, b in itertools.pairwise(objectives))
    # For a group on two axes the assignment is an approximation, and may find nothing.
    assert objectives[-1] > objectives[0] or on_two_axes(spec, *spec.groups)
    # The permutation reproduces what the steps did.
    for key, value in right.items():
        torch.testing.assert_close(
            spec.move(key, value, matcher.permutation), matcher.weights[key], rtol=0, atol=0
        )


@each_model
@pytest.mark.parametrize("canonical", [False, True], ids=["given-order", "canonical"])
def test_kept_similarities_equal_new_ones(name: str, canonical: bool) -> None:
    spec = spec_of(ZOO[name])
    left, right = (weights_of(spec, random_state(ZOO[name], seed=s)) for s in (1, 2))
    matcher = Matcher(spec, left, right)
    if canonical:
        start_canonical(matcher)
    for group in [*spec.groups, *spec.groups]:
        matcher.step(group)
        for kept, similar in matcher.similarities.kept.items():
            expected = matcher.similarity(kept)
            torch.testing.assert_close(similar, expected, rtol=1e-9, atol=1e-9)
    assert matcher.objective == pytest.approx(inner(left, matcher.weights))


def test_one_group_is_matched_as_well_as_by_brute_force() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    spec = derive_spec(model, torch.zeros(1, 3))
    generator = torch.Generator().manual_seed(0)
    left, right = (
        {k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
        for _ in range(2)
    )
    best = max(
        inner(left, spec.apply(Permutation({"0": torch.tensor(p)}), right))
        for p in itertools.permutations(range(5))
    )
    found = spec.apply(match_weights(spec, left, right).permutation, right)
    assert inner(left, found) == pytest.approx(best, rel=1e-6)


@each_model
def test_a_model_matches_itself_by_the_identity(name: str) -> None:
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    match = match_weights(spec, state, state)
    assert match.permutation.is_identity
    assert match.similarity == pytest.approx(1)


def test_inputs_are_unchanged_and_results_are_reproducible() -> None:
    spec = spec_of(ZOO["dense-concat"])
    left, right = (random_state(ZOO["dense-concat"], seed=s) for s in (1, 2))
    copies = [{k: v.clone() for k, v in state.items()} for state in (left, right)]
    first, second = match_weights(spec, left, right), match_weights(spec, left, right)
    assert_same(dict(first.permutation.indices), dict(second.permutation.indices))
    assert_same(left, copies[0], rtol=0, atol=0)
    assert_same(right, copies[1], rtol=0, atol=0)


def test_buffers_do_not_count() -> None:
    entry = ZOO["conv-batchnorm-flatten"]
    spec, left, right = spec_of(entry), random_state(entry, 1), random_state(entry, 2)
    scaled = {k: 1e6 * v if "running" in k else v for k, v in right.items()}
    assert_same(
        dict(match_weights(spec, left, right).permutation.indices),
        dict(match_weights(spec, left, scaled).permutation.indices),
    )


@pytest.mark.parametrize("side", ["reference", "other"])
def test_values_that_are_not_finite_are_rejected(side: str) -> None:
    entry = ZOO["mlp"]
    spec, good = spec_of(entry), random_state(entry, 1)
    bad = {**good, "1.bias": torch.full_like(good["1.bias"], float("nan"))}
    pair = (bad, good) if side == "reference" else (good, bad)
    with pytest.raises(SpecError, match=f"{side}: 1.bias holds NaN"):
        match_weights(spec, *pair)


def test_large_parameters_without_groups_do_not_stop_the_descent() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
            self.scale = nn.Parameter(torch.tensor(1e6))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.scale * self.net(inputs)

    model = Scaled()
    spec, state = derive_spec(model, torch.zeros(2, 16)), model.state_dict()
    planted = random_order(spec, 0)
    match = match_weights(spec, state, spec.apply(planted, state))
    assert match.permutation == planted.invert()


@pytest.mark.parametrize("scale", [1e-24, 1e20])
def test_the_scale_of_a_model_does_not_matter(scale: float) -> None:
    spec, state = spec_of(ZOO["mlp"]), random_state(ZOO["mlp"], seed=1)
    state = {key: value * scale for key, value in state.items()}
    planted = random_order(spec, 0)
    match = match_weights(spec, state, spec.apply(planted, state))
    assert match.permutation == planted.invert()
    assert match.similarity == pytest.approx(1)


class Recurrent(nn.Module):
    """A network whose hidden group lies on both axes of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again = nn.Linear(2, 12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.into(inputs)
        for _ in range(3):
            hidden = torch.tanh(self.into(inputs) + self.again(hidden))
        return self.out(hidden)


@pytest.mark.parametrize("name", ["mlp", "dense-concat", "residual-batchnorm", "recurrent"])
def test_the_canonical_start_does_not_depend_on_the_order_of_units(name: str) -> None:
    entry = ZOO.get(name, Entry(Recurrent, lambda: torch.zeros(2, 2), (12,)))
    spec = spec_of(entry)
    left, right = (weights_of(spec, random_state(entry, seed=s)) for s in (1, 2))
    found = []
    for seed in range(3):
        shuffle = random_order(spec, seed)
        arrived = {key: spec.move(key, value, shuffle) for key, value in right.items()}
        matcher = Matcher(spec, left, arrived)
        start_canonical(matcher)
        found.append(matcher.weights)
    for other in found[1:]:
        assert_same(found[0], other, rtol=0, atol=0)


@pytest.mark.parametrize("name", list(ZOO)[::8])
def test_the_descent_begins_at_the_start(name: str) -> None:
    """From the optimum nothing moves; from another start the objective does not fall."""
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    planted = random_order(spec, 0)
    moved = spec.apply(planted, state)
    match = match_weights(spec, state, moved, planted.invert())
    assert match.permutation == planted.invert()
    assert match.sweeps == 1
    assert match.similarity == pytest.approx(1)
    other = random_state(ZOO[name], seed=2)
    target = weights_of(spec, state)

    def objective(permutation: Permutation) -> float:
        return inner(target, weights_of(spec, spec.apply(permutation, other)))

    start = random_order(spec, 1)
    match = match_weights(spec, state, other, start)
    found = objective(match.permutation)
    scale = (inner(target, target) * inner(*[weights_of(spec, other)] * 2)) ** 0.5
    assert found >= objective(start) - 1e-9 * scale
    assert match.similarity == pytest.approx(found / scale)
    assert match.similarity_before == pytest.approx(objective(spec.identity()) / scale)
    # A descent from its own result changes nothing.
    assert match_weights(spec, state, other, match.permutation).permutation == match.permutation


def test_only_the_given_start_is_used() -> None:
    """Descents end in different optima; without a start, the better of two is used."""
    entry = ZOO["mlp"]
    spec, left, right = spec_of(entry), random_state(entry, 1), random_state(entry, 2)
    ends = [match_weights(spec, left, right, random_order(spec, seed)) for seed in range(6)]
    best = match_weights(spec, left, right)
    assert len({round(end.similarity, 6) for end in ends}) > 1
    assert best.similarity > min(end.similarity for end in ends)


def test_restarts_keep_the_best() -> None:
    entry = ZOO["mlp"]
    spec, left, right = spec_of(entry), random_state(entry, 1), random_state(entry, 2)
    starts = [match_weights(spec, left, right).similarity]
    drawn = torch.Generator().manual_seed(3)
    starts += [match_weights(spec, left, right, spec.random(drawn)).similarity for _ in range(6)]
    assert max(starts) > starts[0] * 1.001  # Otherwise this test would show nothing.
    for count in (0, 3, 6):
        generator = torch.Generator().manual_seed(3)
        match = match_weights(spec, left, right, restarts=count, generator=generator)
        assert match.similarity == pytest.approx(max(starts[: count + 1]), rel=1e-6)
    with pytest.raises(ValueError, match="restarts need a generator"):
        match_weights(spec, left, right, restarts=1)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        match_weights(spec, left, right, restarts=-1)


def test_a_start_may_give_one_order_for_all_blocks() -> None:
    entry = ZOO["attention-separate"]
    spec, state = spec_of(entry), random_state(entry, 1)
    identity = spec.identity()
    start = Permutation(
        {
            name: index[0] if name in spec.within else index
            for name, index in identity.indices.items()
        }
    )
    match = match_weights(spec, state, state, start)
    assert match.permutation == identity
    assert match.permutation.within == spec.within


def test_a_start_for_another_spec_is_rejected() -> None:
    entry = ZOO["mlp"]
    spec, state = spec_of(entry), random_state(entry, 1)
    identity = dict(spec.identity().indices)
    name = next(iter(identity))
    with pytest.raises(SpecError, match="differ in the groups"):
        match_weights(spec, state, state, Permutation({name: identity[name]}))
    with pytest.raises(SpecError, match=f"{name}: not a permutation of 7 units"):
        match_weights(spec, state, state, Permutation({**identity, name: torch.zeros(7).long()}))


@pytest.mark.parametrize("name", ["mlp", "vgg", "residual-batchnorm", "encoder-two-layers", "unet"])
def test_groups_that_may_not_move_keep_their_order_in_the_start(name: str) -> None:
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    planted = random_order(spec, 0)
    target, moved = (weights_of(spec, s) for s in (state, spec.apply(planted, state)))
    answer, elsewhere = planted.invert(), random_order(spec, 1)
    for group in spec.groups:
        if group in spec.within:
            continue
        groups = [group, *(unit for unit, blocks in spec.within.items() if blocks == group)]
        start = Permutation(
            {**answer.indices, **{each: elsewhere[each] for each in groups}}, spec.within
        )
        matcher, _ = best_match(spec, target, moved, start, groups)
        assert matcher.permutation == answer  # With the others in place, one group is always found.
        rest = [each for each in spec.groups if each not in groups]
        matcher, _ = best_match(spec, target, moved, elsewhere, groups)
        assert all(torch.equal(matcher.permutation[each], elsewhere[each]) for each in rest)
