"""The proof that nothing has to move: never given wrongly, and given where clients are near."""

from __future__ import annotations

import pytest
import torch
from helpers import State, random_state, spec_of
from zoo import ZOO, each_model

from fl_rebasin import PermutationSpec, merge_many
from fl_rebasin.matching.certificate import LARGEST_MARGIN, Reference
from fl_rebasin.matching.certificate import margins as margins_around
from fl_rebasin.matching.coordinate_descent import Matcher
from fl_rebasin.matching.objective import weights_of


def around(state: State, seed: int, scale: float) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + scale * torch.randn(value.shape, generator=generator)
        if value.is_floating_point() and "running" not in key
        else value
        for key, value in state.items()
    }


def margins(
    spec: PermutationSpec, reference: State, models: list[State], shares: list[float]
) -> dict[str, float]:
    return margins_around(Reference(spec, reference), models, shares)


def meets_itself(spec: PermutationSpec) -> set[str]:
    """Groups of which the proof says nothing."""
    state = {key: torch.zeros([axis.size for axis in axes]) for key, axes in spec.axes.items()}
    learnable = weights_of(spec, state)
    return {name for name, margin in margins(spec, learnable, [learnable], [1.0]).items()
            if margin == 0}  # fmt: skip


@each_model
def test_what_is_proved_is_what_the_solver_finds(name: str) -> None:
    """At whatever noise: of a group with a margin of 1 or more no model moves a unit."""
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    reference, shares = weights_of(spec, state), [0.5, 0.2, 0.3]
    proved = 0
    for scale in (1e-4, 0.01, 0.03, 0.1, 0.3):
        models = [weights_of(spec, around(state, seed, scale)) for seed in range(3)]
        found = margins(spec, reference, models, shares)
        mean = {key: sum(s * m[key] for s, m in zip(shares, models, strict=True))
                for key in reference}  # fmt: skip
        pairs = [(reference, mean)]
        for model, share in zip(models, shares, strict=True):
            others = {key: (mean[key] - share * model[key]) / (1 - share) for key in reference}
            pairs.append((others, model))
        for group, margin in found.items():
            if margin < 1 or group in spec.within:  # Those within move with their blocks.
                continue
            inside = [unit for unit, blocks in spec.within.items() if blocks == group]
            if any(found[unit] < 1 for unit in inside):
                continue
            proved += 1
            for target, weights in pairs:
                assert not Matcher(spec, target, weights).step(group)
    assert proved or meets_itself(spec) >= {*spec.groups}


@each_model
def test_near_clients_are_recognised_and_strangers_are_not(name: str) -> None:
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    reference = weights_of(spec, state)
    near = [weights_of(spec, around(state, seed, 1e-4)) for seed in range(3)]
    for group, margin in margins(spec, reference, near, [0.5, 0.2, 0.3]).items():
        assert margin > 1 or group in meets_itself(spec)
    far = [weights_of(spec, random_state(ZOO[name], seed=seed)) for seed in (2, 3, 4)]
    assert min(margins(spec, reference, far, [0.5, 0.2, 0.3]).values()) < 1


def test_half_the_distance_is_twice_the_margin() -> None:
    spec, state = spec_of(ZOO["mlp"]), random_state(ZOO["mlp"], seed=1)
    reference = weights_of(spec, state)
    steps = [{k: v - reference[k] for k, v in weights_of(spec, around(state, s, 0.02)).items()}
             for s in range(3)]  # fmt: skip
    one, half = (
        margins(spec, reference, [{k: v + size * step[k] for k, v in reference.items()}
                                  for step in steps], [0.4, 0.3, 0.3])
        for size in (1.0, 0.5)
    )  # fmt: skip
    assert half == pytest.approx({group: 2 * margin for group, margin in one.items()}, rel=1e-3)


def test_the_margin_is_what_the_distances_say() -> None:
    """Two hidden units 5 apart, one model that is 0.5 off in one of them."""
    spec = spec_of(ZOO["mlp"])
    state = weights_of(spec, random_state(ZOO["mlp"], 1))
    reference = {key: torch.zeros_like(value) for key, value in state.items()}
    first = next(key for key, axes in spec.axes.items() if len(axes) == 2)
    (group,) = {g for g in spec.groups if getattr(spec.axes[first][0], "name", "") == g}
    size = spec.groups[group]
    reference[first][:, 0] = 5.0 * torch.arange(size)
    model = {key: value.clone() for key, value in reference.items()}
    model[first][1, 0] += 0.5
    # d = 0.5, and the one other model is the reference itself: D / 2 d; for that one D / 3 d + d.
    found = margins(spec, reference, [model, reference], [0.5, 0.5])
    assert found[group] == pytest.approx(5 / (3 * 0.5 + 0.5), rel=1e-3)


def test_equal_units_prove_nothing() -> None:
    spec = spec_of(ZOO["mlp"])
    flat = {key: torch.ones_like(value)
            for key, value in weights_of(spec, random_state(ZOO["mlp"], 1)).items()}  # fmt: skip
    assert set(margins(spec, flat, [flat, flat], [0.5, 0.5]).values()) == {0.0}
    assert not merge_many(spec, [flat, flat]).moved
    moved = weights_of(spec, around(flat, 0, 1e-3))
    assert set(margins(spec, flat, [moved, flat], [0.5, 0.5]).values()) == {0.0}


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e18, 1e25])
def test_values_of_any_size_prove_nothing_wrong(scale: float) -> None:
    """What leaves the range of float32 on the way is looked at in full, not waved through."""
    spec = spec_of(ZOO["mlp"])
    models = [random_state(ZOO["mlp"], seed=seed) for seed in (1, 2)]
    models = [{key: scale * value for key, value in model.items()} for model in models]
    shuffle = spec.random(torch.Generator().manual_seed(0))
    copies = [models[0], spec.apply(shuffle, models[0])]
    merge = merge_many(spec, copies, unit_order_of=models[0])
    assert merge.similarity == pytest.approx(1)
    assert merge.permutations[1] == shuffle.invert()


def test_aligned_clients_cost_no_similarity_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, state = spec_of(ZOO["residual-batchnorm"]), random_state(ZOO["residual-batchnorm"], 1)
    models = [around(state, seed, 1e-3) for seed in range(4)]
    monkeypatch.setattr(Matcher, "similarity", None)
    monkeypatch.setattr(Matcher, "step", None)
    for gauge in (None, state):
        merge = merge_many(spec, models, unit_order_of=gauge)
        assert merge.moved == 0
        assert merge.sweeps == 0
        assert min(merge.margins.values()) > 1
    strangers = [random_state(ZOO["residual-batchnorm"], seed) for seed in (2, 3)]
    with pytest.raises(TypeError, match="not callable"):
        merge_many(spec, strangers)


def test_one_exchanged_pair_of_units_is_put_back() -> None:
    name = "vgg"
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    models = [around(state, seed, 1e-4) for seed in range(3)]
    group = list(spec.groups)[-1]
    index = torch.arange(spec.groups[group])
    index[[0, 1]] = index[[1, 0]]
    still = spec.identity()
    swap = type(still)({**still.indices, group: index}, spec.within)
    models[0] = spec.apply(swap, models[0])
    merge = merge_many(spec, models, weights=[1, 1, 1], unit_order_of=state)
    assert {name for name, margin in merge.margins.items() if margin < 1} >= {group}
    assert merge.permutations[0] == swap
    assert merge.permutations[1].is_identity
    assert merge.permutations[2].is_identity


@each_model
def test_one_model_alone_is_compared_with_the_reference(name: str) -> None:
    spec, state = spec_of(ZOO[name]), random_state(ZOO[name], seed=1)
    reference = weights_of(spec, state)
    for scale in (1e-3, 0.03, 0.1):
        model = weights_of(spec, around(state, 1, scale))
        if min(margins(spec, reference, [model], [1.0]).values()) >= 1:
            assert Matcher(spec, reference, model).descend() == 1
            matcher = Matcher(spec, reference, model)
            matcher.descend()
            assert matcher.permutation.is_identity


def test_double_precision_is_compared_in_it() -> None:
    spec = spec_of(ZOO["mlp"])
    state = {k: v.double() for k, v in weights_of(spec, random_state(ZOO["mlp"], 1)).items()}
    near = {k: v + 1e-12 * torch.ones_like(v) for k, v in state.items()}
    found = margins(spec, state, [near, state], [0.5, 0.5])
    assert set(found.values()) == {LARGEST_MARGIN}
