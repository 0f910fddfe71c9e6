"""Activation matching: planted permutations, and correlations against NumPy's."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, generic, random_inputs, random_order, spec_of, state_of
from oracles import best_gain_of_pairs, block_gain, cross_correlation
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from zoo import ZOO, Entry

from fl_rebasin import Permutation, PermutationSpec, SpecError, derive_spec, match_weights
from fl_rebasin.matching.activations import assign_correlated, match_activations
from fl_rebasin.matching.correlation import correlations
from fl_rebasin.matching.weights import Match

# Every third model, and those with groups that are not observable or units that are constant.
HIDDEN_OR_CONSTANT = (
    "depthwise-grouped-transposed",
    "transformer",
    "grouped-query-repeat",
    "multi-query",
    "falcon",
    "query-key-norm",
    "lstm-two-layers",
    "rnn-relu-two-layers",
    "mlp-mixer",
    "graph-attention-average",
    "group-norm-nested",
    "channel-shuffle-module",
    "vgg",
    "inception",
    "experts-modules",
    "maxout",
    "deep-fm",
    "wide-and-deep",
    "weight-norm",
    "weight-norm-old",
    "autoencoder-tied",
    "tied-shared",
    "nested-inputs",
    "auxiliary-head",
)
SOME = dict.fromkeys([*list(ZOO)[::3], *HIDDEN_OR_CONSTANT])
MODELS = pytest.mark.parametrize("name", SOME)


class OneInput(nn.Module):
    """A model that takes its keyword arguments as one dict, like a batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: dict[str, Any]) -> Any:
        return self.inner(**inputs)


def of_one_input(entry: Entry) -> Entry:
    """The entry with a single positional argument, the first item of a batch."""
    if isinstance(entry.inputs(), dict):
        return Entry(lambda: OneInput(entry.build()), lambda: (entry.inputs(),), entry.groups)
    return Entry(entry.build, lambda: (entry.inputs(),), entry.groups)


def batch_of(entry: Entry, seed: int) -> Any:
    """Random floats, and random integers for integer inputs with a batch axis."""
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dtype == torch.int64 and leaf.ndim > 1:
            return torch.randint(int(leaf.max()) + 1, leaf.shape, generator=generator)
        return leaf

    return tree_map(draw, random_inputs(entry, seed))


def moved_copy(model: nn.Module, spec: PermutationSpec, permutation: Permutation) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(spec.apply(permutation, model.state_dict()))
    return other


def match_modules(
    spec: PermutationSpec, reference: nn.Module, other: nn.Module, batches: Iterable[Any]
) -> Match:
    return match_activations(spec, reference, reference.state_dict(), other.state_dict(), batches)


def assert_planted_is_undone(
    spec: PermutationSpec, model: nn.Module, batches: Iterable[Any]
) -> None:
    planted = random_order(spec, 0)
    match = match_modules(spec, model, moved_copy(model, spec, planted), batches)
    assert match.permutation.compose(planted).is_identity


@MODELS
def test_a_planted_permutation_is_undone(name: str) -> None:
    entry = of_one_input(ZOO[name])
    spec, model = spec_of(entry), generic(entry, seed=1)
    planted = random_order(spec, 0)
    other = moved_copy(model, spec, planted)
    batches = [batch_of(entry, seed) for seed in range(8)]
    match = match_modules(spec, model, other, batches)
    assert match.permutation.compose(planted).is_identity
    assert match.similarity == pytest.approx(1)
    assert match.similarity_before < match.similarity
    assert_same(
        spec.apply(match.permutation, state_of(other)), state_of(model), rtol=1e-12, atol=1e-12
    )


def seeded(build: type[nn.Module] | Any, seed: int, *args: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args)


def mlp(width: int = 6) -> nn.Sequential:
    return stacked(nn.Tanh, 4, width, width + 1, 3)


def relu_mlp(*widths: int) -> nn.Sequential:
    return stacked(nn.ReLU, *widths)


def stacked(nonlinearity: type[nn.Module], *widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nonlinearity()]
    return nn.Sequential(*layers[:-1])


def rows(count: int, seed: int, width: int = 4) -> Tensor:
    return 2 + 3 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [(60,), (20, 40), (1,) * 60, (7, 0, 1, 52), (0, 60)])
def test_correlations_are_those_of_all_the_data_at_once(sizes: tuple[int, ...]) -> None:
    left, right = seeded(mlp, 1), seeded(mlp, 2)
    spec, data = derive_spec(left, torch.zeros(1, 4)), rows(60, seed=0)
    found = correlations(spec, left, right, data.split(sizes))
    assert found.keys() == {("0",), ("2",)}
    with torch.no_grad():
        for name, depth in (("0", 2), ("2", 4)):  # The inputs of the next layer.
            expected = cross_correlation(left[:depth](data).T, right[:depth](data).T)
            np.testing.assert_allclose(found[name,].numpy(), expected, atol=1e-5)


def test_positions_of_an_image_are_samples_also_after_flattening() -> None:
    entry = ZOO["conv-batchnorm-flatten"]
    left, right = generic(entry, 1).eval(), generic(entry, 2).eval()
    images = [batch_of(entry, seed) for seed in range(9)]
    found = correlations(spec_of(entry), left, right, images)
    with torch.no_grad():
        flat = [model[:5](torch.cat(images)).unflatten(1, (6, 9)) for model in (left, right)]
        expected = cross_correlation(*(each.transpose(0, 1).flatten(1) for each in flat))
        np.testing.assert_allclose(found["0",].numpy(), expected, atol=1e-5)
        expected = cross_correlation(*(model[:8](torch.cat(images)).T for model in (left, right)))
        np.testing.assert_allclose(found["5",].numpy(), expected, atol=1e-5)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.stem(inputs))
        return self.head(hidden + torch.tanh(self.block(hidden)))


def test_units_observed_at_several_sites_count_at_each() -> None:
    left, right = seeded(Skip, 1), seeded(Skip, 2)
    spec, data = derive_spec(left, torch.zeros(1, 4)), rows(50, seed=0)
    (key,) = correlations(spec, left, right, [data])
    observed = []
    with torch.no_grad():
        for model in (left, right):
            hidden = torch.tanh(model.stem(data))
            observed.append(torch.cat([hidden, hidden + torch.tanh(model.block(hidden))]).T)
    found = correlations(spec, left, right, data.split(9))[key]
    np.testing.assert_allclose(found.numpy(), cross_correlation(*observed), atol=1e-5)


def activations_at(model: nn.Module, batches: list[Any], *sites: tuple[str, bool]) -> Tensor:
    """Inputs (True) or outputs (False) of layers, as `(units, samples)`, concatenated."""
    records: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, at_input=at_input: records.append(
                (args[0] if at_input else output).flatten(0, -2).T
            )
        )
        for name, at_input in sites
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch[0])
    for handle in handles:
        handle.remove()
    return torch.cat(records, 1)


def test_units_within_heads_correlate_with_those_of_every_head() -> None:
    entry = of_one_input(ZOO["attention-separate"])
    spec, left, right = spec_of(entry), generic(entry, 1), generic(entry, 2)
    batches = [batch_of(entry, seed) for seed in range(5)]
    found = correlations(spec, left, right, batches)
    (heads,) = {*spec.within.values()}
    assert [spec.groups[name] for name in (heads, *spec.within)] == [3, 4, 6]
    queries, values = spec.within
    sites = {
        (queries, 12): (("block.q_proj", False), ("block.k_proj", False)),
        (values, 18): (("block.o_proj", True),),
    }
    for (name, size), of_group in sites.items():
        observed = (activations_at(model, batches, *of_group) for model in (left, right))
        expected = cross_correlation(*observed)
        assert expected.shape == (size, size)
        np.testing.assert_allclose(found[heads, name].numpy(), expected, atol=1e-5)
    assert (heads,) not in found


def test_blocks_and_the_units_within_are_assigned_as_well_as_by_brute_force() -> None:
    spec = spec_of(ZOO["attention-separate"])
    (heads,) = {*spec.within.values()}
    generator = torch.Generator().manual_seed(0)
    count = spec.groups[heads]
    pairs = {
        name: torch.randn(count, count, spec.groups[name], spec.groups[name], generator=generator)
        for name in spec.within
    }
    correlated = {
        (heads, name): each.transpose(1, 2).flatten(2).flatten(0, 1) for name, each in pairs.items()
    }
    permutation, unobserved = assign_correlated(spec, correlated)
    assert set(unobserved) == spec.groups.keys() - {heads, *spec.within}
    no_gain = torch.zeros(count, count)
    orders = {name: permutation[name].tolist() for name in pairs}
    found = block_gain(no_gain, pairs, permutation[heads].tolist(), orders)
    assert found == pytest.approx(best_gain_of_pairs(pairs))


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("multi-query", "block.q_proj"), ("mlp-mixer", "patches.0"), ("maxout", "second")],
)
def test_units_on_an_axis_next_to_moving_units_are_not_observed(name: str, hidden: str) -> None:
    """The samples of the two models would differ in their order."""
    entry = ZOO[name]
    spec, model = spec_of(entry), generic(entry, 1)
    found = correlations(spec, model, model, [batch_of(entry, seed) for seed in range(3)])
    assert (hidden,) not in found
    assert {key[-1] for key in found} == spec.groups.keys() - {hidden}


def test_the_data_decide_if_the_weights_mislead() -> None:
    """Scaling the units of a ReLU network changes its weights but not its function."""
    model = seeded(relu_mlp, 1, 4, 20, 20, 3)
    spec = derive_spec(model, torch.zeros(1, 4))
    planted = random_order(spec, 0)
    other = moved_copy(model, spec, planted)
    scale = torch.logspace(-2, 2, 20)
    with torch.no_grad():
        for first, second in ((0, 2), (2, 4)):
            other[first].weight *= scale[:, None]
            other[first].bias *= scale
            other[second].weight /= scale
    match = match_modules(spec, model, other, [rows(400, seed=0) - 2])
    assert match.permutation.compose(planted).is_identity
    by_weights = match_weights(spec, model.state_dict(), other.state_dict())
    assert not by_weights.permutation.compose(planted).is_identity


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_a_constant_unit_correlates_with_nothing(constant: float) -> None:
    left, right = seeded(mlp, 1), seeded(mlp, 2)
    with torch.no_grad():
        left[0].weight[2], left[0].bias[2] = 0, constant
        right[0].weight[4], right[0].bias[4] = 0, constant
    spec = derive_spec(left, torch.zeros(1, 4))
    for model in (left, right):
        model[1] = nn.Identity()
    found = correlations(spec, left, right, rows(64, seed=0).split(7))["0",]
    assert bool(torch.isfinite(found).all())
    assert not found[2].any()
    assert not found[:, 4].any()
    alive = [unit for unit in range(6) if unit != 2]
    assert bool((found[alive][:, [0, 1, 2, 3, 5]] != 0).all())


def test_constant_units_are_matched_by_their_weights() -> None:
    model = seeded(relu_mlp, 1, 4, 12, 9, 3)
    with torch.no_grad():
        model[0].bias[::2] = -5
        model[2].bias[::2] = -5
    spec, data = derive_spec(model, torch.zeros(1, 4)), [rows(50, seed=0) / 9]
    assert int((correlations(spec, model, model, data)["0",] == 0).all(1).sum()) >= 6
    assert_planted_is_undone(spec, model, data)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_model_matches_itself_on_very_few_samples(count: int) -> None:
    """On two samples all correlations are 1, 0 or -1; ties keep the units in place."""
    for seed in range(5):
        model = seeded(relu_mlp, seed, 4, 20, 9, 3)
        spec = derive_spec(model, torch.zeros(1, 4))
        match = match_modules(spec, model, model, [rows(count, seed=0) - 2])
        assert match.permutation.is_identity


def test_unobserved_groups_are_matched_by_their_weights() -> None:
    entry = ZOO["lstm-two-layers"]
    spec, model = spec_of(entry), generic(entry, 1)
    planted = random_order(spec, 0)
    other = moved_copy(model, spec, planted)
    batches = [batch_of(entry, seed) for seed in range(3)]
    found, unobserved = assign_correlated(spec, correlations(spec, model, other, batches))
    assert unobserved == ["core"]
    assert torch.equal(found["core#2"], planted["core#2"].argsort())
    match = match_modules(spec, model, other, batches)
    assert match.permutation.compose(planted).is_identity


def test_arguments_are_unchanged_and_the_weights_of_the_module_do_not_matter() -> None:
    entry = ZOO["residual-batchnorm"]
    spec, batches = spec_of(entry), [batch_of(entry, seed) for seed in range(2)]
    module, other_module = generic(entry, 1), generic(entry, 3)
    reference, other = state_of(module), state_of(generic(entry, 2))
    module.train()
    module.norm1.eval()
    state, modes = state_of(module), [m.training for m in module.modules()]
    copies = [{key: value.clone() for key, value in each.items()} for each in (reference, other)]
    rng_state = torch.get_rng_state()
    first = match_activations(spec, module, reference, other, batches)
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert_same(state_of(module), state, rtol=0, atol=0)
    assert [m.training for m in module.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    for each, copied in zip((reference, other), copies, strict=True):
        assert_same(each, copied, rtol=0, atol=0)
    assert match_activations(spec, other_module, reference, other, batches) == first


def test_both_models_run_in_evaluation_mode() -> None:
    """The oracle uses BatchNorm's running statistics, and no dropout."""

    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2)
        )

    left, right = seeded(build, 1).train(), seeded(build, 2).train()
    spec, data = derive_spec(left, torch.zeros(2, 4)), rows(40, seed=0)
    found = correlations(spec, left, right, [data])["0",]
    with torch.no_grad():
        expected = cross_correlation(*(copy.deepcopy(m).eval()[:4](data).T for m in (left, right)))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_labels_are_ignored_and_one_pass_is_enough() -> None:
    left, right = seeded(mlp, 1), seeded(mlp, 2)
    spec, data = derive_spec(left, torch.zeros(1, 4)), rows(30, seed=0)
    expected = match_modules(spec, left, right, data.split(10)).permutation

    def once() -> Iterator[Any]:
        for part in data.split(10):
            yield (part, "label")

    assert match_modules(spec, left, right, once()).permutation == expected
    lists = [[part, None, 3] for part in data.split(10)]
    assert match_modules(spec, left, right, lists).permutation == expected


class Named(nn.Module):
    """Layers called with keyword arguments, and an activation that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(input=F.relu_(self.first(input=inputs)))


def test_layers_may_be_called_with_keyword_arguments() -> None:
    model = seeded(Named, 1)
    spec, data = derive_spec(model, torch.zeros(1, 4)), rows(60, seed=0) - 2
    assert_planted_is_undone(spec, model, [data])


def test_a_transformer_with_padded_tokens_is_matched() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True)
            self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
            self.inner = nn.TransformerEncoder(layer, 1)

        def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
            tokens, padding = inputs
            return self.head(self.inner(self.stem(tokens), src_key_padding_mask=padding)[:, 0])

    model = seeded(Padded, 1)
    padding = torch.arange(5) >= torch.tensor([[3], [5]])
    pairs = [(rows(10, seed).view(2, 5, 4), padding) for seed in range(8)]
    spec = derive_spec(model, ((torch.zeros(2, 5, 4), padding),))
    assert_planted_is_undone(spec, model, [(pair, torch.zeros(2)) for pair in pairs])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [0, 1])
def test_an_activation_that_is_not_finite_is_rejected(value: float, batch: int) -> None:
    left, right = seeded(mlp, 1), seeded(mlp, 2)
    left[1] = right[1] = nn.Identity()
    spec, batches = derive_spec(left, torch.zeros(1, 4)), [rows(5, seed) for seed in range(2)]
    batches[batch][3, 1] = value
    with pytest.raises(ValueError, match=r"[02]: an activation is NaN or infinite"):
        match_modules(spec, left, right, batches)
    assert not any(module._forward_hooks for module in left.modules())


def test_an_activation_of_the_other_model_that_is_not_finite_is_rejected() -> None:
    left, right = seeded(mlp, 1), seeded(mlp, 2)
    with torch.no_grad():
        right[0].weight *= 1e38
    left[1] = right[1] = nn.Identity()
    spec = derive_spec(left, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="2: an activation is NaN or infinite"):
        match_modules(spec, left, right, [rows(5, seed=0)])


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4)]])
def test_missing_data_are_rejected(batches: list[Tensor]) -> None:
    model = seeded(mlp, 1)
    with pytest.raises(ValueError, match="no batch to match the activations on"):
        match_modules(derive_spec(model, torch.zeros(1, 4)), model, model, batches)


def test_a_model_without_observable_groups_needs_no_data() -> None:
    entry = ZOO["autoencoder-tied"]
    spec, model = spec_of(entry), generic(entry, 1)
    assert_planted_is_undone(spec, model, [])


@pytest.mark.parametrize("side", ["reference", "other"])
def test_invalid_models_are_rejected(side: str) -> None:
    model = seeded(mlp, 1)
    spec, data = derive_spec(model, torch.zeros(1, 4)), [rows(5, seed=0)]
    state = state_of(model)
    pair = {"model": model, "reference": state, "other": state}
    with pytest.raises(TypeError, match="model must be a module of the architecture, got dict"):
        match_activations(spec, batches=data, **{**pair, "model": state})
    bad = state_of(model)
    bad["2.bias"][1] = float("nan")
    with pytest.raises(SpecError, match=f"{side}: 2.bias holds NaN"):
        match_activations(spec, batches=data, **{**pair, side: bad})
    for wrong in ("model", side):
        wider = mlp(width=9) if wrong == "model" else mlp(width=9).state_dict()
        with pytest.raises(SpecError, match="shape"):
            match_activations(spec, batches=data, **{**pair, wrong: wider})
