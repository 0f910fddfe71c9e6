"""Activation matching: planted answers, and the correlations against NumPy's on all the data."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, generic, random_inputs, spec_of, state_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from zoo import ZOO, Entry

from fl_rebasin import Permutation, PermutationSpec, SpecError, derive_spec, match_weights
from fl_rebasin.matching.activations import assign_correlated, correlations, match_activations

# Every third model, and those in which something is hidden or never varies.
SOME = dict.fromkeys(
    [*list(ZOO)[::3], "depthwise-grouped-transposed", "transformer", "grouped-query-repeat",
     "multi-query", "falcon", "query-key-norm", "lstm-two-layers", "rnn-relu-two-layers",
     "graph-attention-average", "mlp-mixer", "group-norm-nested", "channel-shuffle-module", "vgg",
     "inception", "experts-modules", "maxout", "deep-fm", "wide-and-deep", "weight-norm",
     "weight-norm-old", "autoencoder-tied", "tied-shared", "nested-inputs", "auxiliary-head"]
)  # fmt: skip
MODELS = pytest.mark.parametrize("name", SOME)


class OneInput(nn.Module):
    """A model that takes its keyword arguments as one dict, as data come."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: dict[str, Any]) -> Any:
        return self.inner(**inputs)


def of_one_input(entry: Entry) -> Entry:
    """The entry with one positional argument, which comes as the first item of a batch."""
    if isinstance(entry.inputs(), dict):
        return Entry(lambda: OneInput(entry.build()), lambda: (entry.inputs(),), entry.groups)
    return Entry(entry.build, lambda: (entry.inputs(),), entry.groups)


def batch_of(entry: Entry, seed: int) -> Any:
    """Random floats, and random whole numbers where a batch of them is taken."""
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


@MODELS
def test_a_planted_permutation_is_undone(name: str) -> None:
    entry = of_one_input(ZOO[name])
    spec, model = spec_of(entry), generic(entry, seed=1)
    planted = spec.random(torch.Generator().manual_seed(0))
    other = moved_copy(model, spec, planted)
    batches = [batch_of(entry, seed) for seed in range(8)]
    match = match_activations(spec, model, model.state_dict(), other.state_dict(), batches)
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
    return nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width + 1), nn.Tanh(),
        nn.Linear(width + 1, 3),
    )  # fmt: skip


def rows(count: int, seed: int, width: int = 4) -> Tensor:
    return 2 + 3 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def cross(left: Tensor, right: Tensor) -> np.ndarray:
    """NumPy's correlations of the units of two models, each `(units, samples)`; 0 for the dead."""
    expected = np.zeros((len(left), len(right)))
    alive = [np.flatnonzero(np.ptp(each.numpy(), axis=1) > 1e-9) for each in (left, right)]
    joint = np.corrcoef(left.numpy()[alive[0]], right.numpy()[alive[1]])
    expected[np.ix_(*alive)] = joint[: len(alive[0]), len(alive[0]) :]
    return expected


@pytest.mark.parametrize("sizes", [(60,), (20, 40), (1,) * 60, (7, 0, 1, 52), (0, 60)])
def test_correlations_are_those_of_all_the_data_at_once(sizes: tuple[int, ...]) -> None:
    left, right = seeded(mlp, 1), seeded(mlp, 2)
    spec, data = derive_spec(left, torch.zeros(1, 4)), rows(60, seed=0)
    found = correlations(spec, left, right, data.split(sizes))
    assert found.keys() == {("0",), ("2",)}
    with torch.no_grad():
        for name, depth in (("0", 2), ("2", 4)):  # What the next layer takes in.
            expected = cross(left[:depth](data).T, right[:depth](data).T)
            np.testing.assert_allclose(found[name,].numpy(), expected, atol=1e-5)


def test_positions_of_an_image_are_samples_and_flattened_units_are_found() -> None:
    entry = ZOO["conv-batchnorm-flatten"]
    left, right = generic(entry, 1).eval(), generic(entry, 2).eval()
    images = [batch_of(entry, seed) for seed in range(9)]
    found = correlations(spec_of(entry), left, right, images)
    with torch.no_grad():
        flat = [model[:5](torch.cat(images)).unflatten(1, (6, 9)) for model in (left, right)]
        expected = cross(*(each.transpose(0, 1).flatten(1) for each in flat))
        np.testing.assert_allclose(found["0",].numpy(), expected, atol=1e-5)
        expected = cross(*(model[:8](torch.cat(images)).T for model in (left, right)))
        np.testing.assert_allclose(found["5",].numpy(), expected, atol=1e-5)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.stem(inputs))
        return self.head(hidden + torch.tanh(self.block(hidden)))


def test_units_that_are_shown_in_several_places_count_in_each() -> None:
    left, right = seeded(Skip, 1), seeded(Skip, 2)
    spec, data = derive_spec(left, torch.zeros(1, 4)), rows(50, seed=0)
    (key,) = correlations(spec, left, right, [data])
    shown = []
    with torch.no_grad():
        for model in (left, right):
            hidden = torch.tanh(model.stem(data))
            shown.append(torch.cat([hidden, hidden + torch.tanh(model.block(hidden))]).T)
    found = correlations(spec, left, right, data.split(9))[key]
    np.testing.assert_allclose(found.numpy(), cross(*shown), atol=1e-5)


def shown_by(model: nn.Module, batches: list[Any], *places: tuple[str, bool]) -> Tensor:
    """What layers take in (True) or put out, as `(units, samples)`, side by side."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, at_input=at_input: seen.append(
                (args[0] if at_input else output).flatten(0, -2).T
            )
        )
        for name, at_input in places
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch[0])
    for handle in handles:
        handle.remove()
    return torch.cat(seen, 1)


def test_units_within_heads_correlate_with_those_of_every_head() -> None:
    entry = of_one_input(ZOO["attention-separate"])
    spec, left, right = spec_of(entry), generic(entry, 1), generic(entry, 2)
    batches = [batch_of(entry, seed) for seed in range(5)]
    found = correlations(spec, left, right, batches)
    (heads,) = {*spec.within.values()}
    assert [spec.groups[name] for name in (heads, *spec.within)] == [3, 4, 6]
    queries, values = spec.within
    places = {
        (queries, 12): (("block.q_proj", False), ("block.k_proj", False)),
        (values, 18): (("block.o_proj", True),),
    }
    for (name, size), shown in places.items():
        expected = cross(*(shown_by(model, batches, *shown) for model in (left, right)))
        assert expected.shape == (size, size)
        np.testing.assert_allclose(found[heads, name].numpy(), expected, atol=1e-5)
    assert (heads,) not in found


def test_blocks_and_the_units_within_are_assigned_as_well_as_by_brute_force() -> None:
    entry = ZOO["attention-separate"]
    spec = spec_of(entry)
    (heads,) = {*spec.within.values()}
    generator = torch.Generator().manual_seed(0)
    count = spec.groups[heads]
    sizes = {name: spec.groups[name] for name in spec.within}
    given = {
        (heads, name): torch.randn(count * n, count * n, generator=generator, dtype=torch.float64)
        for name, n in sizes.items()
    }
    permutation, silent = assign_correlated(spec, given)
    assert set(silent) == spec.groups.keys() - {heads, *spec.within}

    def value(order: Permutation) -> float:
        total = 0.0
        for (_, name), matrix in given.items():
            n = sizes[name]
            for place, head in enumerate(order[heads].tolist()):
                for unit, old in enumerate(order[name][place].tolist()):
                    total += float(matrix[place * n + unit, head * n + old])
        return total

    def best_of_pair(name: str, place: int, head: int) -> float:
        n = sizes[name]
        block = given[heads, name][place * n : (place + 1) * n, head * n : (head + 1) * n]
        return max(
            float(block[torch.arange(n), torch.tensor(order)].sum())
            for order in itertools.permutations(range(n))
        )

    pairs = {
        (place, head): sum(best_of_pair(name, place, head) for name in sizes)
        for place in range(count)
        for head in range(count)
    }
    best = max(
        sum(pairs[place, head] for place, head in enumerate(order))
        for order in itertools.permutations(range(count))
    )
    assert value(permutation) == pytest.approx(best)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("multi-query", "block.q_proj"), ("mlp-mixer", "patches.0"), ("maxout", "second")],
)
def test_units_beside_others_that_move_are_not_read_off(name: str, hidden: str) -> None:
    """Samples of the two models would not be the same ones."""
    entry = ZOO[name]
    spec, model = spec_of(entry), generic(entry, 1)
    found = correlations(spec, model, model, [batch_of(entry, seed) for seed in range(3)])
    assert (hidden,) not in found
    assert {key[-1] for key in found} == spec.groups.keys() - {hidden}


def test_the_data_decide_where_the_weights_mislead() -> None:
    """Units of a ReLU net may be scaled at will: the function stays, the weights do not."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)
        ),
        seed=1,
    )
    spec = derive_spec(model, torch.zeros(1, 4))
    planted = spec.random(torch.Generator().manual_seed(0))
    other = moved_copy(model, spec, planted)
    scale = torch.logspace(-2, 2, 20)
    with torch.no_grad():
        for first, second in ((0, 2), (2, 4)):
            other[first].weight *= scale[:, None]
            other[first].bias *= scale
            other[second].weight /= scale
    match = match_activations(
        spec, model, model.state_dict(), other.state_dict(), [rows(400, seed=0) - 2]
    )
    assert match.permutation.compose(planted).is_identity
    by_weights = match_weights(spec, model.state_dict(), other.state_dict())
    assert not by_weights.permutation.compose(planted).is_identity


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_a_unit_that_never_varies_correlates_with_nothing(constant: float) -> None:
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


def test_units_that_never_vary_are_matched_by_their_weights() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(),
                              nn.Linear(9, 3)),
        seed=1,
    )  # fmt: skip
    with torch.no_grad():
        model[0].bias[::2] = -5
        model[2].bias[::2] = -5
    spec, data = derive_spec(model, torch.zeros(1, 4)), [rows(50, seed=0) / 9]
    assert int((correlations(spec, model, model, data)["0",] == 0).all(1).sum()) >= 6
    planted = spec.random(torch.Generator().manual_seed(0))
    match = match_activations(
        spec, model, model.state_dict(), spec.apply(planted, model.state_dict()), data
    )
    assert match.permutation.compose(planted).is_identity


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_model_matches_itself_on_however_few_data(count: int) -> None:
    """Of two samples all correlations are 1, 0 or -1: units stay."""
    for seed in range(5):
        model = seeded(
            lambda: nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 9), nn.ReLU(),
                                  nn.Linear(9, 3)),
            seed,
        )  # fmt: skip
        spec = derive_spec(model, torch.zeros(1, 4))
        match = match_activations(
            spec, model, model.state_dict(), model.state_dict(), [rows(count, seed=0) - 2]
        )
        assert match.permutation.is_identity


def test_groups_that_nothing_shows_are_matched_by_their_weights() -> None:
    entry = ZOO["lstm-two-layers"]
    spec, model = spec_of(entry), generic(entry, 1)
    planted = spec.random(torch.Generator().manual_seed(0))
    other = moved_copy(model, spec, planted)
    batches = [batch_of(entry, seed) for seed in range(3)]
    found, silent = assign_correlated(spec, correlations(spec, model, other, batches))
    assert silent == ["core"]
    assert torch.equal(found["core#2"], planted["core#2"].argsort())
    match = match_activations(spec, model, model.state_dict(), other.state_dict(), batches)
    assert match.permutation.compose(planted).is_identity


def test_the_models_are_as_before() -> None:
    entry = ZOO["residual-batchnorm"]
    left, right = generic(entry, 1), generic(entry, 2)
    left.train()
    right.eval()
    right.norm1.train()
    spec, batches = spec_of(entry), [batch_of(entry, seed) for seed in range(2)]
    before = [(state_of(model), [m.training for m in model.modules()]) for model in (left, right)]
    chance = torch.get_rng_state()
    first = match_activations(spec, left, left.state_dict(), right.state_dict(), batches)
    assert torch.equal(torch.get_rng_state(), chance)
    for model, (state, modes) in zip((left, right), before, strict=True):
        assert_same(state_of(model), state, rtol=0, atol=0)
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert (
        match_activations(spec, left, left.state_dict(), right.state_dict(), batches).permutation
        == first.permutation
    )


def test_both_models_run_in_evaluation_mode() -> None:
    """BatchNorm by its running statistics, dropout off: the oracle's hidden units are so."""

    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2)
        )

    left, right = seeded(build, 1).train(), seeded(build, 2).train()
    spec, data = derive_spec(left, torch.zeros(2, 4)), rows(40, seed=0)
    found = correlations(spec, left, right, [data])["0",]
    with torch.no_grad():
        expected = cross(*(copy.deepcopy(m).eval()[:4](data).T for m in (left, right)))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_labels_are_not_looked_at_and_one_pass_is_enough() -> None:
    left, right = seeded(mlp, 1), seeded(mlp, 2)
    spec, data = derive_spec(left, torch.zeros(1, 4)), rows(30, seed=0)
    expected = match_activations(
        spec, left, left.state_dict(), right.state_dict(), data.split(10)
    ).permutation

    def once() -> Iterator[Any]:
        for part in data.split(10):
            yield (part, "label")

    assert (
        match_activations(spec, left, left.state_dict(), right.state_dict(), once()).permutation
        == expected
    )
    lists = [[part, None, 3] for part in data.split(10)]
    assert (
        match_activations(spec, left, left.state_dict(), right.state_dict(), lists).permutation
        == expected
    )


class Named(nn.Module):
    """Layers called with keywords, and an activation changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(input=F.relu_(self.first(input=inputs)))


def test_layers_may_be_called_with_keywords() -> None:
    model = seeded(Named, 1)
    spec, data = derive_spec(model, torch.zeros(1, 4)), rows(60, seed=0) - 2
    planted = spec.random(torch.Generator().manual_seed(0))
    match = match_activations(
        spec, model, model.state_dict(), spec.apply(planted, model.state_dict()), [data]
    )
    assert match.permutation.compose(planted).is_identity


def test_padded_tokens_of_a_transformer_are_no_obstacle() -> None:
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
    planted = spec.random(torch.Generator().manual_seed(0))
    batches = [(pair, torch.zeros(2)) for pair in pairs]
    match = match_activations(
        spec, model, model.state_dict(), spec.apply(planted, model.state_dict()), batches
    )
    assert match.permutation.compose(planted).is_identity


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [0, 1])
def test_a_diverged_activation_is_named(value: float, batch: int) -> None:
    left, right = seeded(mlp, 1), seeded(mlp, 2)
    left[1] = right[1] = nn.Identity()
    spec, batches = derive_spec(left, torch.zeros(1, 4)), [rows(5, seed) for seed in range(2)]
    batches[batch][3, 1] = value
    with pytest.raises(ValueError, match=r"[02]: an activation is NaN or infinite"):
        match_activations(spec, left, left.state_dict(), right.state_dict(), batches)
    assert not any(module._forward_hooks for module in left.modules())


def test_only_the_other_model_diverges() -> None:
    left, right = seeded(mlp, 1), seeded(mlp, 2)
    with torch.no_grad():
        right[0].weight *= 1e38
    left[1] = right[1] = nn.Identity()
    spec = derive_spec(left, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="2: an activation is NaN or infinite"):
        match_activations(spec, left, left.state_dict(), right.state_dict(), [rows(5, seed=0)])


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4)]])
def test_no_data_are_named(batches: list[Tensor]) -> None:
    model = seeded(mlp, 1)
    with pytest.raises(ValueError, match="no batch to match the activations on"):
        match_activations(
            derive_spec(model, torch.zeros(1, 4)),
            model,
            model.state_dict(),
            model.state_dict(),
            batches,
        )


def test_a_model_in_which_nothing_is_shown_needs_no_data() -> None:
    entry = ZOO["autoencoder-tied"]
    spec, model = spec_of(entry), generic(entry, 1)
    planted = spec.random(torch.Generator().manual_seed(0))
    match = match_activations(
        spec, model, model.state_dict(), spec.apply(planted, model.state_dict()), []
    )
    assert match.permutation.compose(planted).is_identity


@pytest.mark.parametrize("side", ["reference", "other"])
def test_what_cannot_run_is_named(side: str) -> None:
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
