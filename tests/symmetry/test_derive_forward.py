"""Forward passes of any kind: `derive_spec` returns the right spec or raises `SpecError`."""

import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from derivation import (
    FREE,
    INPUT,
    TwoLayers,
    assert_refused,
    spec_unchanged,
    unchanged,
    with_forward,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fl_rebasin import derive_spec


def autocast(self: Any, inputs: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = self.first(inputs)
    return self.second(hidden.float().relu())


def without_gradients(self: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = self.first(inputs)
    return self.second(hidden.relu())


def gradient_mode_changed(self: Any, inputs: Tensor) -> Tensor:
    torch.set_grad_enabled(True)
    return TwoLayers.forward(self, inputs).detach()


def gradient_penalty(self: Any, inputs: Tensor) -> Tensor:
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        outputs = TwoLayers.forward(self, inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return (outputs + slope.pow(2).sum()).detach()


def backward_inside(self: Any, inputs: Tensor) -> Tensor:
    self.zero_grad()
    with torch.enable_grad():
        outputs = TwoLayers.forward(self, inputs)
        outputs.sum().backward()
    return outputs.detach() * self.first.weight.grad.pow(2).sum()


def mapped(self: Any, inputs: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: TwoLayers.forward(self, row))(inputs)


def mapped_slopes(self: Any, inputs: Tensor) -> Tensor:
    slopes = torch.func.vmap(torch.func.grad(lambda row: TwoLayers.forward(self, row).sum()))(
        inputs
    )
    return TwoLayers.forward(self, inputs) + slopes.pow(2).sum(1, keepdim=True)


def called_with_parameters(self: Any, inputs: Tensor) -> Tensor:
    hidden = torch.func.functional_call(self.first, dict(self.first.named_parameters()), (inputs,))
    return self.second(hidden)


def checkpointed(self: Any, inputs: Tensor) -> Tensor:
    return self.second(checkpoint(lambda x: self.first(x).relu(), inputs, use_reentrant=False))


def clamped(self: Any, inputs: Tensor) -> Tensor:
    self.first.weight.data.clamp_(-0.1, 0.1)
    return TwoLayers.forward(self, inputs)


def clamped_in_place(self: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        self.first.weight.clamp_(-0.1, 0.1)
    return TwoLayers.forward(self, inputs)


def normalised(self: Any, inputs: Tensor) -> Tensor:
    self.first.weight.data = F.normalize(self.first.weight.data, dim=1)
    return TwoLayers.forward(self, inputs)


def mode_switched(self: Any, inputs: Tensor) -> Tensor:
    self.train(not self.training)
    return TwoLayers.forward(self, inputs)


def branch_on_sum(self: Any, inputs: Tensor) -> Tensor:
    hidden = self.first(inputs)
    return self.second(hidden.relu() if hidden.sum() > 0 else hidden.tanh())


def scaled_by_item(self: Any, inputs: Tensor) -> Tensor:
    hidden = self.first(inputs)
    return self.second(hidden * hidden.sum().item())


def half_inside(self: Any, inputs: Tensor) -> Tensor:
    return self.second(self.first(inputs).half().softmax(1).float())


def bfloat16_inside(self: Any, inputs: Tensor) -> Tensor:
    return self.second(self.first(inputs).to(torch.bfloat16).softmax(1).type_as(inputs))


def typed_by_name(self: Any, inputs: Tensor) -> Tensor:
    return self.second(self.first(inputs).type("torch.HalfTensor").relu().type(inputs.dtype))


def lowest_of_dtype(self: Any, inputs: Tensor) -> Tensor:
    hidden = self.first(inputs)
    return self.second(hidden.masked_fill(hidden > 0, torch.finfo(hidden.dtype).min).softmax(1))


def random_of_python(self: Any, inputs: Tensor) -> Tensor:
    return self.second(self.first(inputs) * random.random())


def random_of_numpy(self: Any, inputs: Tensor) -> Tensor:
    return self.second(self.first(inputs) * float(np.random.rand()))


def random_of_torch(self: Any, inputs: Tensor) -> Tensor:
    return self.second(self.first(inputs) * torch.rand(1))


def random_with_own_seed(self: Any, inputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return self.second(self.first(inputs) * torch.rand(1, generator=generator))


def sparse_output(self: Any, inputs: Tensor) -> Tensor:
    return TwoLayers.forward(self, inputs).to_sparse()


def flags(self: Any, inputs: Tensor) -> Any:
    return {"flags": TwoLayers.forward(self, inputs) > 0, "words": ("yes", None, 3)}


def counted(self: Any, inputs: Tensor) -> Tensor:
    self.count = getattr(self, "count", 0) + 1
    return TwoLayers.forward(self, inputs)


@pytest.mark.parametrize(
    "forward",
    [
        autocast,
        without_gradients,
        gradient_mode_changed,
        gradient_penalty,
        backward_inside,
        mapped,
        mapped_slopes,
        called_with_parameters,
        checkpointed,
        clamped,
        clamped_in_place,
        normalised,
        mode_switched,
        branch_on_sum,
        scaled_by_item,
        half_inside,
        bfloat16_inside,
        typed_by_name,
        lowest_of_dtype,
        random_of_python,
        random_of_numpy,
        random_of_torch,
        random_with_own_seed,
        sparse_output,
        flags,
        counted,
    ],
    ids=lambda forward: forward.__name__,
)
def test_operations_that_treat_all_units_equally_leave_them_free(forward: Any) -> None:
    assert spec_unchanged(with_forward(forward)).groups == FREE


def unit_by_item(hidden: Tensor) -> Tensor:
    return hidden * hidden[0, 0].item()


def unit_in_a_branch(hidden: Tensor) -> Tensor:
    return hidden.relu() if hidden[0, 0] > 0 else hidden.tanh()


def units_as_a_list(hidden: Tensor) -> Tensor:
    return hidden * torch.tensor(hidden[0].tolist())


def units_times_random(hidden: Tensor) -> Tensor:
    return hidden * torch.rand(6)


def index_of_a_unit(hidden: Tensor) -> Tensor:
    return hidden * hidden.argmax(1, keepdim=True)


def units_plus_noise(hidden: Tensor) -> Tensor:
    return hidden + torch.randn_like(hidden)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (unit_by_item, "one position selected by index"),
        (unit_in_a_branch, "one position selected by index"),
        (units_as_a_list, "constant of the model"),
        (units_times_random, "no rule for aten.rand"),
        (index_of_a_unit, "searched for an index"),
        (units_plus_noise, "no rule for aten.randn_like"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_operations_that_single_out_a_unit_pin_all_units(between: Any, reason: str) -> None:
    spec = spec_unchanged(TwoLayers(between))
    assert spec.groups == {}
    assert spec.pinned["first.weight[0]"].startswith(reason)


def test_the_self_check_catches_what_the_tracer_cannot_see() -> None:
    def unseen(hidden: Tensor) -> Tensor:
        return hidden * float(hidden.detach().numpy()[0, 0])

    with pytest.warns(UserWarning, match=r"the self-check pins the groups \['first'\]"):
        spec = spec_unchanged(TwoLayers(unseen))
    assert spec.groups == {}
    assert spec.pinned["first.weight[0]"] == "self-check"


COUNTER = itertools.count(1)
GENERATOR = torch.Generator().manual_seed(1)
NUMPY = np.random.default_rng(1)


@pytest.mark.parametrize(
    "between",
    [
        lambda hidden: hidden * next(COUNTER),
        lambda hidden: hidden * torch.rand(1, generator=GENERATOR),
        lambda hidden: hidden * float(NUMPY.random()),
        lambda hidden: hidden * float("nan"),
        lambda hidden: hidden / 0,
    ],
    ids=["count", "generator", "numpy", "nan", "infinite"],
)
def test_outputs_that_are_not_repeatable_are_refused(between: Any) -> None:
    assert_refused(
        TwoLayers(between),
        INPUT,
        "outputs are NaN, or differ between two equal runs: make its forward pass "
        "repeatable under torch.manual_seed and finite",
    )


def test_a_model_with_its_own_generator_is_refused() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return TwoLayers.forward(self, inputs) * torch.rand(1, generator=self.generator)

    model = with_forward(forward, generator=torch.Generator().manual_seed(1))
    before = model.generator.get_state()
    assert_refused(model, INPUT, "differ between two equal runs: make its forward pass repeatable")
    assert torch.equal(model.generator.get_state(), before)


@dataclass
class Boxed:
    logits: Tensor


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda out: out.numpy(), "returns a ndarray, which cannot be compared: wrap the module"),
        (lambda out: float(out.sum()), "returns a float, which cannot be compared"),
        (lambda out: torch.distributions.Normal(out, 1.0), "returns a Normal, which cannot be"),
        (lambda out: (row for row in out), "returns a generator, which cannot be"),
        (lambda out: {"all": [out, object()]}, "returns a object, which cannot be"),
        (Boxed, "returns a Boxed, which cannot be compared"),
        (lambda out: None, "returns no tensors"),
        (lambda out: [], "returns no tensors"),
        (
            lambda out: out[:, :0],
            "returns only empty tensors: give example inputs that are not empty",
        ),
    ],
    ids=range(9),
)
def test_outputs_without_tensors_are_refused(wrap: Any, words: str) -> None:
    assert_refused(with_forward(lambda self, x: wrap(TwoLayers.forward(self, x))), INPUT, words)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("gone"),
        AssertionError("four inputs"),
        NotImplementedError("not yet"),
        StopIteration("the end"),
        OSError(2, "no file"),
        ZeroDivisionError("by zero"),
        RecursionError("too deep"),
        MemoryError("too large"),
        torch.OutOfMemoryError("too large"),
        type("Own", (Exception,), {})("of the model's own"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_quotes_the_exception_of_the_forward_pass(error: Exception) -> None:
    def fail(hidden: Tensor) -> Tensor:
        raise error

    caught = assert_refused(
        TwoLayers(fail), INPUT, r"cannot be run on the example inputs \(2, 4\) float32 on cpu: "
    )
    assert str(error) in str(caught)
    assert caught.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_through(error: type[BaseException]) -> None:
    def stop(hidden: Tensor) -> Tensor:
        raise error

    model = TwoLayers(stop)
    with unchanged(model, INPUT), pytest.raises(error):
        derive_spec(model, INPUT)


def test_a_forward_pass_that_fails_on_permuted_weights_pins_the_group() -> None:
    start = {}

    def forward(self: Any, inputs: Tensor) -> Tensor:
        weight = self.first.weight.detach().numpy()
        if not np.array_equal(start.setdefault("weight", weight.copy()), weight):
            raise KeyError("late")
        return TwoLayers.forward(self, inputs)

    with pytest.warns(UserWarning, match=r"self-check pins the groups \['first'\]"):
        assert derive_spec(with_forward(forward), INPUT).groups == {}


def test_outputs_may_require_gradients() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            return TwoLayers.forward(self, inputs)

    assert spec_unchanged(with_forward(forward)).groups == {"first": 6}


def test_composite_operators_are_decomposed_in_inference_mode() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return TwoLayers.forward(self, inputs)

    assert spec_unchanged(with_forward(forward)).groups == {"first": 6}


def test_forward_may_compute_forces_as_gradients() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        places = inputs.detach().requires_grad_()
        energy = self.second(torch.tanh(self.first(places))).sum()
        return torch.autograd.grad(energy, places)[0]

    # The scores are summed, so they may be permuted as well.
    assert spec_unchanged(with_forward(forward)).groups == {"first": 6, "second": 3}


def test_module_attributes_are_restored_between_runs() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.cache.mul_(2)
        self.seen = inputs
        return TwoLayers.forward(self, inputs) * self.calls + self.cache.sum()

    model = with_forward(forward, calls=0)
    model.register_buffer("cache", torch.ones(2), persistent=False)
    assert spec_unchanged(model).groups == {"first": 6}
