"""Models of any kind: `derive_spec` returns the right spec or raises `SpecError`."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from derivation import (
    FREE,
    INPUT,
    TwoLayers,
    assert_refused,
    bits,
    spec_unchanged,
    with_forward,
)
from torch import Tensor, nn

from fl_rebasin import SpecError, derive_spec

Groups = dict[str, int]


def with_parameter(**tensors: Tensor) -> nn.Module:
    model = TwoLayers()
    for name, tensor in tensors.items():
        setattr(model, name, nn.Parameter(tensor, requires_grad=False))
    return model


def with_buffer(persistent: bool = True, **tensors: Tensor) -> nn.Module:
    model = TwoLayers()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor, persistent=persistent)
    return model


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))


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
        (
            lambda: with_parameter(odd=torch.eye(3).to_sparse()),
            "odd is sparse: pass it as an input",
        ),
        (lambda: with_buffer(odd=torch.eye(3).to_sparse()), "odd is sparse: .*persistent=False"),
        (lambda: with_parameter(odd=torch.zeros(2) * 1j), "odd is complex: only real"),
        (lambda: with_buffer(odd=torch.zeros(2) * 1j), "odd is complex: only real"),
        (lambda: with_buffer(odd=quantised()), "odd is quantised: give the model as it was before"),
    ],
    ids=range(8),
)
def test_tensors_that_cannot_be_averaged_are_refused(
    build: Callable[[], nn.Module], words: str
) -> None:
    assert_refused(build(), INPUT, words)


def test_a_lazy_model_has_a_spec_after_its_first_run() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3))
    model(INPUT)
    assert spec_unchanged(model).groups == {"0": 6}


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_sparse_csr], ids=["coo", "csr"])
def test_a_sparse_matrix_outside_the_state_dict_leaves_units_free(
    make: Callable[[Tensor], Tensor],
) -> None:
    # The adjacency of a graph mixes nodes, which are the batch here, but no units.
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return self.second(torch.sparse.mm(self.graph, self.first(inputs)).relu())

    model = with_forward(forward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = make(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    model.register_buffer("graph", graph, persistent=False)
    spec = spec_unchanged(model)
    assert spec.groups == FREE
    assert "graph" not in spec.axes


def test_a_complex_buffer_outside_the_state_dict_is_accepted() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return self.second(torch.view_as_real(self.first(inputs) * self.phase)[..., 0])

    model = with_forward(forward)
    model.register_buffer("phase", torch.tensor(1 + 2j), persistent=False)
    assert set(spec_unchanged(model).groups.values()) <= {6}


@pytest.mark.parametrize(
    ("build", "inputs", "groups"),
    [
        (lambda: TwoLayers().requires_grad_(False), INPUT, FREE),
        (normalised, INPUT, {"0": 6}),
        (nn.ReLU, INPUT, {}),
        (nn.Identity, INPUT, {}),
        (lambda: TwoLayers().double(), INPUT.double(), FREE),
        (lambda: TwoLayers().half(), INPUT.half(), FREE),
        (lambda: TwoLayers().bfloat16(), INPUT.bfloat16(), FREE),
        (lambda: TwoLayers().bfloat16(), INPUT, FREE),
        (lambda: nn.DataParallel(TwoLayers()), INPUT, {"module.first": 6}),
        (
            lambda: torch.fx.symbolic_trace(nn.Sequential(TwoLayers(), nn.Tanh())),
            INPUT,
            {"0.first": 6},
        ),
        (lambda: with_buffer(steps=torch.tensor(2**63 - 1)), INPUT, FREE),
        (lambda: with_buffer(steps=torch.tensor([-(2**63), 2**62])), INPUT, FREE),
        (lambda: with_buffer(steps=torch.tensor([3], dtype=torch.uint64)), INPUT, FREE),
        (lambda: with_buffer(flags=torch.tensor([True, False])), INPUT, FREE),
    ],
    ids=range(14),
)
def test_models_of_many_kinds_have_a_spec(
    build: Callable[[], nn.Module], inputs: Any, groups: Groups
) -> None:
    model = build()
    spec = spec_unchanged(model, inputs)
    assert spec.groups == groups
    spec.check(model.state_dict())


def test_scalars_have_no_axes() -> None:
    class Scalars(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.shift = nn.Parameter(torch.tensor(1.0))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * self.scale + self.shift

    spec = spec_unchanged(Scalars())
    assert (spec.groups, spec.axes) == ({}, {"scale": (), "shift": ()})
    assert spec.learnable == ("scale", "shift")
    assert spec.freedom == 0.0


def test_a_tied_bias_ties_the_units_of_two_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[2].bias = model[0].bias
    spec = spec_unchanged(model)
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
def test_a_meta_model_has_the_spec_of_the_real_model(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        empty = build()
    assert all(parameter.is_meta for parameter in empty.parameters())
    spec = spec_unchanged(empty)
    assert spec == spec_unchanged(build())
    assert spec.groups == {"0": 6}


def test_unused_parameters_are_reported() -> None:
    with pytest.warns(UserWarning, match=r"4 parameters are not used.*first\.weight"):
        spec = spec_unchanged(with_forward(lambda self, inputs: inputs))
    assert spec.groups == {}


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ({"__deepcopy__": lambda self, memo: 1 / 0}, "cannot be copied: division by zero"),
        ({"__reduce_ex__": lambda self, protocol: 1 / 0}, "cannot be copied: division by zero"),
    ],
    ids=["deepcopy", "reduce"],
)
def test_a_model_that_cannot_be_copied_is_refused(attribute: dict[str, Any], words: str) -> None:
    assert_refused(type("Single", (TwoLayers,), attribute)(), INPUT, words)


class WithBuffer(TwoLayers):
    """A model with a buffer for its hidden units."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(size))


def test_a_buffer_updated_in_place_moves_with_its_units() -> None:
    class Updating(WithBuffer):
        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs)
            self.last.mul_(0.9).add_(hidden.mean(0))
            return self.second(hidden - self.last)

    spec = spec_unchanged(Updating())
    assert list(spec.groups.values()) == [6]
    assert spec.axes["last"] == spec.axes["first.bias"] == spec.axes["second.weight"][1:]


def test_a_buffer_that_forward_replaces_moves_with_its_units() -> None:
    class Replacing(WithBuffer):
        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs) + self.last
            self.last = hidden.mean(0)
            return self.second(hidden)

    spec = spec_unchanged(Replacing())
    assert list(spec.groups.values()) == [6]
    assert spec.axes["last"] == spec.axes["first.bias"] == spec.axes["second.weight"][1:]


def test_a_buffer_that_changes_shape_is_pinned() -> None:
    class Reshaping(WithBuffer):
        def forward(self, inputs: Tensor) -> Tensor:
            self.last = inputs.mean(0)
            return super().forward(inputs)

    spec = spec_unchanged(Reshaping(size=2))
    assert spec.groups == FREE
    assert spec.pinned["last[0]"] == "a buffer whose shape changes"


def test_hooks_are_traced() -> None:
    model = TwoLayers()
    model.first.register_forward_hook(lambda module, inputs, out: out.cumsum(1))
    assert spec_unchanged(model).groups == {}
    model = TwoLayers()
    model.first.register_forward_hook(lambda module, inputs, out: out.tanh())
    model.second.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    model.second.register_full_backward_hook(lambda *_: None)
    assert spec_unchanged(model).groups == FREE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_has_the_spec_of_the_model() -> None:
    compiled = torch.compile(TwoLayers(), backend="eager")
    spec = derive_spec(compiled, INPUT)
    assert spec.groups == {"_orig_mod.first": 6}
    spec.check(compiled.state_dict())
    model = TwoLayers()
    model.compile(backend="eager")
    assert derive_spec(model, INPUT).groups == FREE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_exported_model_has_the_spec_of_the_model() -> None:
    model = torch.export.export(TwoLayers(), (INPUT,)).module()
    spec = derive_spec(model, INPUT)
    assert spec.groups == FREE
    spec.check(model.state_dict())


def test_deriving_a_spec_does_not_affect_training() -> None:
    model = normalised()
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
        ends.append({key: bits(value) for key, value in trained.state_dict().items()})
    assert ends[0] == ends[1]


def test_anything_but_a_module_is_refused() -> None:
    for wrong in (lambda x: x, TwoLayers().state_dict()):
        with pytest.raises(SpecError, match=r"model is a \w+: give a torch\.nn\.Module"):
            derive_spec(wrong, INPUT)  # type: ignore[arg-type]


def test_a_meta_model_may_have_integer_buffers() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    assert derive_spec(model, INPUT).groups == {"0": 6}


def test_a_buffer_that_is_only_written_moves_with_its_units() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        self.last = hidden.mean(0)
        return self.second(hidden)

    model = with_forward(forward)
    model.register_buffer("last", torch.zeros(6))
    spec = spec_unchanged(model)
    assert spec.groups == {"first": 6}
    assert "last[0]" not in spec.pinned


def test_a_function_that_refers_to_the_model_is_refused() -> None:
    model = TwoLayers()
    norm = nn.BatchNorm1d(6)
    model.norm = norm
    model.between = lambda hidden: norm(hidden.float()).double()
    words = r"changes the model's own \['norm\.num_batches_tracked'.*use submodules as attributes"
    assert_refused(model, INPUT, words)


def test_scripts_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(nn.Linear(4, 3), INPUT)
    with pytest.raises(SpecError, match=r"the model is a script: give the module as it was before"):
        derive_spec(script, INPUT)


def test_empty_layers_and_counters_have_no_group() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 0), nn.Linear(0, 3))
        assert derive_spec(empty, INPUT).groups == {"0": 6}

    def forward(self: Any, inputs: Tensor) -> Tensor:
        self.steps += 1
        return TwoLayers.forward(self, inputs)

    model = with_forward(forward)
    model.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
    spec = spec_unchanged(model)
    assert spec.groups == {"first": 6}
    assert spec.pinned["steps[0]"] == "only in buffers"


def test_a_state_dict_that_changes_in_forward_is_refused() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        self.last = inputs.mean(0)
        return TwoLayers.forward(self, inputs)

    model = with_forward(forward)
    model.register_buffer("last", None)
    assert_refused(model, INPUT, r"keys of the state dict change when the model runs \(\['last'\]")
