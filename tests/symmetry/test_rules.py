"""Laws of the rules: which operators let hidden units move, and which pin them.

`derive_spec` checks every spec that it returns, and warns if a rule was wrong. Warnings are errors
in tests, so each case tests that the rule is right as well as how much freedom it leaves.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rule_cases import CASES, Image, Rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fl_rebasin import derive_spec
from fl_rebasin.symmetry.rules.complexes import COMPLEXES
from fl_rebasin.symmetry.rules.gates import GATES
from fl_rebasin.symmetry.rules.indexing import INDEXING
from fl_rebasin.symmetry.rules.ordering import ORDERING
from fl_rebasin.symmetry.rules.patches import PATCHES
from fl_rebasin.symmetry.rules.rearranging import REARRANGING
from fl_rebasin.symmetry.rules.sparse import SPARSE
from fl_rebasin.symmetry.rules.vectors import VECTORS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:index_reduce"),
    pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter"),
]
FAMILIES = (INDEXING, REARRANGING, PATCHES, ORDERING, VECTORS, GATES, SPARSE, COMPLEXES)


class Recorder(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_hidden_units_move_where_the_operator_permits(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()
    recorder = Recorder()
    inputs = model.inputs if isinstance(model.inputs, tuple) else (model.inputs,)
    with torch.no_grad(), recorder:
        model(*inputs)
    assert set(case.operators.split()) <= recorder.names
    spec = derive_spec(model, inputs)
    assert tuple(sorted(spec.groups.values())) == case.groups, spec.describe()


class UnitsPerPosition(nn.Module):
    """The same operator, but with different hidden units at each position."""

    def __init__(self, model: Rows | Image) -> None:
        super().__init__()
        self.body = model.body
        self.shape = (2, 5, 6)
        if isinstance(model, Image):
            self.shape = (2, model.first.out_channels, 8, 8)
        self.first = nn.Linear(4, math.prod(self.shape))
        with torch.no_grad():
            self.last = nn.Linear(self.body(torch.randn(self.shape)).numel(), 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.body(self.first(inputs[0]).view(self.shape)).flatten())


@pytest.mark.parametrize("name", CASES)
def test_no_rule_confuses_the_units_of_different_positions(name: str) -> None:
    torch.manual_seed(0)
    model = CASES[name].build()
    if isinstance(model, Rows | Image):
        derive_spec(UnitsPerPosition(model), torch.zeros(2, 4))


def test_every_rule_has_a_case() -> None:
    tested = {name for case in CASES.values() for name in case.operators.split()}
    assert {name for family in FAMILIES for name in family} <= tested
