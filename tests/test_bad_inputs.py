"""Whatever is given to `derive_spec`: a right spec, or a `SpecError` in one line."""

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fl_rebasin import PermutationSpec, SpecError, derive_spec

Groups = dict[str, int]

FREE = {"first": 6}


class Plain(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Any = torch.relu) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)
        self.between = between

    def forward(self, inputs: Tensor) -> Any:
        return self.second(self.between(self.first(inputs)))


INPUT = torch.ones(2, 4)


def held(tensor: Tensor) -> Any:
    """What a tensor holds, so that it can be compared with `==`."""
    dense = tensor.detach()
    if dense.is_meta:
        return tuple(dense.shape), dense.dtype
    if dense.is_quantized:
        dense = dense.dequantize()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    if dense.itemsize == 1:
        dense = dense.float()
    if dense.dtype == torch.bfloat16:
        dense = dense.double()
    return tuple(dense.shape), tensor.dtype, dense.cpu().numpy().tobytes()


def picture(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Everything that a derivation must leave as it is."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(name, tensor) for name, tensor in tensors if not nn.parameter.is_lazy(tensor)]
    state = np.random.get_state()
    return {
        "objects": [(name, id(tensor)) for name, tensor in tensors],
        "values": [(name, held(tensor)) for name, tensor in tensors],
        "gradients": [
            (name, None if tensor.grad is None else held(tensor.grad)) for name, tensor in tensors
        ],
        "frozen": [(name, tensor.requires_grad) for name, tensor in tensors],
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "torch": held(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": (state[0], state[1].tobytes(), *state[2:]),
        "inputs": [held(x) if isinstance(x, Tensor) else x for x in tree_leaves(inputs)],
        "gradient mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


@contextmanager
def unchanged(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Whatever happens, the model, the inputs and all generators are left alone."""
    for number, module in enumerate(model.modules()):
        module.training = bool(number % 2)
    before = picture(model, inputs)
    try:
        yield
    finally:
        after = picture(model, inputs)
        for part, value in before.items():
            assert after[part] == value, part


def spec_of(model: nn.Module, inputs: Any = INPUT) -> PermutationSpec:
    with unchanged(model, inputs):
        return derive_spec(model, inputs)


def assert_refused(model: nn.Module, inputs: Any, words: str) -> SpecError:
    with unchanged(model, inputs), pytest.raises(SpecError, match=words) as caught:
        derive_spec(model, inputs)
    assert "\n" not in str(caught.value)
    return caught.value


def forward_of(forward: Callable[[Any, Tensor], Any], **attributes: Any) -> nn.Module:
    """A plain model with a forward pass of its own."""
    model = type("Own", (Plain,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


# What the model is called with.


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ([INPUT], "list"),
        (None, "NoneType"),
        (np.ones((2, 4)), "ndarray"),
        ("inputs", "str"),
        ({1, 2}, "set"),
        (nn.ReLU(), "ReLU"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_of_another_kind_are_refused(inputs: Any, kind: str) -> None:
    with pytest.raises(
        SpecError,
        match=f"^example_inputs is a {kind}: give a tensor, a tuple of positional arguments or a "
        "dict of keyword arguments$",
    ):
        derive_spec(Plain(), inputs)


class Picky(Plain):
    """Wants an index by position, and a gain by name."""

    def forward(self, inputs: Tensor, index: Tensor, *, gain: Tensor) -> Tensor:
        return super().forward(inputs * gain)[index]


INDEX = torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("build", "inputs", "words"),
    [
        (Plain, torch.ones(2, 5), r"\(2, 5\) float32 on cpu: .*2x5 and 4x6"),
        (Plain, torch.tensor(1.0), r"\(\) float32 on cpu: .*at least 1D"),
        (Plain, torch.ones(2, 4, dtype=torch.int64), r"\(2, 4\) int64 on cpu: .*dtype.*Long"),
        (Plain, torch.ones(2, 4, dtype=torch.bool), r"\(2, 4\) bool on cpu: .*dtype.*Bool"),
        (Plain, INPUT.to(torch.complex64), r"\(2, 4\) complex64 on cpu: .*dtype.*Complex"),
        (
            lambda: nn.Conv2d(3, 4, 3),
            torch.ones(1, 3, 8, 8, dtype=torch.int64),
            r"\(1, 3, 8, 8\) int64 on cpu: RuntimeError: Input type \(long int\)",
        ),
        (lambda: nn.Conv2d(3, 4, 3), torch.ones(1, 4, 8, 8), "to have 3 channels, but got 4"),
        (lambda: nn.Embedding(3, 4), torch.ones(2, 3), r"\(2, 3\) float32 on cpu: .*Long, Int"),
        (lambda: nn.Embedding(3, 4), torch.full((2, 3), 7), r"int64 on cpu: .*out of range"),
        (Plain, (), r"missing 1 required positional argument: 'inputs'"),
        (Plain, (INPUT, INPUT), "takes 2 positional arguments but 3 were given"),
        (Plain, {"x": INPUT}, r"\{'x': '\(2, 4\).*unexpected keyword argument 'x'"),
        (Plain, {"inputs": INPUT, "mask": None}, "unexpected keyword argument 'mask'"),
        (Plain, {0: INPUT}, "keywords must be strings"),
        (Plain, ([INPUT],), "must be Tensor, not list"),
        (Plain, ({"inputs": INPUT},), "must be Tensor, not dict"),
        (Picky, INPUT, "missing 1 required positional argument: 'index'"),
        (Picky, (INPUT, INDEX), "missing 1 required keyword-only argument: 'gain'"),
        (Picky, (INPUT, INDEX, INPUT), "takes 3 positional arguments but 4 "),
        (
            Picky,
            {"inputs": INDEX, "index": INPUT, "gain": torch.ones(2, dtype=torch.int64)},
            r"'inputs': '\(2,\) int64 on cpu', 'index': '\(2, 4\) float32 on cpu'",
        ),
        (lambda: nn.ModuleList([nn.Linear(4, 3)]), INPUT, 'missing the required "forward"'),
    ],
    ids=range(21),
)
def test_inputs_that_do_not_fit_are_told_with_shape_dtype_and_device(
    build: Callable[[], nn.Module], inputs: Any, words: str
) -> None:
    assert_refused(build(), inputs, f"^the model cannot be run on the example inputs .*{words}")


@pytest.mark.parametrize(
    "inputs",
    [
        INPUT,
        (INPUT,),
        {"inputs": INPUT},
        INPUT.half(),
        INPUT.double(),
        INPUT.bfloat16(),
        INPUT.clone().requires_grad_(),
        INPUT.clone().requires_grad_() * 2,
        nn.Parameter(INPUT.clone()),
        torch.ones(1, 4).expand(3, 4),
        torch.ones(4, 2).T,
        torch.full((2, 4), float("nan")),
    ],
    ids=range(12),
)
def test_inputs_that_fit_do_whatever_their_dtype_and_layout(inputs: Any) -> None:
    assert spec_of(Plain(), inputs).groups == FREE


def test_arguments_can_be_given_by_name() -> None:
    inputs = {"inputs": INPUT, "index": INDEX, "gain": torch.ones(4)}
    assert spec_of(Picky(), inputs).groups == FREE


def test_an_empty_batch_asks_for_more() -> None:
    assert_refused(Plain(), torch.ones(0, 4), "returns only empty tensors: give example inputs that are not")


def test_inputs_that_the_model_changes_stay_the_callers() -> None:
    def forward(self: Any, bag: dict[str, Any]) -> Tensor:
        bag["count"].add_(1)
        bag["inputs"].mul_(2)
        bag["seen"] = True
        return Plain.forward(self, bag.pop("inputs"))

    bag = {"inputs": INPUT.clone(), "count": torch.zeros(1, dtype=torch.int64)}
    assert spec_of(forward_of(forward), (bag,)).groups == FREE
    assert list(bag) == ["inputs", "count"]


# What the model holds.


def with_parameter(**tensors: Tensor) -> nn.Module:
    model = Plain()
    for name, tensor in tensors.items():
        setattr(model, name, nn.Parameter(tensor, requires_grad=False))
    return model


def with_buffer(persistent: bool = True, **tensors: Tensor) -> nn.Module:
    model = Plain()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor, persistent=persistent)
    return model


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"0\.weight is not initialised: run the lazy"),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d()),
            r"1\.weight is not initialised: run the lazy",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d(affine=False)),
            r"1\.running_mean is not initialised: run the lazy",
        ),
        (lambda: with_parameter(odd=torch.eye(3).to_sparse()), "odd is sparse: pass it as an input"),
        (lambda: with_buffer(odd=torch.eye(3).to_sparse()), "odd is sparse: .*persistent=False"),
        (lambda: with_parameter(odd=torch.zeros(2) * 1j), "odd is complex: only real"),
        (lambda: with_buffer(odd=torch.zeros(2) * 1j), "odd is complex: only real"),
        (lambda: with_buffer(odd=quantised()), "odd is quantised: give the model as it was before"),
    ],
    ids=range(8),
)
def test_tensors_without_a_place_in_an_average_are_refused(
    build: Callable[[], nn.Module], words: str
) -> None:
    assert_refused(build(), INPUT, words)


def test_a_lazy_model_that_has_run_has_a_spec() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3))
    model(INPUT)
    assert spec_of(model).groups == {"0": 6}


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_sparse_csr], ids=["coo", "csr"])
def test_a_sparse_buffer_beside_the_state_mixes_rows(make: Callable[[Tensor], Tensor]) -> None:
    # A graph's adjacency: it mixes the nodes, which are the batch here, and no units.
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return self.second(torch.sparse.mm(self.graph, self.first(inputs)).relu())

    model = forward_of(forward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = make(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    model.register_buffer("graph", graph, persistent=False)
    spec = spec_of(model)
    assert spec.groups == FREE
    assert "graph" not in spec.axes


def test_a_complex_buffer_beside_the_state_is_a_constant() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return self.second(torch.view_as_real(self.first(inputs) * self.phase)[..., 0])

    model = forward_of(forward)
    model.register_buffer("phase", torch.tensor(1 + 2j), persistent=False)
    assert set(spec_of(model).groups.values()) <= {6}


@pytest.mark.parametrize(
    ("build", "inputs", "groups"),
    [
        (lambda: Plain().requires_grad_(False), INPUT, FREE),
        (nn.ReLU, INPUT, {}),
        (nn.Identity, INPUT, {}),
        (lambda: Plain().half(), INPUT.half(), FREE),
        (lambda: Plain().bfloat16(), INPUT.bfloat16(), FREE),
        (lambda: Plain().bfloat16(), INPUT, FREE),
        (lambda: nn.DataParallel(Plain()), INPUT, {"module.first": 6}),
        (lambda: torch.fx.symbolic_trace(nn.Sequential(Plain(), nn.Tanh())), INPUT, {"0.first": 6}),
        (lambda: with_buffer(steps=torch.tensor(2**63 - 1)), INPUT, FREE),
        (lambda: with_buffer(steps=torch.tensor([-(2**63), 2**62])), INPUT, FREE),
        (lambda: with_buffer(steps=torch.tensor([3], dtype=torch.uint64)), INPUT, FREE),
        (lambda: with_buffer(flags=torch.tensor([True, False])), INPUT, FREE),
    ],
    ids=range(12),
)
def test_models_of_many_kinds_have_their_spec(
    build: Callable[[], nn.Module], inputs: Any, groups: Groups
) -> None:
    model = build()
    spec = spec_of(model, inputs)
    assert spec.groups == groups
    spec.check(model.state_dict())


def test_scalars_have_nothing_to_move() -> None:
    class Scalars(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.shift = nn.Parameter(torch.tensor(1.0))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * self.scale + self.shift

    spec = spec_of(Scalars())
    assert (spec.groups, spec.axes) == ({}, {"scale": (), "shift": ()})
    assert spec.learnable == ("scale", "shift")
    assert spec.freedom == 0.0


def test_tied_parameters_are_one() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[2].bias = model[0].bias
    spec = spec_of(model)
    # The bias ties the units of the first two layers.
    assert spec.groups == {"0": 6}
    assert spec.axes["0.bias"] == spec.axes["2.bias"] == spec.axes["2.weight"][:1]
    assert spec.axes["2.weight"][0] == spec.axes["2.weight"][1]
    assert "2.bias" not in spec.learnable


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
    ],
    ids=range(2),
)
def test_a_meta_model_has_the_spec_of_the_real_one(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        empty = build()
    assert all(parameter.is_meta for parameter in empty.parameters())
    spec = spec_of(empty)
    assert spec == spec_of(build())
    assert spec.groups == {"0": 6}


# What the forward pass does.


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
    return Plain.forward(self, inputs).detach()


def gradient_penalty(self: Any, inputs: Tensor) -> Tensor:
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        outputs = Plain.forward(self, inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return (outputs + slope.pow(2).sum()).detach()


def backward_on_the_way(self: Any, inputs: Tensor) -> Tensor:
    self.zero_grad()
    with torch.enable_grad():
        outputs = Plain.forward(self, inputs)
        outputs.sum().backward()
    return outputs.detach() * self.first.weight.grad.pow(2).sum()


def mapped(self: Any, inputs: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: Plain.forward(self, row))(inputs)


def mapped_slopes(self: Any, inputs: Tensor) -> Tensor:
    slopes = torch.func.vmap(torch.func.grad(lambda row: Plain.forward(self, row).sum()))(inputs)
    return Plain.forward(self, inputs) + slopes.pow(2).sum(1, keepdim=True)


def called_with_parameters(self: Any, inputs: Tensor) -> Tensor:
    return torch.func.functional_call(self.first, dict(self.first.named_parameters()), (inputs,))


def checkpointed(self: Any, inputs: Tensor) -> Tensor:
    return self.second(checkpoint(lambda x: self.first(x).relu(), inputs, use_reentrant=False))


def clamped(self: Any, inputs: Tensor) -> Tensor:
    self.first.weight.data.clamp_(-0.1, 0.1)
    return Plain.forward(self, inputs)


def clamped_in_place(self: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        self.first.weight.clamp_(-0.1, 0.1)
    return Plain.forward(self, inputs)


def normalised(self: Any, inputs: Tensor) -> Tensor:
    self.first.weight.data = F.normalize(self.first.weight.data, dim=1)
    return Plain.forward(self, inputs)


def mode_switched(self: Any, inputs: Tensor) -> Tensor:
    self.train(not self.training)
    return Plain.forward(self, inputs)


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


def chance_of_python(self: Any, inputs: Tensor) -> Tensor:
    return self.second(self.first(inputs) * random.random())


def chance_of_numpy(self: Any, inputs: Tensor) -> Tensor:
    return self.second(self.first(inputs) * float(np.random.rand()))


def chance_of_torch(self: Any, inputs: Tensor) -> Tensor:
    return self.second(self.first(inputs) * torch.rand(1))


def chance_of_an_own_seed(self: Any, inputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return self.second(self.first(inputs) * torch.rand(1, generator=generator))


def sparse_output(self: Any, inputs: Tensor) -> Tensor:
    return Plain.forward(self, inputs).to_sparse()


def flags(self: Any, inputs: Tensor) -> Any:
    return {"flags": Plain.forward(self, inputs) > 0, "words": ("yes", None, 3)}


def counted(self: Any, inputs: Tensor) -> Tensor:
    self.count = getattr(self, "count", 0) + 1
    return Plain.forward(self, inputs)


@pytest.mark.parametrize(
    "forward",
    [
        autocast,
        without_gradients,
        gradient_mode_changed,
        gradient_penalty,
        backward_on_the_way,
        mapped,
        mapped_slopes,
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
        chance_of_python,
        chance_of_numpy,
        chance_of_torch,
        chance_of_an_own_seed,
        sparse_output,
        flags,
        counted,
    ],
    ids=lambda forward: forward.__name__,
)
def test_what_treats_all_units_alike_leaves_them_free(forward: Any) -> None:
    assert spec_of(forward_of(forward)).groups == FREE


def unit_by_item(hidden: Tensor) -> Tensor:
    return hidden * hidden[0, 0].item()


def unit_in_a_branch(hidden: Tensor) -> Tensor:
    return hidden.relu() if hidden[0, 0] > 0 else hidden.tanh()


def units_as_a_list(hidden: Tensor) -> Tensor:
    return hidden * torch.tensor(hidden[0].tolist())


def units_by_chance(hidden: Tensor) -> Tensor:
    return hidden * torch.rand(6)


def number_of_a_unit(hidden: Tensor) -> Tensor:
    return hidden * hidden.argmax(1, keepdim=True)


def units_by_noise(hidden: Tensor) -> Tensor:
    return hidden + torch.randn_like(hidden)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (unit_by_item, "one position selected by index"),
        (unit_in_a_branch, "one position selected by index"),
        (units_as_a_list, "constant of the model"),
        (units_by_chance, "no rule for aten.rand"),
        (number_of_a_unit, "searched for an index"),
        (units_by_noise, "no rule for aten.randn_like"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_tells_units_apart_pins_them(between: Any, reason: str) -> None:
    spec = spec_of(Plain(between))
    assert spec.groups == {}
    assert spec.pinned["first.weight[0]"].startswith(reason)


def test_units_taken_out_of_sight_are_found_by_the_self_check() -> None:
    def unseen(hidden: Tensor) -> Tensor:
        return hidden * float(hidden.detach().numpy()[0, 0])

    with pytest.warns(UserWarning, match=r"the self-check pins the groups \['first'\]"):
        spec = spec_of(Plain(unseen))
    assert spec.groups == {}
    assert spec.pinned["first.weight[0]"] == "self-check"


def test_a_loop_can_take_its_length_from_an_input() -> None:
    def forward(self: Any, inputs: Tensor, steps: Any) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(int(steps)):
            hidden = torch.tanh(hidden)
        return self.second(hidden)

    assert spec_of(forward_of(forward), (INPUT, torch.tensor(3))).groups == FREE
    assert spec_of(forward_of(forward), {"inputs": INPUT, "steps": 3}).groups == FREE


counter = itertools.count(1)
GENERATOR = torch.Generator().manual_seed(1)
NUMPY = np.random.default_rng(1)


@pytest.mark.parametrize(
    "between",
    [
        lambda hidden: hidden * next(counter),
        lambda hidden: hidden * torch.rand(1, generator=GENERATOR),
        lambda hidden: hidden * float(NUMPY.random()),
        lambda hidden: hidden * float("nan"),
        lambda hidden: hidden / 0,
    ],
    ids=["count", "generator", "numpy", "nan", "infinite"],
)
def test_outputs_that_cannot_be_compared_with_themselves_are_told(between: Any) -> None:
    assert_refused(
        Plain(between),
        INPUT,
        "outputs are NaN, or differ between two equal runs: make its forward pass "
        "repeatable under torch.manual_seed and finite",
    )


def test_a_generator_of_the_models_own_is_told() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return Plain.forward(self, inputs) * torch.rand(1, generator=self.generator)

    model = forward_of(forward, generator=torch.Generator().manual_seed(1))
    before = model.generator.get_state()
    assert_refused(model, INPUT, "differ between two equal runs: make its forward pass repeatable")
    assert torch.equal(model.generator.get_state(), before)


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda out: out.numpy(), "returns a ndarray, which cannot be compared: wrap the module"),
        (lambda out: float(out.sum()), "returns a float, which cannot be compared"),
        (lambda out: torch.distributions.Normal(out, 1.0), "returns a Normal, which cannot be"),
        (lambda out: (row for row in out), "returns a generator, which cannot be"),
        (lambda out: {"all": [out, object()]}, "returns a object, which cannot be"),
        (lambda out: None, "returns no tensors"),
        (lambda out: [], "returns no tensors"),
        (lambda out: out[:, :0], "returns only empty tensors: give example inputs that are not empty"),
    ],
    ids=range(8),
)
def test_results_that_are_no_tensors_are_refused(wrap: Any, words: str) -> None:
    assert_refused(forward_of(lambda self, x: wrap(Plain.forward(self, x))), INPUT, words)


def test_a_model_that_ignores_its_parameters_says_so() -> None:
    with pytest.warns(UserWarning, match=r"4 parameters are not used.*first\.weight"):
        spec = spec_of(forward_of(lambda self, inputs: inputs))
    assert spec.groups == {}


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
def test_any_exception_of_the_forward_pass_is_told(error: Exception) -> None:
    def fail(hidden: Tensor) -> Tensor:
        raise error

    told = assert_refused(
        Plain(fail), INPUT, r"cannot be run on the example inputs \(2, 4\) float32 on cpu: "
    )
    assert str(error) in str(told)
    assert told.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_goes_through(error: type[BaseException]) -> None:
    def stop(hidden: Tensor) -> Tensor:
        raise error

    model = Plain(stop)
    with unchanged(model, INPUT), pytest.raises(error):
        derive_spec(model, INPUT)


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ({"__deepcopy__": lambda self, memo: 1 / 0}, "cannot be copied: division by zero"),
        ({"__reduce_ex__": lambda self, protocol: 1 / 0}, "cannot be copied: division by zero"),
    ],
    ids=["deepcopy", "reduce"],
)
def test_a_model_that_cannot_be_copied_is_told(attribute: dict[str, Any], words: str) -> None:
    assert_refused(type("Single", (Plain,), attribute)(), INPUT, words)


class Remembering(Plain):
    """Keeps a tensor in a buffer."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(size))


def test_a_buffer_updated_in_place_moves_with_its_units() -> None:
    class Updating(Remembering):
        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs)
            self.last.mul_(0.9).add_(hidden.mean(0))
            return self.second(hidden - self.last)

    spec = spec_of(Updating())
    assert list(spec.groups.values()) == [6]
    assert spec.axes["last"] == spec.axes["first.bias"] == spec.axes["second.weight"][1:]


def test_a_buffer_that_forward_replaces_moves_with_its_units() -> None:
    class Replacing(Remembering):
        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs) + self.last
            self.last = hidden.mean(0)
            return self.second(hidden)

    spec = spec_of(Replacing())
    assert list(spec.groups.values()) == [6]
    assert spec.axes["last"] == spec.axes["first.bias"] == spec.axes["second.weight"][1:]


def test_a_buffer_replaced_by_one_of_another_shape_stays() -> None:
    class Reshaping(Remembering):
        def forward(self, inputs: Tensor) -> Tensor:
            self.last = inputs.mean(0)
            return super().forward(inputs)

    spec = spec_of(Reshaping(size=2))
    assert spec.groups == FREE
    assert spec.pinned["last[0]"] == "a buffer whose shape changes"


def test_hooks_take_part() -> None:
    model = Plain()
    model.first.register_forward_hook(lambda module, inputs, out: out.cumsum(1))
    assert spec_of(model).groups == {}
    model = Plain()
    model.first.register_forward_hook(lambda module, inputs, out: out.tanh())
    model.second.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    model.second.register_full_backward_hook(lambda *_: None)
    assert spec_of(model).groups == FREE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_have_the_spec_of_what_was_compiled() -> None:
    compiled = torch.compile(Plain(), backend="eager")
    spec = derive_spec(compiled, INPUT)
    assert spec.groups == {"_orig_mod.first": 6}
    spec.check(compiled.state_dict())
    model = Plain()
    model.compile(backend="eager")
    assert derive_spec(model, INPUT).groups == FREE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_exported_model_has_its_spec() -> None:
    model = torch.export.export(Plain(), (INPUT,)).module()
    spec = derive_spec(model, INPUT)
    assert spec.groups == FREE
    spec.check(model.state_dict())


def test_a_training_goes_on_as_if_nothing_had_been_derived() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))
    other = copy.deepcopy(model)
    ends = []
    for trained, derives in ((model, True), (other, False)):
        torch.manual_seed(3)
        optimizer = torch.optim.Adam(trained.parameters(), lr=0.1)
        for _ in range(3):
            trained(torch.randn(5, 4)).pow(2).sum().backward()
            if derives:
                assert derive_spec(trained, INPUT).groups == {"0": 6}
            optimizer.step()
        ends.append({key: held(value) for key, value in trained.state_dict().items()})
    assert ends[0] == ends[1]


def test_what_is_no_module_is_refused() -> None:
    for wrong in (lambda x: x, Plain().state_dict()):
        with pytest.raises(SpecError, match=r"model is a \w+: give a torch\.nn\.Module"):
            derive_spec(wrong, INPUT)  # type: ignore[arg-type]


def test_a_meta_model_with_counters_has_a_spec() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    assert derive_spec(model, INPUT).groups == {"0": 6}


def test_inputs_without_values_are_refused() -> None:
    assert_refused(Plain(), INPUT.to("meta"), "on meta have no values: give inputs on the model")


def test_a_failure_under_permuted_weights_is_pinned_and_named() -> None:
    start = {}

    def forward(self: Any, inputs: Tensor) -> Tensor:
        weight = self.first.weight.detach().numpy()
        if not np.array_equal(start.setdefault("weight", weight.copy()), weight):
            raise KeyError("late")
        return Plain.forward(self, inputs)

    with pytest.warns(UserWarning, match=r"self-check pins the groups \['first'\]"):
        assert derive_spec(forward_of(forward), INPUT).groups == {}


def test_a_buffer_that_is_only_written_moves_with_its_units() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        self.last = hidden.mean(0)
        return self.second(hidden)

    model = forward_of(forward)
    model.register_buffer("last", torch.zeros(6))
    spec = spec_of(model)
    assert spec.groups == {"first": 6}
    assert "last[0]" not in spec.pinned


def test_inputs_that_are_not_all_equal_choose_the_path() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.log()) if bool((inputs > 0).all()) else inputs.new_zeros(2, 6)
        return self.second(hidden)

    positive = torch.rand(2, 4) + 0.5
    assert spec_of(forward_of(forward), positive).groups == {"first": 6}


def test_a_function_that_refers_to_the_model_is_told_and_the_model_kept() -> None:
    model = Plain()
    norm = nn.BatchNorm1d(6)
    model.norm = norm
    model.between = lambda hidden: norm(hidden.float()).double()
    words = r"changes the model's own \['norm\.num_batches_tracked'.*use submodules as attributes"
    assert_refused(model, INPUT, words)


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, torch.enable_grad, lambda: torch.device("meta")],
)
def test_the_callers_context_does_not_matter(context: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with context():
        assert derive_spec(model, INPUT).groups == {"0": 6}


def test_outputs_that_want_gradients_are_compared_quietly() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            return Plain.forward(self, inputs)

    assert spec_of(forward_of(forward)).groups == {"first": 6}


def test_operators_that_arrive_whole_are_taken_apart() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return Plain.forward(self, inputs)

    assert spec_of(forward_of(forward)).groups == {"first": 6}


def test_forces_take_gradients_in_forward() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        places = inputs.detach().requires_grad_()
        energy = self.second(torch.tanh(self.first(places))).sum()
        return torch.autograd.grad(energy, places)[0]

    # The scores are added up, so they may change places as well.
    assert spec_of(forward_of(forward)).groups == {"first": 6, "second": 3}


def test_scripts_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(nn.Linear(4, 3), INPUT)
    with pytest.raises(SpecError, match=r"the model is a script: give the module as it was before"):
        derive_spec(script, INPUT)


def test_what_counts_nothing_is_no_group() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 0), nn.Linear(0, 3))
        assert derive_spec(empty, INPUT).groups == {"0": 6}

    def forward(self: Any, inputs: Tensor) -> Tensor:
        self.steps += 1
        return Plain.forward(self, inputs)

    model = forward_of(forward)
    model.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
    spec = spec_of(model)
    assert spec.groups == {"first": 6}
    assert spec.pinned["steps[0]"] == "only in buffers"


def test_what_forward_keeps_on_its_modules_is_given_back_between_runs() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.cache.mul_(2)
        self.seen = inputs
        return Plain.forward(self, inputs) * self.calls + self.cache.sum()

    model = forward_of(forward, calls=0)
    model.register_buffer("cache", torch.ones(2), persistent=False)
    assert spec_of(model).groups == {"first": 6}


def test_a_state_that_grows_in_forward_is_told() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        self.last = inputs.mean(0)
        return Plain.forward(self, inputs)

    model = forward_of(forward)
    model.register_buffer("last", None)
    assert_refused(model, INPUT, r"keys of the state dict change when the model runs \(\['last'\]")
