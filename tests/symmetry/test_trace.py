"""Which units `derive_spec` frees, which it pins, and which reasons and warnings it gives."""

import copy
import itertools
from typing import Any

import pytest
import torch
from derivation import INPUT, TwoLayers
from torch import Tensor, nn
from torchvision.models import resnet18

from fl_rebasin import SpecError, derive_spec
from fl_rebasin.symmetry.rules import RULES
from fl_rebasin.symmetry.trace import trace
from fl_rebasin.symmetry.twin import Twin


def wrong_rule(trace: Any, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Claims that every axis passes through."""
    trace.assign(out, trace.axes(args[0]))
    return True


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: x.cumsum(1), "accumulated in order"),
        (lambda x: x * torch.arange(6.0), "no rule for aten.arange"),
        (lambda x: x[:, [1, 0, 2, 3, 4, 5]], "looked up by index"),
        (lambda x: x.flip(1), "flipped"),
        (lambda x: x @ torch.linalg.inv(torch.eye(6) + x[:1].T @ x[:1]), "no rule for"),
        (lambda x: x.as_strided((6, 2), (1, 6)).mT, "no rule for these arguments of"),
    ],
)
def test_an_operator_that_cannot_be_followed_pins_its_axes_with_a_reason(
    between: Any, reason: str
) -> None:
    spec = derive_spec(TwoLayers(between), INPUT)
    assert spec.groups == {}
    assert spec.pinned["first.weight[0]"].startswith(reason)
    assert spec.pinned["second.weight[1]"].startswith(reason)


def test_units_added_to_their_own_transpose_lose_freedom() -> None:
    # A permutation would have to fit both orders of the units.
    spec = derive_spec(
        TwoLayers(lambda x: x + x.reshape(-1, 2, 3).transpose(1, 2).reshape(-1, 6)), INPUT
    )
    assert set(spec.groups.values()) <= {2, 3}


def test_the_self_check_catches_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "cumsum", wrong_rule)
    with pytest.warns(UserWarning, match=r"self-check pins the groups \['first'\]"):
        spec = derive_spec(TwoLayers(lambda x: x.cumsum(1)), INPUT)
    assert spec.groups == {}
    assert spec.pinned["first.weight[0]"] == "self-check"


def test_the_self_check_catches_a_wrong_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    # In training mode the outputs stay the same; only the running statistics differ.
    right = RULES["native_batch_norm"]

    def wrong(trace: Any, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        return right(trace, func, (*args[:3], None, None, *args[5:]), kwargs, out)

    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert derive_spec(model, INPUT).groups == {"0": 6}
    monkeypatch.setitem(RULES, "native_batch_norm", wrong)
    with pytest.warns(UserWarning, match="self-check pins the groups"):
        assert "0" not in derive_spec(model, INPUT).groups


def test_unused_parameters_are_pinned() -> None:
    model = TwoLayers()
    model.spare = nn.Linear(6, 6)
    with pytest.warns(UserWarning, match=r"2 parameters are not used.*spare\.weight"):
        spec = derive_spec(model, INPUT)
    assert spec.groups == {"first": 6}
    assert spec.pinned["spare.weight[0]"] == "not used in the forward pass"


def test_a_layer_used_only_in_training_is_traced() -> None:
    class Auxiliary(TwoLayers):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.aux = nn.Linear(6, 2)

        def forward(self, inputs: Tensor) -> Any:
            hidden = self.first(inputs)
            return (self.second(hidden), self.aux(hidden)) if self.training else self.second(hidden)

    spec = derive_spec(Auxiliary(), INPUT)
    assert spec.groups == {"first": 6}
    assert "aux.weight[1]" not in spec.pinned


def test_tied_tensors_count_once() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    spec = derive_spec(model, torch.zeros(1, 5))
    assert spec.groups == {}  # The rows of the weight are outputs as well.
    assert spec.learnable == ("0.weight", "0.bias", "2.bias")


def test_extra_state_is_refused() -> None:
    class Extra(TwoLayers):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(SpecError, match="_extra_state in the state dict is a dict"):
        derive_spec(Extra(torch.relu), INPUT)


def test_a_batch_of_one_suffices_for_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert derive_spec(model, torch.zeros(1, 4)).groups == {"0": 6}


def test_a_permuted_resnet18_computes_the_same_function() -> None:
    model = resnet18(num_classes=10).eval()
    inputs = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    spec = derive_spec(model, inputs)
    assert spec.freedom > 0.99
    # One residual stream per stage, and one hidden group in each of the eight blocks.
    assert sorted(spec.groups.values()) == sorted([64, 128, 256, 512, *2 * [64, 128, 256, 512]])
    moved = copy.deepcopy(model)
    perm = spec.random(torch.Generator().manual_seed(0))
    moved.load_state_dict(spec.apply(perm, model.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(moved(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def test_describe_lists_groups_and_reasons() -> None:
    text = str(derive_spec(TwoLayers(), INPUT))
    assert "first     6  first.weight[0], first.bias[0], second.weight[1]" in text
    assert "model output     2  second.weight[0], second.bias[0]" in text


def test_a_cast_to_single_precision_costs_no_freedom() -> None:
    spec = derive_spec(TwoLayers(lambda x: x.to(torch.float32).softmax(1).to(x.dtype)), INPUT)
    assert spec.groups == {"first": 6}


def test_a_buffer_that_no_run_updates_is_pinned() -> None:
    # All clients hold the same mask; the average of differently permuted masks would be another.
    class Masked(TwoLayers):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.register_buffer("mask", (torch.arange(24) % 3 > 0).float().view(6, 4))

        def forward(self, inputs: Tensor) -> Tensor:
            weight = self.first.weight * self.mask
            return self.second(torch.relu(nn.functional.linear(inputs, weight, self.first.bias)))

    spec = derive_spec(Masked(), INPUT)
    assert spec.groups == {}
    assert spec.pinned["mask[0]"] == "a buffer that no run updates: a constant of the model"
    assert spec.pinned["first.weight[0]"] == spec.pinned["mask[0]"]


def test_statistics_of_a_frozen_batchnorm_move_with_their_units() -> None:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> "Frozen":
            return super().train(False)

    model = nn.Sequential(nn.Linear(4, 6), Frozen(6), nn.Linear(6, 2)).train()
    spec = derive_spec(model, INPUT)
    assert spec.groups == {"0": 6}
    assert "1.running_mean[0]" not in spec.pinned


def test_positions_beyond_the_example_are_pinned() -> None:
    class Placed(TwoLayers):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.table = nn.Parameter(torch.randn(9, 6))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(self.first(inputs) + self.table[: inputs.shape[1]])

    spec = derive_spec(Placed(), torch.zeros(2, 5, 4))
    assert spec.groups == {"first": 6}
    assert "table[1]" not in spec.pinned
    assert "table[0]" in spec.pinned


def test_an_index_found_by_value_pins_only_if_it_is_used() -> None:
    values = derive_spec(TwoLayers(lambda x: x * x.max(1, keepdim=True).values), INPUT)
    assert values.groups == {"first": 6}
    places = derive_spec(TwoLayers(lambda x: x * x.max(1, keepdim=True).indices), INPUT)
    assert places.groups == {}
    assert places.pinned["first.bias[0]"] == "searched for an index"


def test_the_self_check_sees_a_branch_behind_a_gain_of_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Gated(TwoLayers):
        def __init__(self) -> None:
            super().__init__(lambda x: x.cumsum(1))
            self.gain = nn.Parameter(torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs[:, :3] + self.gain * super().forward(inputs)

    monkeypatch.setitem(RULES, "cumsum", wrong_rule)
    with pytest.warns(UserWarning, match=r"self-check pins the groups \['first'\]"):
        derive_spec(Gated(), INPUT)


def test_a_model_that_lacks_float64_is_checked_in_float32() -> None:
    class Single(TwoLayers):
        def forward(self, inputs: Tensor) -> Tensor:
            if inputs.dtype == torch.float64:
                raise RuntimeError("\"fused\" not implemented for 'Double'")
            return super().forward(inputs)

    with pytest.warns(UserWarning, match="cannot run in float64.*tolerance of 1e-04"):
        spec = derive_spec(Single(torch.relu), INPUT)
    assert spec.groups == {"first": 6}


def test_the_self_check_pins_only_the_groups_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(9))

        def forward(self, inputs: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                inputs = torch.tanh(layer(inputs))
                inputs = inputs.cumsum(1) if number in (2, 5) else inputs
            return inputs

    monkeypatch.setitem(RULES, "cumsum", wrong_rule)
    with pytest.warns(UserWarning, match=r"pins the groups \['layers.2', 'layers.5'\]"):
        spec = derive_spec(Deep(), torch.zeros(2, 5))
    assert list(spec.groups) == [f"layers.{number}" for number in (0, 1, 3, 4, 6, 7)]


class Bare(nn.Module):
    """A parameter, one operator and a sum: all axes could be free."""

    def __init__(self, shape: tuple[int, ...], body: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(shape, generator=generator))
        self.body = body

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.sum() + torch.tanh(self.body(self.table)).sum()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize(
    "body",
    [
        lambda t: nn.functional.glu(t[:, : t.shape[1] // 2 * 2], 1),
        lambda t: nn.functional.group_norm(t[:, : t.shape[1] // 2 * 2], t.shape[1] // 2),
        lambda t: nn.functional.layer_norm(t, t.shape[-1:]),
        lambda t: nn.functional.instance_norm(t),
        lambda t: t.softmax(1),
        lambda t: t.sort(1)[0],
        lambda t: t @ t.mT,
        lambda t: torch.einsum("abc,adc->bd", t, t),
        lambda t: nn.functional.scaled_dot_product_attention(t, t, t),
        lambda t: t.cumsum(0),
    ],
    ids=range(10),
)
def test_no_rule_lets_an_axis_vary_along_a_mixed_axis(body: Any, order: tuple[int, ...]) -> None:
    # Each axis of a parameter may vary along those before it, so a rule can do most harm here.
    # If it permits too much, the self-check warns, which is an error in tests.
    derive_spec(Bare((4, 6, 5), lambda table: body(table.permute(order))), torch.ones(2, 3))


def test_a_convolution_mixes_its_channels() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mixed = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 6, 1)
            self.table = nn.Parameter(torch.randn(6, 4, 5))

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.stem(inputs)
            hidden = self.mixed(hidden) + hidden
            gains = torch.tanh(self.mixed(self.table.transpose(0, 1))).sum((0, 2))
            return hidden.mean((0, 2)).sum() + (gains * hidden.mean((0, 2))).sum()

    assert 6 in derive_spec(Residual(), torch.zeros(2, 3, 7)).groups.values()


@pytest.mark.parametrize("read", [Tensor.tolist, lambda x: x.numpy(), lambda x: int(x.item())])
def test_values_read_without_an_operator_count_as_used(read: Any) -> None:
    def between(hidden: Tensor) -> Tensor:
        return torch.relu(hidden) + float(read(hidden.mean(0).argmax()))

    spec = derive_spec(TwoLayers(between), INPUT)
    assert spec.groups == {}
    assert spec.pinned["first.weight[0]"] == "searched for an index"


def test_negative_padding_cuts_off_units() -> None:
    shifted = nn.Sequential(
        nn.Linear(4, 6), nn.ZeroPad2d((0, 0, 1, -1)), nn.ReLU(), nn.Linear(6, 3)
    )
    assert derive_spec(shifted, torch.zeros(2, 5, 4)).groups == {"0": 6}
    cut = nn.Sequential(nn.Linear(4, 6), nn.ConstantPad1d((-2, 1), 0.5), nn.Linear(5, 3))
    assert sorted(derive_spec(cut, INPUT).groups.values()) == [2, 4]  # Two units are cut off.


def test_a_buffer_with_equal_rows_leaves_units_free() -> None:
    class Splines(TwoLayers):
        def __init__(self) -> None:
            super().__init__(None)
            self.register_buffer("grid", torch.linspace(-1, 1, 4).expand(6, 4).clone())

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(inputs))[..., None] - self.grid
            return self.second((hidden**2).sum(-1))

    spec = derive_spec(Splines(), INPUT)
    assert spec.groups == {"first": 6}
    assert "grid[1]" in spec.pinned


def test_modes_that_use_other_weights_are_two_functions() -> None:
    # The operators and their order are the same; only the tensors differ.
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            first, second = (self.one, self.two) if self.training else (self.two, self.one)
            return self.head(torch.sigmoid(first(inputs)) * second(inputs))

    twin = Twin(Swapped(), INPUT)
    assert set(trace(twin).runs) == {False, True}
    assert set(trace(Twin(TwoLayers(), INPUT)).runs) == {False}


def test_the_rule_of_convolutions_pins_positions() -> None:
    # Hidden units become positions. The rule pins them: the self-check would have warned.
    class Slid(TwoLayers):
        def __init__(self) -> None:
            super().__init__(None)
            self.slide = nn.Conv1d(1, 2, 3, padding=1)
            self.second = nn.Linear(12, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(self.slide(self.first(inputs)[:, None]).flatten(1))

    assert derive_spec(Slid(), INPUT).groups == {"slide": 2}


def test_a_model_that_fails_in_training_mode_is_traced_in_evaluation_mode() -> None:
    class Demanding(TwoLayers):
        def forward(self, inputs: Tensor, target: Tensor | None = None) -> Tensor:
            if self.training and target is None:
                raise ValueError("no target")
            return super().forward(inputs)

    with pytest.warns(UserWarning, match=r"evaluation mode only.*no target"):
        assert derive_spec(Demanding(torch.relu), INPUT).groups == {"first": 6}


def test_a_chain_of_300_blocks_is_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 6), *(Residual() for _ in range(300)), nn.Linear(6, 3))
    assert derive_spec(model, INPUT).groups["0"] == 6


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 2)
        self.back = nn.Linear(2, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + 0.01 * self.back(torch.tanh(self.inside(inputs)))
