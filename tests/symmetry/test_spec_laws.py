"""Laws of specs and permutations, on every model of the zoo."""

import math

import pytest
import torch
from helpers import assert_same, generic, random_inputs, run, spec_of, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import ZOO, each_model

from fl_rebasin import Permutation, PermutationSpec, SpecError, derive_spec


def random_permutation(spec: PermutationSpec, seed: int) -> Permutation:
    return spec.random(torch.Generator().manual_seed(seed))


@each_model
def test_the_groups_are_those_of_the_architecture(name: str) -> None:
    spec = spec_of(ZOO[name])
    assert tuple(sorted(spec.groups.values())) == ZOO[name].groups


@each_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_permuted_model_computes_the_same_function(name: str, training: bool) -> None:
    entry = ZOO[name]
    spec, model = spec_of(entry), generic(entry, seed=1)
    inputs, state = random_inputs(entry, seed=2), state_of(model)
    outputs, after = run(model, state, inputs, training)
    for seed in range(3):
        perm = random_permutation(spec, seed)
        assert perm.moved > 0
        moved_outputs, moved_after = run(model, spec.apply(perm, state), inputs, training)
        torch.testing.assert_close(moved_outputs, outputs, rtol=1e-10, atol=1e-10)
        # Running statistics move with their channels.
        assert_same(moved_after, spec.apply(perm, after), rtol=1e-10, atol=1e-10)


@each_model
def test_each_group_moves_a_tensor(name: str) -> None:
    entry = ZOO[name]
    spec, state = spec_of(entry), state_of(generic(entry, seed=1))
    for group, size in spec.groups.items():
        swap = torch.arange(size)
        swap[:2] = torch.tensor([1, 0])
        moved = spec.apply(Permutation({**spec.identity().indices, group: swap}), state)
        assert any(not torch.equal(moved[key], state[key]) for key in state), group


@settings(deadline=None, max_examples=25)
@given(name=st.sampled_from(sorted(ZOO)), one=st.integers(0, 999), two=st.integers(0, 999))
def test_invert_and_compose(name: str, one: int, two: int) -> None:
    entry = ZOO[name]
    spec, state = spec_of(entry), state_of(generic(entry, seed=1))
    first, second = random_permutation(spec, one), random_permutation(spec, two)
    assert_same(spec.apply(first.invert(), spec.apply(first, state)), state, rtol=0, atol=0)
    assert first.compose(first.invert()).is_identity
    twice = spec.apply(second, spec.apply(first, state))
    assert_same(spec.apply(second.compose(first), state), twice, rtol=0, atol=0)


@each_model
def test_apply_does_not_change_its_input_and_keeps_dtypes(name: str) -> None:
    entry = ZOO[name]
    spec, state = spec_of(entry), state_of(generic(entry, seed=1))
    before = {key: value.clone() for key, value in state.items()}
    moved = spec.apply(random_permutation(spec, 0), state)
    assert_same(state, before, rtol=0, atol=0)
    assert [value.dtype for value in moved.values()] == [value.dtype for value in state.values()]
    shared = {value.data_ptr() for value in moved.values()}
    assert not shared & {value.data_ptr() for value in state.values()}
    assert_same(spec.apply(spec.identity(), state), state, rtol=0, atol=0)


def test_random_is_reproducible_and_reaches_every_order() -> None:
    spec = derive_spec(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.zeros(1, 2))
    assert_same(
        dict(random_permutation(spec, 5).indices), dict(random_permutation(spec, 5).indices)
    )
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(spec.random(generator)["0"].tolist()) for _ in range(100)}
    assert len(seen) == math.factorial(3)


def test_an_error_names_what_is_wrong_with_a_state_dict() -> None:
    spec = derive_spec(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.zeros(1, 2))
    state = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).state_dict()
    with pytest.raises(SpecError, match=r"lacks 1 keys.*1\.bias"):
        spec.apply(spec.identity(), {k: v for k, v in state.items() if k != "1.bias"})
    with pytest.raises(SpecError, match=r"1 keys beyond.*extra"):
        spec.apply(spec.identity(), {**state, "extra": torch.zeros(1)})
    with pytest.raises(SpecError, match=r"0\.weight has shape \(2, 3\).*expects \(3, 2\)"):
        spec.apply(spec.identity(), {**state, "0.weight": torch.zeros(2, 3)})


def test_an_error_names_what_is_wrong_with_a_permutation() -> None:
    spec = derive_spec(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.zeros(1, 2))
    state = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).state_dict()
    with pytest.raises(SpecError, match="0: not a permutation of 3 units"):
        spec.apply(Permutation({"0": torch.tensor([0, 0, 1])}), state)
    with pytest.raises(SpecError, match="differ in the groups"):
        spec.apply(Permutation({}), state)
    with pytest.raises(SpecError, match="different specs"):
        spec.identity().compose(Permutation({"other": torch.arange(3)}))
