"""The certificate that nothing has to move: always correct, and given to similar clients."""

from __future__ import annotations

import pytest
import torch
from helpers import State, nearby, random_state, spec_of
from zoo import ZOO, each_model

from fl_rebasin import Permutation, PermutationSpec, merge_many
from fl_rebasin.matching import certificate
from fl_rebasin.matching.certificate import LARGEST_MARGIN, Reference
from fl_rebasin.matching.coordinate_descent import Matcher
from fl_rebasin.matching.objective import weights_of

SHARES = [0.5, 0.2, 0.3]


def margins(
    spec: PermutationSpec, reference: State, models: list[State], shares: list[float]
) -> dict[str, float]:
    return certificate.margins(Reference(spec, reference), models, shares)


def excluded_groups(spec: PermutationSpec) -> set[str]:
    """Groups to which the proof does not apply."""
    state = {key: torch.zeros([axis.size for axis in axes]) for key, axes in spec.axes.items()}
    learnable = weights_of(spec, state)
    found = margins(spec, learnable, [learnable], [1.0])
    return {name for name, margin in found.items() if margin == 0}


def mean_of(models: list[State], shares: list[float]) -> State:
    return {
        key: sum(share * model[key] for share, model in zip(shares, models, strict=True))
        for key in models[0]
    }


@each_model
def test_the_solver_moves_no_certified_group(name: str) -> None:
    """At every noise level, neither a model nor the mean gains from a move."""
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    reference = weights_of(spec, state)
    certified = 0
    for scale in (1e-4, 0.01, 0.03, 0.1, 0.3):
        models = [weights_of(spec, nearby(state, seed, scale)) for seed in range(3)]
        found = margins(spec, reference, models, SHARES)
        mean = mean_of(models, SHARES)
        pairs = [(reference, mean)]
        for model, share in zip(models, SHARES, strict=True):
            others = {key: (mean[key] - share * model[key]) / (1 - share) for key in reference}
            pairs.append((others, model))
        for group in spec.groups:
            # Units within blocks move together with their blocks.
            inside = [unit for unit, blocks in spec.within.items() if blocks == group]
            if group in spec.within or any(found[each] < 1 for each in (group, *inside)):
                continue
            certified += 1
            for target, weights in pairs:
                assert not Matcher(spec, target, weights).step(group)
    assert certified or excluded_groups(spec) >= {*spec.groups}


@each_model
def test_similar_clients_are_certified_and_unrelated_ones_are_not(name: str) -> None:
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    reference = weights_of(spec, state)
    similar = [weights_of(spec, nearby(state, seed, 1e-4)) for seed in range(3)]
    for group, margin in margins(spec, reference, similar, SHARES).items():
        assert margin > 1 or group in excluded_groups(spec)
    unrelated = [weights_of(spec, random_state(ZOO[name], seed=seed)) for seed in (2, 3, 4)]
    assert min(margins(spec, reference, unrelated, SHARES).values()) < 1


def test_half_the_distance_gives_twice_the_margin() -> None:
    spec, state = spec_of(ZOO["mlp"]), random_state(ZOO["mlp"], seed=1)
    reference = weights_of(spec, state)
    ends = [weights_of(spec, nearby(state, seed, 0.02)) for seed in range(3)]
    halfway = [{key: (end[key] + reference[key]) / 2 for key in reference} for end in ends]
    far = margins(spec, reference, ends, [0.4, 0.3, 0.3])
    close = margins(spec, reference, halfway, [0.4, 0.3, 0.3])
    assert close == pytest.approx({group: 2 * margin for group, margin in far.items()}, rel=1e-3)


def test_the_margin_follows_from_the_distances() -> None:
    """Hidden units 5 apart, and one model that is off by 0.5 in one of them."""
    spec = spec_of(ZOO["mlp"])
    state = weights_of(spec, random_state(ZOO["mlp"], 1))
    reference = {key: torch.zeros_like(value) for key, value in state.items()}
    first = next(key for key, axes in spec.axes.items() if len(axes) == 2)
    (group,) = {g for g in spec.groups if getattr(spec.axes[first][0], "name", "") == g}
    size = spec.groups[group]
    reference[first][:, 0] = 5.0 * torch.arange(size)
    model = {key: value.clone() for key, value in reference.items()}
    model[first][1, 0] += 0.5
    # D = 5. The other model equals the reference; for it d = 0 and e = max(e) = 0.5, so that
    # D / (2 d + 3 e + max(e)) is smaller than for the first, with d = 0.5 and e = 0.
    found = margins(spec, reference, [model, reference], [0.5, 0.5])
    assert found[group] == pytest.approx(5 / (3 * 0.5 + 0.5), rel=1e-3)


def test_nothing_is_certified_if_the_units_of_the_reference_are_equal() -> None:
    spec = spec_of(ZOO["mlp"])
    weights = weights_of(spec, random_state(ZOO["mlp"], 1))
    flat = {key: torch.ones_like(value) for key, value in weights.items()}
    assert set(margins(spec, flat, [flat, flat], [0.5, 0.5]).values()) == {0.0}
    assert not merge_many(spec, [flat, flat]).moved
    moved = weights_of(spec, nearby(flat, 0, 1e-3))
    assert set(margins(spec, flat, [moved, flat], [0.5, 0.5]).values()) == {0.0}


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e18, 1e25])
def test_values_of_any_size_are_certified_correctly(scale: float) -> None:
    """Overflow and underflow in float32 never certify a permuted copy."""
    spec = spec_of(ZOO["mlp"])
    model = {key: scale * value for key, value in random_state(ZOO["mlp"], seed=1).items()}
    shuffle = spec.random(torch.Generator().manual_seed(0))
    merge = merge_many(spec, [model, spec.apply(shuffle, model)], unit_order_of=model)
    assert merge.similarity == pytest.approx(1)
    assert merge.permutations[1] == shuffle.invert()


def test_certified_clients_need_no_similarity_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, state = spec_of(ZOO["residual-batchnorm"]), random_state(ZOO["residual-batchnorm"], 1)
    models = [nearby(state, seed, 1e-3) for seed in range(4)]
    monkeypatch.setattr(Matcher, "best_move", None)
    for unit_order_of in (None, state):
        merge = merge_many(spec, models, unit_order_of=unit_order_of)
        assert merge.moved == 0
        assert merge.sweeps == 0
        assert min(merge.margins.values()) > 1
    unrelated = [random_state(ZOO["residual-batchnorm"], seed) for seed in (2, 3)]
    with pytest.raises(TypeError, match="not callable"):
        merge_many(spec, unrelated)


def test_one_exchanged_pair_of_units_is_restored() -> None:
    name = "vgg"
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    models = [nearby(state, seed, 1e-4) for seed in range(3)]
    group = list(spec.groups)[-1]
    index = torch.arange(spec.groups[group])
    index[[0, 1]] = index[[1, 0]]
    swap = Permutation({**spec.identity().indices, group: index}, spec.within)
    models[0] = spec.apply(swap, models[0])
    merge = merge_many(spec, models, weights=[1, 1, 1], unit_order_of=state)
    assert {name for name, margin in merge.margins.items() if margin < 1} >= {group}
    assert merge.permutations[0] == swap
    assert merge.permutations[1].is_identity
    assert merge.permutations[2].is_identity


@each_model
def test_a_single_certified_model_matches_the_reference(name: str) -> None:
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    reference = weights_of(spec, state)
    for scale in (1e-3, 0.03, 0.1):
        model = weights_of(spec, nearby(state, 1, scale))
        if min(margins(spec, reference, [model], [1.0]).values()) >= 1:
            matcher = Matcher(spec, reference, model)
            assert matcher.descend() == 1
            assert matcher.permutation.is_identity


def test_float64_models_are_compared_in_float64() -> None:
    spec = spec_of(ZOO["mlp"])
    state = {k: v.double() for k, v in weights_of(spec, random_state(ZOO["mlp"], 1)).items()}
    close = {k: v + 1e-12 * torch.ones_like(v) for k, v in state.items()}
    found = margins(spec, state, [close, state], [0.5, 0.5])
    assert set(found.values()) == {LARGEST_MARGIN}
