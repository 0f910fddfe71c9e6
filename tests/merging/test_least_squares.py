"""Layerwise least squares against NumPy's solver, and the laws that a fitted model keeps."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, generic, random_inputs, state_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from zoo import ZOO, Entry

from fl_rebasin import LeastSquares, RegMean, Repair, fit_least_squares
from fl_rebasin.forward import Moments
from fl_rebasin.merging.batchnorm import batchnorm_statistics, recentred
from fl_rebasin.merging.least_squares import layers
from fl_rebasin.merging.least_squares.plan import plan
from fl_rebasin.merging.least_squares.steps import (
    RIDGE,
    FitStep,
    NormStep,
    RescaleStep,
    Step,
    add_up,
)
from fl_rebasin.merging.least_squares.sums import regmean_sums
from fl_rebasin.state_dicts import average

State = dict[str, Tensor]
SOME_POSITIONS = layers.MAX_POSITIONS
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@pytest.fixture(autouse=True)
def all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every position of an image counts, but where a test says otherwise."""
    monkeypatch.setattr(layers, "MAX_POSITIONS", 10**6)


def entry_of(build: Callable[[], nn.Module], *shape: int) -> Entry:
    return Entry(build, lambda: torch.zeros(*shape), None)


def batches_of(entry: Entry, *seeds: int) -> list[Any]:
    return [random_inputs(entry, seed) for seed in seeds]


def outputs(model: nn.Module, state: State, batches: Sequence[Any]) -> list[Tensor]:
    """Outputs in evaluation mode."""
    model = copy.deepcopy(model).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        leaves = [leaf for batch in batches for leaf in tree_leaves(model(batch))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def assert_same_function(
    model: nn.Module, left: State, right: State, batches: Sequence[Any], tolerance: float = 1e-9
) -> None:
    for one, other in zip(*(outputs(model, s, batches) for s in (left, right)), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def pre_activation() -> nn.Module:
    """Norm first: the stem's result goes into a norm and around it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(2, 4, 3, padding=1)
            self.norm1, self.first = nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=1, bias=False)
            self.norm2, self.second = nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)
            self.head = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.stem(images)
            inside = self.first(torch.relu(self.norm1(hidden)))
            hidden = hidden + self.second(torch.relu(self.norm2(inside)))
            return self.head(hidden.mean((2, 3)))

    return Net()


def pooled_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2, padding=1),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3, padding=2, dilation=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


PRE, POOLED = entry_of(pre_activation, 4, 2, 4, 4), entry_of(pooled_norm, 12, 2, 8, 8)
ONE_MODEL = {
    "pre-activation": PRE,
    "pooled-norm": POOLED,
    **{
        name: ZOO[name]
        for name in (
            "mlp",
            "conv-batchnorm-flatten",
            "group-and-layer-norm",
            "residual-batchnorm",
            "residual-no-norm",
            "dense-concat",
            "depthwise-grouped-transposed",
            "tied-shared",
            "attention-separate",
            "encoder-layer",
            "lstm-last-step",
            "lstm-cells",
            "unet",
            "squeeze-excitation",
            "inverted-residual",
            "resnext",
            "convnext",
            "conv-1d",
            "conv-3d",
            "conv-transposed-3d-grouped",
            "instance-norm",
            "glu-channels",
            "vgg",
            "inception",
            "dcgan-generator",
            "auxiliary-head",
            "weight-norm",
            "spectral-norm",
            "weight-norm-old",
            "tabular-batchnorm",
            "two-uses",
            "graph-edges-constant",
            "experts-modules",
        )
    },
}
BOTH = pytest.mark.parametrize(
    "method", [LeastSquares(), RegMean()], ids=lambda method: method.name
)
WAYS = pytest.mark.parametrize(
    "method", [LeastSquares(), RegMean(), Repair()], ids=lambda method: method.name
)


@WAYS
@pytest.mark.parametrize("name", ONE_MODEL)
def test_models_that_are_all_alike_keep_their_function(name: str, method: Any) -> None:
    entry = ONE_MODEL[name]
    model = generic(entry, 1)
    state, batches = state_of(model), batches_of(entry, 0, 1, 2, 3)
    found = fit_least_squares(model, state, [state, state], [batches[:3], batches[3:]], method)
    assert_same_function(model, found, state, batches_of(entry, *range(6)), 1e-7)
    assert list(found) == list(state)
    assert {key: value.dtype for key, value in found.items()} == {
        key: value.dtype for key, value in state.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "pre-activation",
        "pooled-norm",
        "mlp",
        "conv-batchnorm-flatten",
        "residual-batchnorm",
        "group-and-layer-norm",
        "encoder-layer",
        "squeeze-excitation",
        "conv-1d",
        "vgg",
    ],
)
def test_from_any_start_one_model_gives_its_own_function_on_its_data(name: str) -> None:
    entry = ONE_MODEL[name]
    model, state, other = generic(entry, 1), *(state_of(generic(entry, seed)) for seed in (1, 2))
    batches = batches_of(entry, *range(30))
    start = dict(state)
    for step in plan(model, (batches[0],)):
        for layer in {step.layer, step.norm} - {None}:
            start |= {key: other[key] for key in state if key.startswith(f"{layer}.")}
        norm = step.layer if isinstance(step, NormStep) else step.norm
        if norm is not None:  # Max pooling before the norm sees the sign of its scale.
            key = f"{norm}.weight"
            start[key] = other[key].abs() * state[key].sign()
    found = fit_least_squares(model, start, [state], [batches], LeastSquares(ridge=1e-10))
    assert_same_function(model, found, state, batches, 1e-5)
    far = [
        float((a - b).abs().max())
        for a, b in zip(*(outputs(model, s, batches[:1]) for s in (start, state)), strict=True)
    ]
    assert max(far) > 0.05


def test_the_weights_of_one_model_come_back_where_the_data_tell_them() -> None:
    model = ZOO["mlp"].build()
    state = state_of(generic(ZOO["mlp"], 1))
    start = {key: torch.zeros_like(value) for key, value in state.items()}
    batches = [torch.randn(200, 3, 2, 2, generator=torch.Generator().manual_seed(0))]
    model.double()
    found = fit_least_squares(
        model, start, [state], [[batches[0].double()]], LeastSquares(ridge=1e-9)
    )
    assert_same(found, state, rtol=1e-5, atol=1e-5)


# --- one layer against NumPy -------------------------------------------------------------------


def rows_by_hand(layer: nn.Module, inputs: np.ndarray) -> np.ndarray:
    """What each unit sees, one row a sample and place, by loops."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    images = inputs[:, :, None] if isinstance(layer, nn.Conv1d) else inputs
    one = (0, 1) if isinstance(layer, nn.Conv1d) else ()
    high, wide = (*one[1:], *layer.kernel_size)
    down, right = (*one[1:], *layer.stride)
    tall, broad = (*one[1:], *layer.dilation)
    above, beside = (*one[:1], *layer.padding)
    images = np.pad(images, ((0, 0), (0, 0), (above, above), (beside, beside)))
    reach, span = (high - 1) * tall + 1, (wide - 1) * broad + 1
    return np.array(
        [
            image[:, top : top + reach : tall, left : left + span : broad].ravel()
            for image in images
            for top in range(0, images.shape[2] - reach + 1, down)
            for left in range(0, images.shape[3] - span + 1, right)
        ]
    )


def ridge_by_hand(
    inputs: np.ndarray, targets: np.ndarray, start: np.ndarray, ridge: float, constant: bool
) -> np.ndarray:
    """NumPy's least squares with a row for each weight that is pulled to where it was."""
    pull = ridge * (inputs**2).sum(0).mean()
    if constant:
        inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], 1)
    else:
        start = start[:-1]
    left = np.concatenate([inputs, math.sqrt(pull) * np.eye(inputs.shape[1])])
    right = np.concatenate([targets, math.sqrt(pull) * start])
    return np.linalg.lstsq(left, right, rcond=None)[0]


def places(outputs: Tensor, layer: nn.Module) -> np.ndarray:
    """Results as one row a sample and place."""
    if not isinstance(layer, nn.Linear):
        outputs = outputs.transpose(1, -1).transpose(1, -2) if outputs.ndim == 4 else outputs.mT
    return outputs.reshape(-1, outputs.shape[-1]).numpy()


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5)),
    "linear-no-bias": (lambda: nn.Linear(5, 4, bias=False), (7, 5)),
    "linear-on-tokens": (lambda: nn.Linear(5, 4), (3, 6, 5)),
    "conv": (lambda: nn.Conv2d(2, 4, 3), (4, 2, 5, 6)),
    "conv-no-bias": (lambda: nn.Conv2d(2, 4, (3, 2), bias=False), (4, 2, 5, 6)),
    "conv-strided": (lambda: nn.Conv2d(2, 4, 3, stride=(2, 1), padding=1), (4, 2, 5, 6)),
    "conv-padded": (lambda: nn.Conv2d(2, 4, (2, 3), padding=(2, 0)), (4, 2, 5, 6)),
    "conv-dilated": (
        lambda: nn.Conv2d(2, 4, 3, dilation=(1, 2), padding=2, stride=2),
        (4, 2, 6, 7),
    ),
    "conv-1d": (lambda: nn.Conv1d(3, 4, 3), (4, 3, 9)),
    "conv-1d-all": (
        lambda: nn.Conv1d(3, 4, 3, stride=2, padding=3, dilation=2, bias=False),
        (4, 3, 9),
    ),
}


@pytest.mark.parametrize("ridge", [RIDGE, 0.3])
@BOTH
@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_is_that_of_numpy(name: str, method: Any, ridge: float) -> None:
    """Clients with models and data of their own; for a single layer both ways are RegMean."""
    build, shape = LAYERS[name]
    entry = entry_of(lambda: nn.Sequential(build()), *shape)
    models = [generic(entry, seed) for seed in (1, 2, 3)]
    states, start = [state_of(model) for model in models], state_of(generic(entry, 4))
    data = [batches_of(entry, *seeds) for seeds in ((0, 1, 2), (3,), (4, 5))]
    found = fit_least_squares(models[0], start, states, data, replace(method, ridge=ridge))
    layer = models[0][0]
    with torch.no_grad():
        targets = np.concatenate(
            [
                places(m(batch), layer)
                for m, each in zip(models, data, strict=True)
                for batch in each
            ]
        )
    inputs = np.concatenate([rows_by_hand(layer, b.numpy()) for each in data for b in each])
    has_bias = "0.bias" in start
    before = [start["0.weight"].flatten(1).T.numpy()]
    before.append(start["0.bias"][None].numpy() if has_bias else np.zeros((1, 4)))
    expected = ridge_by_hand(inputs, targets, np.concatenate(before), ridge, has_bias)
    weight = found["0.weight"].flatten(1).T.numpy()
    np.testing.assert_allclose(weight, expected[: len(weight)], rtol=1e-7, atol=1e-9)
    if has_bias:
        np.testing.assert_allclose(found["0.bias"].numpy(), expected[-1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("side", [1, 4, 5, 8, 14, 28, 30, 32, 112])
def test_positions_that_count_are_few_and_in_every_column(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "MAX_POSITIONS", SOME_POSITIONS)
    chosen = range(0, side * side, layers.position_step(side * side))
    assert min(side * side, 8) <= len(chosen) <= SOME_POSITIONS
    columns = {position % side for position in chosen}
    assert len(columns) >= min(side, len(chosen) // 2)


@BOTH
@pytest.mark.parametrize("chunk", [layers.CHUNK, 1])
def test_of_large_images_evenly_spread_positions_count(
    chunk: int, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "MAX_POSITIONS", SOME_POSITIONS)
    monkeypatch.setattr(layers, "CHUNK", chunk)
    entry = entry_of(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), 4, 2, 8, 8)
    own, merged = generic(entry, 0), generic(entry, 1)
    (batch,) = batches_of(entry, 2)
    (step,) = plan(own, batch)
    if isinstance(method, RegMean):
        sums = regmean_sums(own, [step], [batch])["0"]
    else:
        sums = step.sums(merged, own, [batch])
    # 64 positions are more than 16: every fifth, so that all columns have their turn.
    rows = rows_by_hand(own[0], batch.numpy()).reshape(4, 64, -1)[:, ::5]
    with torch.no_grad():
        results = places(own(batch), own[0]).reshape(4, 64, -1)[:, ::5]
    rows, results = (each.reshape(-1, each.shape[2]) for each in (rows, results))
    ones = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    np.testing.assert_allclose(sums["gram"].numpy(), ones.T @ ones, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sums["cross"].numpy(), ones.T @ results, rtol=1e-9, atol=1e-9)
    squares = np.square(results).sum(0)
    np.testing.assert_allclose(sums["squares"].numpy(), squares, rtol=1e-9, atol=1e-9)


# --- whole nets --------------------------------------------------------------------------------


def clients(
    entry: Entry, signs: bool = True
) -> tuple[nn.Module, State, list[State], list[list[Any]]]:
    """A module, the average of two models, the models, and data for each of them.

    With `signs` the scales of the norms agree in their sign, negative ones among them.
    """
    model, states = generic(entry, 1), [state_of(generic(entry, seed)) for seed in (1, 2)]
    for name, module in model.named_modules():
        if signs and isinstance(module, NORMS) and module.affine:
            key = f"{name}.weight" if name else "weight"
            states[1][key] = states[1][key].abs() * states[0][key].sign()
    data = [batches_of(entry, *range(8)), [2 * b + 1 for b in batches_of(entry, *range(20, 25))]]
    return model, average(states, [0.4, 0.6]), states, data


def folded(state: State, layer: str, norm: str, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer and the norm after it, as one."""
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + eps).sqrt()
    shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    weight = state[f"{layer}.weight"]
    bias = state.get(f"{layer}.bias", torch.zeros(len(weight), dtype=weight.dtype))
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), bias * scale + shift


def test_a_net_with_norms_is_that_of_numpy_layer_by_layer() -> None:
    """Max pooling before a norm with negative scales, strides, dilation."""
    model, merged, states, data = clients(POOLED)
    found = fit_least_squares(model, merged, states, data)
    sign = merged["2.weight"].sign().reshape(-1, 1, 1)
    assert {-1.0, 1.0} == set(sign.unique().tolist())

    def after_pool(hidden: Tensor) -> Tensor:
        return torch.relu(sign * F.max_pool2d(sign * hidden, 2))

    # For each layer: its norm, the module, and what comes after layer and norm.
    chain: list[tuple[str, str | None, Callable[[Tensor], Tensor]]] = [
        ("0", "2", after_pool),
        ("4", "5", lambda hidden: torch.relu(hidden).flatten(1)),
        ("8", "9", torch.tanh),
        ("11", None, lambda hidden: hidden),
    ]

    def apply(layer: nn.Module, weight: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return F.linear(hidden, weight, bias)
        assert isinstance(layer, nn.Conv2d)
        return F.conv2d(hidden, weight, bias, layer.stride, layer.padding, layer.dilation)

    def parts(state: State, name: str, norm: str | None) -> tuple[Tensor, Tensor]:
        if norm is None:
            return state[f"{name}.weight"], state[f"{name}.bias"]
        return folded(state, name, norm)

    fresh = batches_of(POOLED, 50, 51)
    pooled, own, check = ([torch.cat(each) for each in data] for _ in range(3))
    check = [torch.cat(fresh)]
    for name, norm, after in chain:
        layer = model.get_submodule(name)
        results = [
            apply(layer, *parts(state, name, norm), hidden)
            for state, hidden in zip(states, own, strict=True)
        ]
        weight, bias = parts(merged, name, norm)
        rows = np.concatenate([rows_by_hand(layer, hidden.numpy()) for hidden in pooled])
        targets = np.concatenate([places(each, layer) for each in results])
        before = torch.cat([weight.flatten(1), bias[:, None]], 1).T.numpy()
        solved = ridge_by_hand(rows, targets, before, RIDGE, constant=True)
        if name != "11":
            # All but the last vary as much as what they were fitted to.
            fitted = rows @ solved[:-1]
            factor = targets.std(0) / fitted.std(0)
            assert (factor > 1.001).any()
            solved[-1] += fitted.mean(0) * (1 - factor)
            solved[:-1] *= factor
        solution = torch.from_numpy(solved)
        weight, bias = solution[:-1].T.reshape(weight.shape), solution[-1]
        pooled = [after(apply(layer, weight, bias, hidden)) for hidden in pooled]
        check = [after(apply(layer, weight, bias, hidden)) for hidden in check]
        own = [after(each) for each in results]
    (got,) = outputs(model, found, [torch.cat(fresh)])
    torch.testing.assert_close(got, check[0], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(got, outputs(model, merged, [torch.cat(fresh)])[0], atol=0.1)


def seen_by_norms(model: nn.Module, state: State, data: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Inputs and outputs of each norm in evaluation mode, as `(channels, values)`."""
    model = copy.deepcopy(model).eval()
    model.load_state_dict(state)
    seen: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Tensor) -> None:
            for place, values in zip(
                seen.setdefault(name, ([], [])), (args[0], output), strict=True
            ):
                place.append(values.transpose(0, 1).flatten(1))

        return record

    for name, module in model.named_modules():
        if isinstance(module, NORMS):
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        for batches in data:
            for batch in batches:
                model(batch)
    return {name: [torch.cat(place, 1) for place in each] for name, each in seen.items()}


@WAYS
@pytest.mark.parametrize("name", ["pooled-norm", "pre-activation", "residual-batchnorm", "conv-1d"])
def test_norms_are_left_as_training_would_leave_them(name: str, method: Any) -> None:
    entry = ONE_MODEL[name]
    model, merged, states, data = clients(entry)
    found = fit_least_squares(model, merged, states, data, method)
    seen = seen_by_norms(model, found, data)
    assert seen
    for norm, (inputs, _) in seen.items():
        torch.testing.assert_close(found[f"{norm}.running_mean"], inputs.mean(1))
        torch.testing.assert_close(found[f"{norm}.running_var"], inputs.var(1))
        assert torch.equal(
            found[f"{norm}.num_batches_tracked"], merged[f"{norm}.num_batches_tracked"]
        )
    for step in plan(model, (data[0][0],)):
        key = f"{step.layer}.weight"
        if step.norm not in (None, step.layer) and not isinstance(method, RegMean):
            norms = [state[key].flatten(1).norm(dim=1) for state in (found, merged)]
            torch.testing.assert_close(*norms)
    # All the data as one batch: training normalises by the same statistics.
    everything = torch.cat([batch for batches in data for batch in batches])
    (in_evaluation,) = outputs(model, found, [everything])
    model.load_state_dict(found)
    in_training = model.train()(everything).detach()
    torch.testing.assert_close(in_training, in_evaluation, rtol=0.02, atol=0.02)


REPAIRED = (
    "pooled-norm",
    "pre-activation",
    "residual-batchnorm",
    "inverted-residual",
    "conv-3d",
    "mlp",
    "dense-concat",
)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", REPAIRED)
def test_rescaled_units_have_the_models_own_mean_and_deviation(name: str, shared: bool) -> None:
    """REPAIR: averaged over the models by how much data each of them has.

    Deviations are those of each client's data by themselves. Where all have the same data these
    are the deviations, as in the paper.
    """
    entry = ONE_MODEL[name]
    model, merged, states, data = clients(entry)
    if shared:
        data = [data[0], data[0]]
    found = fit_least_squares(model, merged, states, data, Repair())

    def statistics(state: State, batches: Sequence[Any], layer: str) -> tuple[Tensor, Tensor, int]:
        ready, seen = copy.deepcopy(model).eval(), []
        ready.load_state_dict(state)
        module = ready.get_submodule(layer)
        dim = -1 if isinstance(module, nn.Linear) else 1
        module.register_forward_hook(lambda _, args, out: seen.append(out.movedim(dim, 0)))
        with torch.no_grad():
            for batch in batches:
                ready(batch)
        values = torch.cat([each.flatten(1) for each in seen], 1)
        return values.mean(1), values.std(1, correction=0), values.shape[1]

    steps = plan(model, (data[0][0],), max_features=0)
    assert steps
    assert not any(isinstance(step, FitStep) for step in steps)
    pools = name == "pooled-norm"
    for step in steps:
        layer = step.layer if step.norm is None else step.norm
        if pools and layer == "2":
            continue  # Set before the pool.
        own = [statistics(s, b, layer) for s, b in zip(states, data, strict=True)]
        new = [statistics(found, b, layer) for b in data]
        for place in (0, 1):
            got, expected = (
                sum(each[place] * each[2] for each in found_) / sum(each[2] for each in found_)
                for found_ in (new, own)
            )
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        if shared:
            torch.testing.assert_close(new[0][1], (own[0][1] + own[1][1]) / 2)


def test_one_pass_is_regmean() -> None:
    """`W = (sum G_i + r)^-1 (sum G_i W_i + r W)`, G_i of what the models' own layers see.

    All layers but the last are then scaled to vary as much as the models' own.
    """
    entry = entry_of(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
        ),
        9,
        4,
    )
    model, merged, states, data = clients(entry)
    found = fit_least_squares(model, merged, states, data, RegMean())
    for depth in (0, 2, 4):
        total, right, squares = 0.0, 0.0, 0.0
        seen, targets = [], []
        for state, batches in zip(states, data, strict=True):
            own = copy.deepcopy(model)
            own.load_state_dict(state)
            with torch.no_grad():
                inputs = own[:depth](torch.cat(batches)).numpy()
            inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], 1)
            gram = inputs.T @ inputs
            weight = np.concatenate(
                [state[f"{depth}.weight"].numpy(), state[f"{depth}.bias"][:, None].numpy()], 1
            )
            total, right, squares = total + gram, right + gram @ weight.T, squares + gram.diagonal()
            seen.append(inputs[:, :-1])
            targets.append(inputs @ weight.T)
        pull = RIDGE * squares[:-1].mean()
        before = torch.cat([merged[f"{depth}.weight"], merged[f"{depth}.bias"][:, None]], 1).numpy()
        solved = np.linalg.inv(total + pull * np.eye(len(total))) @ (right + pull * before.T)
        if depth < 4:
            fitted = np.concatenate(seen) @ solved[:-1]
            factor = np.concatenate(targets).std(0) / fitted.std(0)
            solved[-1] += fitted.mean(0) * (1 - factor)
            solved[:-1] *= factor
        np.testing.assert_allclose(found[f"{depth}.weight"].numpy(), solved[:-1].T, rtol=1e-8)
        np.testing.assert_allclose(found[f"{depth}.bias"].numpy(), solved[-1], rtol=1e-8)


def test_one_pass_folds_norms_and_rescales_nothing() -> None:
    model, merged, states, data = clients(POOLED)
    found = fit_least_squares(model, merged, states, data, RegMean(max_features=20))
    # The second convolution has 45 inputs: it stays as it is, but for its norm's statistics.
    assert torch.equal(found["4.weight"], merged["4.weight"])
    assert not torch.allclose(found["0.weight"], merged["0.weight"])
    for one, other in zip(folded(found, "4", "5"), folded(merged, "4", "5"), strict=True):
        torch.testing.assert_close(one, other)


def test_a_unit_that_the_fit_explains_hardly_is_not_blown_up() -> None:
    entry = entry_of(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 8, 3)
    own, merged = generic(entry, 1), generic(entry, 2)
    first = plan(own, batches_of(entry, 0)[0])[0]
    sums = first.sums(merged, own, batches_of(entry, *range(9)))
    noisy = {**sums, "squares": sums["squares"] * torch.tensor([1.0, 4.0, 1e4, 0.0])}
    usual, changed = first.solve(merged, sums), first.solve(merged, noisy)
    kept = [torch.equal(usual["0.weight"][unit], changed["0.weight"][unit]) for unit in range(4)]
    assert kept[0]
    assert not kept[1]
    plain = replace(first, last=True).solve(merged, sums)
    for unit in (2, 3):
        torch.testing.assert_close(changed["0.weight"][unit], plain["0.weight"][unit])


# --- sums --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2500, 0])
@pytest.mark.parametrize("name", ["pooled-norm", "residual-batchnorm", "dense-concat"])
def test_sums_over_clients_are_those_of_all_the_data(name: str, limit: int) -> None:
    entry = ONE_MODEL[name]
    model, merged, states, data = clients(entry)
    own = copy.deepcopy(model)
    model.load_state_dict(merged)
    own.load_state_dict(states[0])
    steps = plan(model, (data[0][0],), limit)
    for step in steps:
        expected = step.shapes(model)
        parts = [step.sums(model, own, batches) for batches in data]
        together = step.sums(model, own, [torch.cat([*data[0], *data[1]])])
        assert {key: tuple(value.shape) for key, value in together.items()} == expected
        assert all(value.dtype == torch.float64 for value in together.values())
        added = add_up(parts)
        for key in expected.keys() - {"merged_deviation", "own_deviation"}:
            torch.testing.assert_close(added[key], together[key], rtol=1e-9, atol=1e-9)
        if not isinstance(
            step, FitStep
        ):  # Deviations are averaged, so that differing means are no spread.
            for key in ("merged_deviation", "own_deviation"):
                assert bool((added[key] < together[key]).any())
    fitted = [step for step in steps if isinstance(step, FitStep)]
    at_once = [regmean_sums(own, fitted, batches) for batches in data]
    together = regmean_sums(own, fitted, [torch.cat([*data[0], *data[1]])])
    assert list(together) == [step.layer for step in fitted]
    for step in fitted:
        added = add_up([each[step.layer] for each in at_once])
        assert {k: tuple(v.shape) for k, v in added.items()} == step.shapes(model)
        for key, value in added.items():
            torch.testing.assert_close(value, together[step.layer][key], rtol=1e-9, atol=1e-9)


def test_large_inputs_are_taken_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, merged, states, data = clients(POOLED)
    methods = (LeastSquares(), RegMean())
    whole = [fit_least_squares(model, merged, states, data, method) for method in methods]
    monkeypatch.setattr(layers, "CHUNK", 5000)
    for method, expected in zip(methods, whole, strict=True):
        found = fit_least_squares(model, merged, states, data, method)
        assert_same(found, expected, rtol=1e-8, atol=1e-8)


# --- the plan ----------------------------------------------------------------------------------


class Tricks(nn.Module):
    """What must be left alone, beside what need not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.twice = nn.Linear(5, 5)
        self.left, self.right = nn.Linear(5, 5), nn.Linear(5, 5)
        self.right.weight = self.left.weight
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
        self.borrowed = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)
        self.biased, self.likewise = nn.Linear(5, 5), nn.Linear(5, 5)
        self.likewise.bias = self.biased.bias
        self.head = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.twice(torch.tanh(self.stem(inputs))))
        hidden = torch.tanh(self.twice(hidden))
        hidden = torch.tanh(self.left(hidden)) + torch.tanh(self.right(hidden))
        hidden = torch.tanh(self.computed(hidden))
        hidden = torch.tanh(self.borrowed(hidden)) @ self.borrowed.weight
        return self.head(torch.tanh(self.likewise(torch.tanh(self.biased(hidden)))))


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.same = self.norm

    def forward(self, inputs: Tensor) -> Tensor:
        return self.same(self.second(torch.relu(self.norm(self.first(inputs)))))


class Used(nn.Module):
    """A layer's result goes into a norm, and elsewhere."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layer, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.between, self.head = nn.Identity(), nn.Linear(5, 5)

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.layer(inputs)
        if self.way == "changed-before":
            hidden.relu_()
        normed = self.norm(self.between(hidden))
        if self.way == "added":
            return self.head(normed) + hidden
        if self.way == "returned":
            return {"outputs": self.head(normed), "hidden": [hidden]}
        if self.way == "by-a-layer":
            return self.head(normed), self.head.bias is not None, F.relu(hidden)
        if self.way == "shape-only":
            return self.head(normed) * hidden.shape[1]
        return self.head(normed)


def fits(*layers: str) -> list[Step]:
    """Steps from `layer` or `layer+norm`: fits, but rescalings with `~` in front; `norm+norm`."""
    steps: list[Step] = []
    for text in layers:
        layer, _, norm = text.removeprefix("~").partition("+")
        if layer == norm and norm:
            steps.append(NormStep(norm))
        elif text.startswith("~"):
            steps.append(RescaleStep(layer, norm or None))
        else:
            steps.append(FitStep(layer, norm or None))
    if steps and isinstance(steps[-1], FitStep):
        steps[-1] = replace(steps[-1], last=True)
    return steps


def conv_norm(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*copy.deepcopy(layers))


PLANS = {
    "pre-activation": (PRE, fits("stem", "~norm1+norm1", "first+norm2", "second", "head")),
    "pooled-norm": (POOLED, fits("0+2", "4+5", "8+9", "11")),
    "tricks": (entry_of(Tricks, 3, 4), fits("stem", "head")),
    "shared-norm": (entry_of(SharedNorm, 3, 4), fits("first", "second")),
    "used-once": (entry_of(lambda: Used("once"), 3, 4), fits("layer+norm", "head")),
    "used-shape-only": (entry_of(lambda: Used("shape-only"), 3, 4), fits("layer+norm", "head")),
    **{
        f"used-{way}": (
            entry_of(lambda way=way: Used(way), 3, 4),
            fits("layer", "~norm+norm", "head"),
        )
        for way in ("added", "returned", "by-a-layer", "changed-before")
    },
    "grouped-and-transposed": (
        entry_of(
            conv_norm(
                nn.Conv2d(2, 4, 1, groups=2),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.ConvTranspose2d(4, 4, 2),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 3, padding="same"),
                nn.Dropout(),
                nn.BatchNorm2d(4),
                nn.Identity(),
            ),
            2,
            2,
            4,
            4,
        ),
        fits("~0+1", "~4+4", "~6+7", "~8+10"),
    ),
    "norms-that-cannot-be-set": (
        entry_of(
            conv_norm(
                nn.Linear(4, 5),
                nn.BatchNorm1d(5, affine=False),
                nn.ReLU(),
                nn.Linear(5, 6),
                nn.BatchNorm1d(6, track_running_stats=False),
                nn.ReLU(),
                nn.Linear(6, 2),
            ),
            3,
            4,
        ),
        fits("0", "3", "6"),
    ),
    "norm-after-norm": (
        entry_of(conv_norm(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5)), 3, 4),
        fits("0+1", "~2+2"),
    ),
    "computed-then-norm": (
        entry_of(
            lambda: nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.BatchNorm1d(5)
            ),
            3,
            4,
        ),
        fits("~1+1"),
    ),
    "bare": (entry_of(lambda: nn.Linear(4, 2), 3, 4), fits("")),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_done_in_which_order(name: str) -> None:
    entry, expected = PLANS[name]
    model, (batch,) = generic(entry, 1).train(), batches_of(entry, 0)
    before = state_of(model)
    steps = plan(model, batch)
    assert steps == expected
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_same(state_of(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", PLANS)
@WAYS
def test_what_is_left_out_keeps_the_average(name: str, method: Any) -> None:
    """But for statistics of norms, which fit the data without changing the function."""
    entry, steps = PLANS[name]
    model, merged, states, data = clients(entry)
    found = fit_least_squares(model, merged, states, data, method)
    set_ = {layer for step in steps for layer in (step.layer, step.norm) if layer is not None}
    norms = {
        key
        for key, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, NORMS)
    }
    for key, value in merged.items():
        owner = key.rpartition(".")[0]
        if owner not in set_ | norms:
            assert torch.equal(found[key], value), key
    # And one model alone keeps its function.
    alone = fit_least_squares(model, states[0], [states[0]], data[:1], method)
    assert_same_function(model, alone, states[0], data[0], 1e-7)


def test_layers_above_the_limit_are_rescaled() -> None:
    (batch,) = batches_of(POOLED, 0)
    model = POOLED.build().double()
    assert plan(model, batch, 19) == fits("0+2", "~4+5", "8+9", "11")
    assert plan(model, batch, 18) == fits("~0+2", "~4+5", "8+9", "11")
    assert plan(model, batch, 17) == fits("~0+2", "~4+5", "8+9", "11")
    assert plan(model, batch, 16) == fits("~0+2", "~4+5", "~8+9", "11")
    assert plan(model, batch, 0) == fits("~0+2", "~4+5", "~8+9", "~11")


@pytest.mark.parametrize(
    "inputs", [(torch.zeros(3, 4), torch.zeros(4)), {"inputs": torch.zeros(3, 4), "gain": 1.0}]
)
def test_a_plan_takes_example_inputs_as_a_spec_does(inputs: Any) -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, inputs: Tensor, gain: Any) -> Tensor:
            return self.layer(inputs * gain)

    assert plan(Gained(), inputs) == fits("layer")


# --- norms -------------------------------------------------------------------------------------


def test_recentred_norms_compute_the_same_from_any_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.still = nn.BatchNorm1d(4, eps=0.1), nn.BatchNorm1d(4)
            self.other_name = self.norm
            self.plain = nn.BatchNorm1d(4, affine=False)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.plain(self.still(self.norm(inputs)))

    entry = entry_of(Net, 9, 4)
    model, batches = generic(entry, 1), batches_of(entry, 0, 1)
    with torch.no_grad():
        model.norm.weight[1] = -2.0
    before = state_of(model)
    drawn = torch.tensor([[1.0, -2.0, 3.0, 5.0], [0.5, 4.0, 1e-13, 9.0]], dtype=torch.float64)
    seen = Moments(50, drawn[0], 50 * drawn[1])
    found = recentred(model, {"norm": seen, "other_name": seen, "plain": seen})
    assert_same_function(model, found, before, batches, 1e-12)
    for name in ("norm", "other_name"):
        for key, value in (("running_mean", drawn[0]), ("running_var", drawn[1] * 50 / 49)):
            changed = found[f"{name}.{key}"]
            expected = value.clone()
            expected[2] = before[f"{name}.{key}"][2]  # It never varies.
            torch.testing.assert_close(changed, expected)
    for key in before:
        if key.startswith(("still", "plain")):
            assert torch.equal(found[key], before[key])
    assert_same(state_of(model), before, rtol=0, atol=0)
    assert found._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    found["still.weight"] += 1  # A copy.
    assert_same(state_of(model), before, rtol=0, atol=0)


def test_frozen_statistics_are_those_in_evaluation_mode() -> None:
    entry = ZOO["conv-batchnorm-flatten"]
    model, batches = generic(entry, 1).train(), batches_of(entry, *range(5))
    state = state_of(model)
    found = batchnorm_statistics(model, batches, frozen=True)
    seen = seen_by_norms(model, state, [batches])
    assert found.keys() == seen.keys()
    for name, (inputs, _) in seen.items():
        torch.testing.assert_close(found[name].mean, inputs.mean(1))
        torch.testing.assert_close(found[name].variance, inputs.var(1, correction=0))
        assert found[name].count == inputs.shape[1]
    assert_same(state_of(model), state, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    # One sample is enough: nothing is divided by its variance.
    assert batchnorm_statistics(model, [batches[0][:1]], frozen=True)["6"].count == 1


def alone_with(scale: Sequence[float], spread: float = 1.0) -> Entry:
    def build() -> nn.Module:
        return nn.Sequential(nn.Identity(), nn.ReLU(), nn.BatchNorm1d(len(scale)))

    return entry_of(build, 40, len(scale))


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_a_norm_by_itself_keeps_sign_and_deviation(spread: float) -> None:
    """Whatever eps is beside the variance, and where the average of the scales is 0."""
    scales = [torch.tensor([2.0, -3.0, 1.0, 0.5]), torch.tensor([1.0, -1.0, -1.0, 0.5])]
    entry = alone_with(scales[0].tolist())
    model = entry.build().double()
    states = [{**state_of(model), "2.weight": scale.double()} for scale in scales]
    batches = [spread * batch for batch in batches_of(entry, 0, 1)]
    data = [batches[:1], batches[1:]]
    found = fit_least_squares(model, average(states, None), states, data)
    own = [outputs(model, state, each)[0] for state, each in zip(states, data, strict=True)]
    new = outputs(model, found, batches)
    for law in (lambda t: t.mean(0), lambda t: t.std(0, correction=0)):
        torch.testing.assert_close(law(new[0]) + law(new[1]), law(own[0]) + law(own[1]))
    assert torch.equal(found["2.weight"].sign(), torch.tensor([1, -1, 1, 1]).double())


def test_a_unit_that_becomes_constant_can_still_learn() -> None:
    """Its weights stay, the scale of its norm is 0."""
    entry = entry_of(conv_norm(nn.Linear(4, 3), nn.BatchNorm1d(3)), 30, 4)
    model, merged, states, data = clients(entry)
    for state in states:
        state["1.weight"][1], state["1.bias"][1] = 0.0, 0.7
    for method in (LeastSquares(ridge=0.0), Repair(), RegMean(ridge=0.0)):
        found = fit_least_squares(model, merged, states, data, method)
        assert torch.equal(found["0.weight"][1], merged["0.weight"][1])
        assert abs(float(found["1.weight"][1])) < 1e-8
        assert bool((found["1.weight"][[0, 2]].abs() > 1e-3).all())
        got = torch.cat(outputs(model, found, [*data[0], *data[1]]))[:, 1]
        torch.testing.assert_close(got, torch.full_like(got, 0.7), rtol=1e-5, atol=1e-6)


def test_layers_that_see_nothing_keep_their_weights() -> None:
    entry = entry_of(conv_norm(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), 6, 4)
    model, merged, states, _ = clients(entry)
    for state in (merged, *states):
        state["0.bias"] = torch.full((3,), -1e6, dtype=torch.float64)
    data = [batches_of(entry, 0, 1), batches_of(entry, 2)]
    for method in (LeastSquares(), RegMean(), Repair()):
        found = fit_least_squares(model, merged, states, data, method)
        torch.testing.assert_close(found["2.weight"], merged["2.weight"])
        told = 12 * states[0]["2.bias"] + 6 * states[1]["2.bias"]
        pull = 0.0 if isinstance(method, Repair) else RIDGE
        expected = (told + pull * merged["2.bias"]) / (18 + pull)
        torch.testing.assert_close(found["2.bias"], expected)


# --- what comes in -----------------------------------------------------------------------------


def test_what_is_given_stays() -> None:
    entry = ZOO["residual-batchnorm"]
    model, merged, states, data = clients(entry)
    model.train()
    model.norm1.eval()
    given = [state_of(model), *({k: v.clone() for k, v in s.items()} for s in (merged, *states))]
    modes, inputs = [m.training for m in model.modules()], [b.clone() for b in data[0]]
    chance = torch.get_rng_state()
    first = fit_least_squares(model, merged, states, data)
    assert torch.equal(torch.get_rng_state(), chance)
    for now, before in zip((state_of(model), merged, *states), given, strict=True):
        assert_same(now, before, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(data[0], inputs, strict=True))
    again = fit_least_squares(model, merged, states, data)
    assert_same(first, again, rtol=0, atol=0)
    assert not any(value.requires_grad for value in first.values())
    module = entry.build().double()
    module.load_state_dict(merged)
    step = plan(module, data[0][0])[0]
    sums = step.sums(module, copy.deepcopy(module), data[0])
    assert not any(value.requires_grad for value in step.solve(module, sums).values())
    assert_same(state_of(module), merged, rtol=0, atol=0)


def test_labels_are_not_looked_at_and_the_cut_of_the_data_does_not_matter() -> None:
    entry = ZOO["conv-batchnorm-flatten"]
    model, merged, states, data = clients(entry)
    expected = fit_least_squares(model, merged, states, data)
    labelled = [[(batch, "label") for batch in batches] for batches in data]
    assert_same(fit_least_squares(model, merged, states, labelled), expected, rtol=0, atol=0)
    everything = [torch.cat(batches) for batches in data]
    ways: list[Any] = [
        [list(each.split(1)) for each in everything],
        [[each[:0], each] for each in everything],
        [DataLoader([*each], batch_size=7) for each in everything],
    ]
    for way in ways:
        found = fit_least_squares(model, merged, states, way)
        assert_same(found, expected, rtol=1e-7, atol=1e-7)


@BOTH
def test_the_first_item_may_be_a_dict_or_a_tuple(method: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, inputs: Any) -> Tensor:
            left, right = inputs.values() if isinstance(inputs, dict) else inputs
            return self.head(torch.relu(self.layer(left * right)))

    model, (merged, *states) = Net(), [state_of(Net()) for _ in range(3)]
    halves = [torch.randn(2, 9, 4) for _ in range(2)]
    ways = [
        [[(tuple(each), 0)] for each in halves],
        [[{"left": each[0], "right": each[1]}] for each in halves],
        [[({"left": each[0], "right": each[1]}, 0)] for each in halves],
    ]
    found = [fit_least_squares(model, merged, states, way, method) for way in ways]
    for other in found[1:]:
        assert_same(found[0], other, rtol=0, atol=0)


def test_images_may_come_one_by_one() -> None:
    """Without an axis for the batch."""
    entry = entry_of(conv_norm(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2)), 4, 2, 4, 4)
    model, merged, states, data = clients(entry)
    expected = fit_least_squares(model, merged, states, data)
    single = [[image for batch in batches for image in batch] for batches in data]
    found = fit_least_squares(model, merged, states, single)
    assert_same(found, expected, rtol=1e-9, atol=1e-9)
    found = fit_least_squares(model, merged, states, single, Repair())
    expected = fit_least_squares(model, merged, states, data, Repair())
    assert_same(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_are_fitted_in_single_precision(dtype: torch.dtype) -> None:
    entry = ZOO["conv-batchnorm-flatten"]
    model, merged, states, data = clients(entry)
    expected = fit_least_squares(model, merged, states, data)

    def narrow(state: State) -> State:
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}

    few = [[batch.to(dtype) for batch in batches] for batches in data]
    found = fit_least_squares(model.to(dtype), narrow(merged), [narrow(s) for s in states], few)
    assert {v.dtype for v in found.values()} == {dtype, torch.int64}
    tolerance = 2e-3 if dtype == torch.float32 else 0.3
    wide = {k: v.double() if v.is_floating_point() else v for k, v in found.items()}
    assert_same_function(model.double(), wide, expected, data[0], tolerance)


@BOTH
def test_data_that_cannot_be_used_are_named(method: Any) -> None:
    entry = ZOO["mlp"]
    model, merged, states, data = clients(entry)
    with pytest.raises(ValueError, match="no batch to fit the merged model on"):
        fit_least_squares(model, merged, states, [data[0], []], method)
    with pytest.raises(ValueError, match="no batch to fit the merged model on"):
        fit_least_squares(model, merged, states, [data[0], [data[1][0][:0]]], method)
    with pytest.raises(ValueError, match="data of 1 models for 2 models"):
        fit_least_squares(model, merged, states, data[:1], method)
    with pytest.raises(ValueError, match="no models to fit"):
        fit_least_squares(model, merged, [], [], method)
    bad = [data[0], [data[1][0] * float("nan")]]
    with pytest.raises(ValueError, match="1: an activation is NaN or infinite"):
        fit_least_squares(model, merged, states, bad, method)
    with pytest.raises(ValueError, match="1: an activation is NaN or infinite"):
        fit_least_squares(model, merged, states, bad, Repair())


def test_a_layer_that_one_forward_pass_does_not_reach_is_named() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return (self.small if float(inputs.abs().max()) < 10 else self.large)(inputs)

    entry = entry_of(Branching, 3, 4)
    model, merged, states, data = clients(entry)
    far = [data[0], [100 + batch for batch in data[1]]]
    with pytest.raises(ValueError, match="small is not reached by the forward pass"):
        fit_least_squares(model, merged, states, far)


def test_layers_called_by_keyword_are_fitted_and_recalibrated() -> None:
    class Net(nn.Module):
        def __init__(self, keyword: bool) -> None:
            super().__init__()
            self.keyword = keyword
            self.layer, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            if self.keyword:
                return self.head(input=torch.relu(self.norm(input=self.layer(input=inputs))))
            return self.head(torch.relu(self.norm(self.layer(inputs))))

    entry = entry_of(lambda: Net(keyword=False), 6, 4)
    model, merged, states, data = clients(entry)
    by_keyword = Net(keyword=True).double()
    assert plan(by_keyword, data[0][0]) == plan(model, data[0][0])
    for method in (LeastSquares(), RegMean(), Repair()):
        expected = fit_least_squares(model, merged, states, data, method)
        found = fit_least_squares(by_keyword, merged, states, data, method)
        assert_same(found, expected, rtol=0, atol=0)
