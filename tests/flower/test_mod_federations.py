"""The client mod in federations whose clients permute their units, with and without other mods.

The fast tests run each federation in this process. The slow one runs all of them on Flower's
simulation engine, in a process of its own: `python test_mod_federations.py FILE`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, prepare, tensors
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.clientapp.typing import Mod
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAvg,
    Strategy,
)
from flwr.simulation import run_simulation
from helpers import State, nearby, random_inputs, random_state, spec_of
from torch import Tensor, nn
from zoo import Entry

from fl_rebasin.flower import rebasin_mod

NET = Entry(
    lambda: nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    ),
    lambda: torch.zeros(1, 8),
    (16, 16),
)
SPEC = spec_of(NET)
EXAMPLES = (10, 20, 40)
ROUNDS = 2
NORM = 1.0
"""Longer than an update, and much shorter than the effect of a permutation."""


def train(state: State, partition: int) -> State:
    """Train a little, and return the units in another order."""
    permutation = SPEC.random(torch.Generator().manual_seed(partition))
    assert not permutation.is_identity
    return SPEC.apply(permutation, nearby(state, partition + 1, scale=1e-2))


def expected(model: State) -> State:
    """The result of averaging if no client permutes its units."""
    for _ in range(ROUNDS):
        clients = [nearby(model, partition + 1, scale=1e-2) for partition in range(len(EXAMPLES))]
        model = {
            key: sum(n * each[key].double() for n, each in zip(EXAMPLES, clients, strict=True))
            / sum(EXAMPLES)
            for key in model
        }
    return model


def train_message(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    state = train(tensors(message.content.array_records["arrays"]), partition)
    metrics = MetricRecord({"num-examples": EXAMPLES[partition]})
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
    return Message(content, reply_to=message)


class LegacyClient(NumPyClient):
    """A client of Flower's legacy interface."""

    def __init__(self, partition: int) -> None:
        self.partition = partition

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[Any, int, Any]:
        state = dict(zip(NET.build().state_dict(), map(torch.from_numpy, parameters), strict=True))
        arrays = [value.numpy() for value in train(state, self.partition).values()]
        return arrays, EXAMPLES[self.partition], {}


def legacy_client(context: Context) -> Any:
    return LegacyClient(int(context.node_config["partition-id"])).to_client()


def local_data(context: Context) -> tuple[nn.Module, list[Tensor]]:
    seed = int(context.node_config["partition-id"])
    return NET.build(), [random_inputs(NET, seed + batch).float() for batch in range(64)]


def fedavg() -> Strategy:
    # The simulation's nodes connect late: wait for all of them.
    count = len(EXAMPLES)
    return FedAvg(fraction_evaluate=0, min_train_nodes=count, min_available_nodes=count)


def clipping() -> Strategy:
    return DifferentialPrivacyClientSideFixedClipping(fedavg(), 0.0, NORM, len(EXAMPLES))


@dataclass(frozen=True)
class Case:
    """A federation, and how close to the expected model it must end.

    Attributes:
        mods: the clients' mods.
        strategy: creates the server's strategy; None for SecAgg+.
        nearest: smallest relative distance to the expected model.
        farthest: largest relative distance to the expected model.
    """

    mods: list[Mod]
    strategy: Callable[[], Strategy] | None = fedavg
    nearest: float = 0.0
    farthest: float = float("inf")

    def app(self) -> ClientApp:
        """Return the ClientApp of the case."""
        if self.strategy is None:
            return ClientApp(legacy_client, mods=self.mods)
        app = ClientApp()
        app.train(mods=self.mods)(train_message)
        return app

    def check(self, model: State) -> None:
        """Check the model that the federation ended with."""
        wanted = expected(random_state(NET, 0))
        gap = sum(float((model[key].double() - wanted[key]).square().sum()) for key in wanted)
        total = sum(float(value.square().sum()) for value in wanted.values())
        distance = (gap / total) ** 0.5
        assert self.nearest <= distance <= self.farthest


ALIGN = rebasin_mod(NET.build(), NET.inputs())
ALIGN_ACTIVATIONS = rebasin_mod(NET.build(), NET.inputs(), load=local_data)
NOISE = LocalDpMod(NORM, 1e-6, 1.0, 1e-5)
"""Its noise has a standard deviation of 5e-6."""

CASES = {
    "plain": Case([ALIGN], farthest=1e-6),
    "plain, activations": Case([ALIGN_ACTIVATIONS], farthest=1e-6),
    "plain, unaligned": Case([], nearest=0.5),
    "clipping": Case([fixedclipping_mod, ALIGN], clipping, farthest=1e-6),
    "clipping, wrong order": Case([ALIGN, fixedclipping_mod], clipping, nearest=0.05),
    "clipping, unaligned": Case([fixedclipping_mod], clipping, nearest=0.05),
    "local-dp": Case([NOISE, ALIGN], farthest=1e-4),
    "local-dp, unaligned": Case([NOISE], nearest=0.05),
    # SecAgg+ rounds to multiples of 4e-6.
    "secagg+": Case([secaggplus_mod, ALIGN], None, farthest=1e-4),
    "secagg+, unaligned": Case([secaggplus_mod], None, nearest=0.5),
}


def run_case(name: str, grid: Grid, context: Context) -> State:
    """Run a federation; return the model that it ends with."""
    model = random_state(NET, 0)
    make_strategy = CASES[name].strategy
    if make_strategy is None:
        return run_secure(name, model, grid, context)
    config = ConfigRecord({"case": name})
    arrays = ArrayRecord(model)
    result = make_strategy().start(grid, arrays, ROUNDS, timeout=60, train_config=config)
    return tensors(result.arrays)


def run_secure(name: str, model: State, grid: Grid, context: Context) -> State:
    """Run a federation with secure aggregation."""
    strategy = LegacyFedAvg(
        fraction_evaluate=0,
        min_fit_clients=len(EXAMPLES),
        min_available_clients=len(EXAMPLES),
        initial_parameters=ndarrays_to_parameters([value.numpy() for value in model.values()]),
        on_fit_config_fn=lambda server_round: {"case": name},
    )
    legacy = LegacyContext(context, ServerConfig(num_rounds=ROUNDS), strategy)
    workflow = SecAggPlusWorkflow(3, 2, max_weight=max(EXAMPLES), timeout=60)
    DefaultWorkflow(fit_workflow=workflow)(grid, legacy)
    arrays = legacy.state.array_records[MAIN_PARAMS_RECORD].to_numpy_ndarrays()
    return dict(zip(model, map(torch.from_numpy, arrays), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_clients_that_permute_their_units_do_not_change_the_result(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(monkeypatch, caplog)
    app = CASES[name].app()
    nodes = range(1, len(EXAMPLES) + 1)
    world = Federation(
        dict.fromkeys(nodes, app),
        {node: Context(1, node, {"partition-id": node - 1}, RecordDict(), {}) for node in nodes},
    )
    world.grid.run.run_id = 1
    CASES[name].check(run_case(name, world.grid, Context(1, 0, {}, RecordDict(), {})))


# On the simulation engine


class Switchboard(ClientApp):
    """All apps in one: starting Ray takes longer than running all cases."""

    def __init__(self) -> None:
        super().__init__()
        self.apps = {name: case.app() for name, case in CASES.items()}

    def __call__(self, message: Message, context: Context) -> Message:
        configs = message.content.config_records.values()
        # Only SecAgg+'s internal messages do not name a case: any of its apps can answer them.
        named = [str(config["case"]) for config in configs if "case" in config]
        return self.apps[named[0] if named else "secagg+"](message, context)


def simulate() -> dict[str, State]:
    """Run all federations; return the models that they end with."""
    results: dict[str, State] = {}
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        for name in CASES:
            results[name] = run_case(name, grid, context)

    run_simulation(
        server_app,
        Switchboard(),
        num_supernodes=len(EXAMPLES),
        backend_config={
            "init_args": {"num_cpus": 2, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return results


@pytest.mark.slow
def test_the_simulation_engine_gives_the_same_results(tmp_path: Path) -> None:
    # Ray leaves things behind, so it runs in a process of its own; one test starts it once.
    file = tmp_path / "models.pt"
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, __file__, str(file)],
        env={
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONPATH": f"{tests.parent}:{tests}",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert file.exists(), done.stderr
    models = torch.load(file)
    assert list(models) == list(CASES)
    for name, model in models.items():
        CASES[name].check(model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(simulate(), sys.argv[1])
