"""Example inputs of any form: `derive_spec` returns the right spec or raises `SpecError`."""

from collections.abc import Callable
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
    with_forward,
)
from torch import Tensor, nn

from fl_rebasin import SpecError, derive_spec


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ([INPUT], "list"),
        (None, "NoneType"),
        (np.ones((2, 4)), "ndarray"),
        ("inputs", "str"),
        ({1, 2}, "set"),
        (nn.ReLU(), "ReLU"),
        (3, "int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_example_inputs_of_other_types_are_refused(inputs: Any, kind: str) -> None:
    with pytest.raises(
        SpecError,
        match=f"^example_inputs is a {kind}: give a tensor, a tuple of positional arguments or a "
        "dict of keyword arguments$",
    ):
        derive_spec(TwoLayers(), inputs)


class Gained(TwoLayers):
    """Takes an index by position and a gain by keyword."""

    def forward(self, inputs: Tensor, index: Tensor, *, gain: Tensor) -> Tensor:
        return super().forward(inputs * gain)[index]


INDEX = torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("build", "inputs", "words"),
    [
        (TwoLayers, torch.ones(2, 5), r"\(2, 5\) float32 on cpu: .*2x5 and 4x6"),
        (TwoLayers, torch.tensor(1.0), r"\(\) float32 on cpu: .*at least 1D"),
        (TwoLayers, torch.ones(2, 4, dtype=torch.int64), r"\(2, 4\) int64 on cpu: .*dtype.*Long"),
        (TwoLayers, torch.ones(2, 4, dtype=torch.bool), r"\(2, 4\) bool on cpu: .*dtype.*Bool"),
        (TwoLayers, INPUT.to(torch.complex64), r"\(2, 4\) complex64 on cpu: .*dtype.*Complex"),
        (
            lambda: nn.Conv2d(3, 4, 3),
            torch.ones(1, 3, 8, 8, dtype=torch.int64),
            r"\(1, 3, 8, 8\) int64 on cpu: RuntimeError: Input type \(long int\)",
        ),
        (lambda: nn.Conv2d(3, 4, 3), torch.ones(1, 4, 8, 8), "to have 3 channels, but got 4"),
        (lambda: nn.Embedding(3, 4), torch.ones(2, 3), r"\(2, 3\) float32 on cpu: .*Long, Int"),
        (lambda: nn.Embedding(3, 4), torch.full((2, 3), 7), r"int64 on cpu: .*out of range"),
        (TwoLayers, (), r"missing 1 required positional argument: 'inputs'"),
        (TwoLayers, (INPUT, INPUT), "takes 2 positional arguments but 3 were given"),
        (TwoLayers, {"x": INPUT}, r"\{'x': '\(2, 4\).*unexpected keyword argument 'x'"),
        (TwoLayers, {"inputs": INPUT, "mask": None}, "unexpected keyword argument 'mask'"),
        (TwoLayers, {0: INPUT}, "keywords must be strings"),
        (TwoLayers, ([INPUT],), "must be Tensor, not list"),
        (TwoLayers, ({"inputs": INPUT},), "must be Tensor, not dict"),
        (Gained, INPUT, "missing 1 required positional argument: 'index'"),
        (Gained, (INPUT, INDEX), "missing 1 required keyword-only argument: 'gain'"),
        (Gained, (INPUT, INDEX, INPUT), "takes 3 positional arguments but 4 "),
        (
            Gained,
            {"inputs": INDEX, "index": INPUT, "gain": torch.ones(2, dtype=torch.int64)},
            r"'inputs': '\(2,\) int64 on cpu', 'index': '\(2, 4\) float32 on cpu'",
        ),
        (lambda: nn.ModuleList([nn.Linear(4, 3)]), INPUT, 'missing the required "forward"'),
    ],
    ids=range(21),
)
def test_an_error_names_shape_dtype_and_device_of_wrong_inputs(
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
def test_inputs_may_have_any_dtype_and_layout(inputs: Any) -> None:
    assert spec_unchanged(TwoLayers(), inputs).groups == FREE


def test_example_inputs_may_be_keyword_arguments() -> None:
    inputs = {"inputs": INPUT, "index": INDEX, "gain": torch.ones(4)}
    assert spec_unchanged(Gained(), inputs).groups == FREE


def test_an_empty_batch_is_refused() -> None:
    assert_refused(
        TwoLayers(),
        torch.ones(0, 4),
        "returns only empty tensors: give example inputs that are not",
    )


def test_a_model_that_changes_its_inputs_gets_a_copy() -> None:
    def forward(self: Any, bag: dict[str, Any]) -> Tensor:
        bag["count"].add_(1)
        bag["inputs"].mul_(2)
        bag["seen"] = True
        return TwoLayers.forward(self, bag.pop("inputs"))

    bag = {"inputs": INPUT.clone(), "count": torch.zeros(1, dtype=torch.int64)}
    assert spec_unchanged(with_forward(forward), (bag,)).groups == FREE
    assert list(bag) == ["inputs", "count"]


def test_an_input_may_set_the_length_of_a_loop() -> None:
    def forward(self: Any, inputs: Tensor, steps: Any) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(int(steps)):
            hidden = torch.tanh(hidden)
        return self.second(hidden)

    assert spec_unchanged(with_forward(forward), (INPUT, torch.tensor(3))).groups == FREE
    assert spec_unchanged(with_forward(forward), {"inputs": INPUT, "steps": 3}).groups == FREE


def test_meta_inputs_are_refused() -> None:
    assert_refused(
        TwoLayers(), INPUT.to("meta"), "on meta have no values: give inputs on the model"
    )


def test_the_values_of_example_inputs_are_kept() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.log()) if bool((inputs > 0).all()) else inputs.new_zeros(2, 6)
        return self.second(hidden)

    positive = torch.rand(2, 4) + 0.5
    assert spec_unchanged(with_forward(forward), positive).groups == {"first": 6}


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, torch.enable_grad, lambda: torch.device("meta")],
)
def test_the_caller_may_be_in_any_torch_context(context: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with context():
        assert derive_spec(model, INPUT).groups == {"0": 6}
