"""The documents: what CONTRIBUTING.md shows runs as it stands there."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from federation import Federation, batches_of, client, one_round, prepare, replies_of, tensors
from helpers import assert_same, random_state
from torch import nn
from zoo import ZOO

from fl_rebasin import match_weights
from fl_rebasin.flower import ReBasinStrategy
from fl_rebasin.flower.align import Aligned
from fl_rebasin.flower.replies import ClientModel
from fl_rebasin.flower.round import Round
from fl_rebasin.merging.clients import Clients
from fl_rebasin.merging.finishing_step import Finish, Finished
from fl_rebasin.merging.heads import last_layer
from fl_rebasin.state_dicts import StateDict, average

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"<!-- runs in .*? -->\n```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
NAMES: dict[str, Any] = {
    "Aligned": Aligned,
    "Any": Any,
    "ClassVar": ClassVar,
    "ClientModel": ClientModel,
    "Clients": Clients,
    "Finish": Finish,
    "Finished": Finished,
    "Round": Round,
    "Sequence": Sequence,
    "StateDict": StateDict,
    "dataclass": dataclass,
    "last_layer": last_layer,
    "match_weights": match_weights,
    "nn": nn,
}
"""What the examples import."""


def shown(name: str) -> Any:
    """The class of a name that CONTRIBUTING.md shows."""
    (block,) = [block for block in BLOCKS if f"class {name}:" in block]
    names = dict(NAMES)
    exec(block, names)
    return names[name]


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


def round_with(**options: Any) -> tuple[dict[int, Any], dict[str, torch.Tensor]]:
    entry = ZOO["mlp"]
    states = {node: random_state(entry, node) for node in (1, 2)}
    world = Federation(dict.fromkeys(states, client(entry.build, batches_of((3, 2, 2), [4], 0))))
    strategy = ReBasinStrategy(model=entry.build(), example_inputs=entry.inputs(), **options)
    arrays, _ = one_round(strategy, world, random_state(entry, 0), replies_of(states))
    return states, tensors(arrays)


def test_the_finishing_step_of_the_document_works() -> None:
    temperature = shown("Temperature")
    _, plain = round_with(finish=[])
    _, cooled = round_with(finish=[temperature(2.0)])
    weight, bias = last_layer(ZOO["mlp"].build(), ZOO["mlp"].inputs())
    expected = {key: plain[key] / 2 if key in (weight, bias) else plain[key] for key in plain}
    assert_same(cooled, expected)


def test_the_way_of_aligning_of_the_document_works() -> None:
    states, merged = round_with(align=shown("ToFirst")(), finish=[])
    spec = ReBasinStrategy(model=ZOO["mlp"].build(), example_inputs=ZOO["mlp"].inputs()).spec
    match = match_weights(spec, states[1], states[2])
    assert_same(merged, average([states[1], spec.apply(match.permutation, states[2])], None))
