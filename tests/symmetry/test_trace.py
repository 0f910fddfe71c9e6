"""What a derivation opens, what it pins, and what it says about it."""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import assert_same, state_of
from torch import Tensor, nn
from torchvision.models import resnet18

from fl_rebasin import SpecError, derive_spec
from fl_rebasin.symmetry.rules import RULES
from fl_rebasin.symmetry.trace import trace
from fl_rebasin.symmetry.twin import Twin


class Module(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)
        self.between = between

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.between(self.first(inputs)))


INPUT = torch.zeros(2, 4)


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
def test_what_cannot_be_followed_pins_and_says_so(between: Any, reason: str) -> None:
    spec = derive_spec(Module(between), INPUT)
    assert spec.groups == {}
    assert spec.pinned["first.weight[0]"].startswith(reason)
    assert spec.pinned["second.weight[1]"].startswith(reason)


def test_order_of_two_axes_meets_and_is_pinned() -> None:
    # x and its transposed units are added: only permutations that fit both would do.
    spec = derive_spec(
        Module(lambda x: x + x.reshape(-1, 2, 3).transpose(1, 2).reshape(-1, 6)), INPUT
    )
    assert set(spec.groups.values()) <= {2, 3}


def test_a_wrong_rule_is_caught_by_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(trace: Any, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        trace.assign(out, trace.axes(args[0]))
        return True

    monkeypatch.setitem(RULES, "cumsum", wrong)
    with pytest.warns(UserWarning, match=r"self-check pins the groups \['first'\]"):
        spec = derive_spec(Module(lambda x: x.cumsum(1)), INPUT)
    assert spec.groups == {}
    assert spec.pinned["first.weight[0]"] == "self-check"


def test_a_wrong_buffer_is_caught_by_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    # The outputs in training mode would not notice; the running statistics do.
    right = RULES["native_batch_norm"]

    def wrong(trace: Any, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        return right(trace, func, (*args[:3], None, None, *args[5:]), kwargs, out)

    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert derive_spec(model, INPUT).groups == {"0": 6}
    monkeypatch.setitem(RULES, "native_batch_norm", wrong)
    with pytest.warns(UserWarning, match="self-check pins the groups"):
        assert "0" not in derive_spec(model, INPUT).groups


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))
    model[1].eval()
    before, modes = state_of(model), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    inputs = torch.ones(2, 4)
    derive_spec(model, inputs)
    assert_same(state_of(model), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(inputs, torch.ones(2, 4))


def test_unused_parameters_are_pinned() -> None:
    model = Module(torch.relu)
    model.spare = nn.Linear(6, 6)
    with pytest.warns(UserWarning, match=r"2 parameters are not used.*spare\.weight"):
        spec = derive_spec(model, INPUT)
    assert spec.groups == {"first": 6}
    assert spec.pinned["spare.weight[0]"] == "not used in the forward pass"


def test_a_layer_used_only_in_training_is_opened() -> None:
    class Auxiliary(Module):
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
    assert spec.groups == {}  # the weight's rows are outputs as well
    assert spec.learnable == ("0.weight", "0.bias", "2.bias")


def test_wrong_inputs_are_told_with_their_shape() -> None:
    with pytest.raises(SpecError, match=r"cannot be run on the example inputs \(2, 5\)"):
        derive_spec(Module(torch.relu), torch.zeros(2, 5))


def test_state_that_is_no_tensor_is_refused() -> None:
    class Extra(Module):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(SpecError, match="_extra_state in the state dict is a dict"):
        derive_spec(Extra(torch.relu), INPUT)


def test_a_batch_of_one_does_for_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    assert derive_spec(model, torch.zeros(1, 4)).groups == {"0": 6}


def test_a_real_architecture_keeps_its_function() -> None:
    model = resnet18(num_classes=10).eval()
    inputs = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    spec = derive_spec(model, inputs)
    assert spec.freedom > 0.99
    # One stream of units through each stage, and one inside each of the eight blocks.
    assert sorted(spec.groups.values()) == sorted([64, 128, 256, 512, *2 * [64, 128, 256, 512]])
    moved = copy.deepcopy(model)
    perm = spec.random(torch.Generator().manual_seed(0))
    moved.load_state_dict(spec.apply(perm, model.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(moved(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def test_describe_lists_groups_and_reasons() -> None:
    text = str(derive_spec(Module(torch.relu), INPUT))
    assert "first     6  first.weight[0], first.bias[0], second.weight[1]" in text
    assert "model output     2  second.weight[0], second.bias[0]" in text


@dataclass
class Boxed:
    logits: Tensor


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (Boxed, "returns a Boxed, which cannot be compared"),
        (lambda out: out.sum().item(), "returns a float, which cannot be compared"),
        (lambda out: out.numpy(), "returns a ndarray"),
        (lambda out: out[:0], "returns only empty tensors"),
        (lambda out: None, "returns no tensors"),
    ],
)
def test_an_output_that_cannot_be_compared_is_refused(wrap: Any, words: str) -> None:
    class Wrapped(Module):
        def forward(self, inputs: Tensor) -> Any:
            return wrap(super().forward(inputs))

    with pytest.raises(SpecError, match=words):
        derive_spec(Wrapped(torch.relu), INPUT)


@pytest.mark.parametrize("inputs", [[INPUT], 3, None])
def test_inputs_of_another_kind_are_refused(inputs: Any) -> None:
    with pytest.raises(SpecError, match=r"example_inputs is a .*: give a tensor, a tuple"):
        derive_spec(Module(torch.relu), inputs)


def test_lazy_and_complex_parameters_are_refused() -> None:
    with pytest.raises(SpecError, match=r"0\.weight is not initialised: run the lazy model"):
        derive_spec(nn.Sequential(nn.LazyLinear(3)), INPUT)
    model = Module(torch.relu)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(SpecError, match="phase is complex"):
        derive_spec(model, INPUT)


def test_a_model_that_does_not_repeat_is_named() -> None:
    count = itertools.count()
    with pytest.raises(SpecError, match="differ between two equal runs"):
        derive_spec(Module(lambda x: x * next(count)), INPUT)
    with pytest.raises(SpecError, match="outputs are NaN"):
        derive_spec(Module(lambda x: torch.sqrt(-x * x - 1)), INPUT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_any_dtype_have_a_spec(dtype: torch.dtype) -> None:
    model = Module(torch.relu).to(dtype)
    assert derive_spec(model, INPUT.to(dtype)).groups == {"first": 6}
    assert model.first.weight.dtype == dtype


def test_a_part_in_single_precision_costs_no_freedom() -> None:
    spec = derive_spec(Module(lambda x: x.to(torch.float32).softmax(1).to(x.dtype)), INPUT)
    assert spec.groups == {"first": 6}


def test_inputs_that_are_changed_in_place_stay_the_callers() -> None:
    class InPlace(Module):
        def forward(self, inputs: Tensor, index: Tensor) -> Tensor:
            index.add_(1)
            return super().forward(inputs.mul_(2)) * index

    inputs, index = torch.ones(2, 4), torch.zeros(1, dtype=torch.int64)
    assert derive_spec(InPlace(torch.relu), (inputs, index)).groups == {"first": 6}
    assert int(index) == 0
    assert torch.equal(inputs, torch.ones(2, 4))


def test_buffers_that_nothing_updates_are_constants_and_stay() -> None:
    # All clients hold the same: an average of differently permuted copies would not be it.
    class Masked(Module):
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


def test_positions_beyond_the_example_stay() -> None:
    class Placed(Module):
        def __init__(self) -> None:
            super().__init__(torch.relu)
            self.table = nn.Parameter(torch.randn(9, 6))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(self.first(inputs) + self.table[: inputs.shape[1]])

    spec = derive_spec(Placed(), torch.zeros(2, 5, 4))
    assert spec.groups == {"first": 6}
    assert "table[1]" not in spec.pinned
    assert "table[0]" in spec.pinned


def test_a_place_found_by_its_value_pins_only_if_it_is_used() -> None:
    values = derive_spec(Module(lambda x: x * x.max(1, keepdim=True).values), INPUT)
    assert values.groups == {"first": 6}
    places = derive_spec(Module(lambda x: x * x.max(1, keepdim=True).indices), INPUT)
    assert places.groups == {}
    assert places.pinned["first.bias[0]"] == "searched for an index"


def test_a_branch_behind_a_gain_of_zero_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gated(Module):
        def __init__(self) -> None:
            super().__init__(lambda x: x.cumsum(1))
            self.gain = nn.Parameter(torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs[:, :3] + self.gain * super().forward(inputs)

    def wrong(trace: Any, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        trace.assign(out, trace.axes(args[0]))
        return True

    monkeypatch.setitem(RULES, "cumsum", wrong)
    with pytest.warns(UserWarning, match=r"self-check pins the groups \['first'\]"):
        derive_spec(Gated(), INPUT)


def test_a_model_without_double_precision_is_checked_in_single() -> None:
    class Single(Module):
        def forward(self, inputs: Tensor) -> Tensor:
            if inputs.dtype == torch.float64:
                raise RuntimeError("\"fused\" not implemented for 'Double'")
            return super().forward(inputs)

    with pytest.warns(UserWarning, match="cannot run in float64.*tolerance of 1e-04"):
        spec = derive_spec(Single(torch.relu), INPUT)
    assert spec.groups == {"first": 6}


def test_only_the_guilty_group_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(trace: Any, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        trace.assign(out, trace.axes(args[0]))
        return True

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(9))

        def forward(self, inputs: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                inputs = torch.tanh(layer(inputs))
                inputs = inputs.cumsum(1) if number in (2, 5) else inputs
            return inputs

    monkeypatch.setitem(RULES, "cumsum", wrong)
    with pytest.warns(UserWarning, match=r"pins the groups \['layers.2', 'layers.5'\]"):
        spec = derive_spec(Deep(), torch.zeros(2, 5))
    assert list(spec.groups) == [f"layers.{number}" for number in (0, 1, 3, 4, 6, 7)]


class Bare(nn.Module):
    """A parameter that goes through one operator, and is summed up: all its axes could be free."""

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
def test_no_rule_lets_an_axis_vary_along_one_that_is_mixed(
    body: Any, order: tuple[int, ...]
) -> None:
    # The axes of a parameter may vary along those before it: the most that a rule can get wrong.
    # A rule that is too generous makes the self-check warn, which is an error here.
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
def test_a_number_that_is_read_without_an_operator_counts_as_used(read: Any) -> None:
    def between(hidden: Tensor) -> Tensor:
        return torch.relu(hidden) + float(read(hidden.mean(0).argmax()))

    spec = derive_spec(Module(between), INPUT)
    assert spec.groups == {}
    assert spec.pinned["first.weight[0]"] == "searched for an index"


def test_padding_by_a_negative_amount_cuts() -> None:
    shifted = nn.Sequential(
        nn.Linear(4, 6), nn.ZeroPad2d((0, 0, 1, -1)), nn.ReLU(), nn.Linear(6, 3)
    )
    assert derive_spec(shifted, torch.zeros(2, 5, 4)).groups == {"0": 6}
    cut = nn.Sequential(nn.Linear(4, 6), nn.ConstantPad1d((-2, 1), 0.5), nn.Linear(5, 3))
    assert sorted(derive_spec(cut, INPUT).groups.values()) == [2, 4]  # two go nowhere


def test_a_constant_that_is_the_same_for_all_units_lets_them_move() -> None:
    class Splines(Module):
        def __init__(self) -> None:
            super().__init__(None)
            self.register_buffer("grid", torch.linspace(-1, 1, 4).expand(6, 4).clone())

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(inputs))[..., None] - self.grid
            return self.second((hidden**2).sum(-1))

    spec = derive_spec(Splines(), INPUT)
    assert spec.groups == {"first": 6}
    assert "grid[1]" in spec.pinned


def test_two_modes_that_do_the_same_with_other_weights_are_two_functions() -> None:
    # The same operators in the same order: only the tensors differ.
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
    assert set(trace(Twin(Module(torch.relu), INPUT)).runs) == {False}


def test_positions_of_a_convolution_are_pinned_by_its_rule() -> None:
    # Hidden units that become positions of an image; no warning, so the self-check had no work.
    class Slid(Module):
        def __init__(self) -> None:
            super().__init__(None)
            self.slide = nn.Conv1d(1, 2, 3, padding=1)
            self.second = nn.Linear(12, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(self.slide(self.first(inputs)[:, None]).flatten(1))

    assert derive_spec(Slid(), INPUT).groups == {"slide": 2}


def test_a_model_that_cannot_be_trained_on_the_example_is_traced_as_evaluated() -> None:
    class Demanding(Module):
        def forward(self, inputs: Tensor, target: Tensor | None = None) -> Tensor:
            if self.training and target is None:
                raise ValueError("no target")
            return super().forward(inputs)

    with pytest.warns(UserWarning, match=r"evaluation mode only.*no target"):
        assert derive_spec(Demanding(torch.relu), INPUT).groups == {"first": 6}


def test_deep_chains_are_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 6), *(Residual() for _ in range(300)), nn.Linear(6, 3))
    assert derive_spec(model, INPUT).groups["0"] == 6


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 2)
        self.back = nn.Linear(2, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + 0.01 * self.back(torch.tanh(self.inside(inputs)))
