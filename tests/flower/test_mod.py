"""Laws of the client mod: what it undoes and leaves alone, and that Flower's own mods stack."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.clientapp.typing import Mod
from flwr.common import ndarrays_to_parameters
from flwr.compat.common.recorddict_compat import parameters_to_arrayrecord
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
from flwr.supercore.task_identity import TaskIdentity
from helpers import State, assert_same, random_inputs, random_state, spec_of
from torch import Tensor, nn
from zoo import ZOO, Entry

from fl_rebasin import PermutationSpec, SpecError
from fl_rebasin.flower import rebasin_mod

# Integer buffers, more than ten arrays, tied tensors.
NETS = ("mlp", "conv-batchnorm-flatten", "residual-batchnorm", "tied-shared")
IDENTITY = ("_task_id", "_run_id", "_node_id")
UNALIGNED = "the trained model is uploaded unaligned: "


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages can be made: they carry the identity of the task that makes them."""
    for name in IDENTITY:
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="flwr")


@cache
def named_spec(name: str) -> PermutationSpec:
    return spec_of(ZOO[name])


def mod_of(name: str, **options: Any) -> Mod:
    return rebasin_mod(ZOO[name].build(), ZOO[name].inputs(), **options)


def near(state: State, seed: int, scale: float = 1e-2) -> State:
    """A state dict close by, as after a little training; integers count on."""
    generator = torch.Generator().manual_seed(seed)
    moved = {
        key: value + scale * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value + seed
        for key, value in state.items()
    }
    if "embed.weight" in moved:
        moved["out.weight"] = moved["embed.weight"].clone()
    return moved


def start(name: str) -> State:
    return near(random_state(ZOO[name], 0), 0, scale=0)


def shuffled(spec: PermutationSpec, state: State, seed: int) -> State:
    permutation = spec.random(torch.Generator().manual_seed(seed))
    assert not permutation.is_identity
    return spec.apply(permutation, state)


def reverse_keys(state: State) -> State:
    return {key: state[key] for key in reversed(state)}


def tensors(record: ArrayRecord) -> State:
    return dict(record.to_torch_state_dict())


def real_message(content: RecordDict, message_type: str) -> Message:
    return Message(content, dst_node_id=1, message_type=message_type)


def real_reply(content: RecordDict | Error) -> Message:
    return Message(content, reply_to=real_message(RecordDict(), MessageType.TRAIN))


def mock_message(content: RecordDict, message_type: str) -> Message:
    message = Mock(spec=Message)
    message.metadata.message_type = message_type
    message.content = content
    return message


def mock_reply(content: RecordDict | Error) -> Message:
    reply = Mock(spec=Message)
    is_error = isinstance(content, Error)
    reply.has_error.return_value = is_error
    setattr(reply, "error" if is_error else "content", content)
    return reply


KINDS = {"real": (real_message, real_reply), "mock": (mock_message, mock_reply)}


def question(arrays: ArrayRecord, name: str = "arrays") -> RecordDict:
    return RecordDict({name: arrays, "config": ConfigRecord({"lr": 0.1})})


def answer(arrays: ArrayRecord, name: str = "arrays") -> RecordDict:
    return RecordDict(
        {
            "before": MetricRecord({"num-examples": 3}),
            name: arrays,
            "after": ConfigRecord({"note": "trained"}),
        }
    )


def call(
    mod: Mod,
    received: RecordDict,
    trained: RecordDict | Error,
    message_type: str = MessageType.TRAIN,
    kind: str = "real",
    during: Callable[[Message], None] = lambda message: None,
) -> tuple[Message, Message]:
    """Send a message through a mod; return what the client replied, and what came out."""
    make_message, make_reply = KINDS[kind]
    message, reply = make_message(received, message_type), make_reply(trained)
    context = Context(1, 1, {}, RecordDict(), {})

    def client(its_message: Message, its_context: Context) -> Message:
        assert its_message is message
        assert its_context is context
        during(message)
        return reply

    return reply, mod(message, context, client)


# What it undoes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [dict, reverse_keys], ids=["in-order", "reversed"])
@pytest.mark.parametrize("name", NETS)
def test_permuted_units_come_back_and_all_else_stays(
    name: str, order: Callable[[State], State], kind: str
) -> None:
    model = start(name)
    trained = near(model, 1)
    sent = order(shuffled(named_spec(name), trained, seed=5))
    content = answer(ArrayRecord(sent), "weights")
    before = copy.deepcopy(content)
    reply, out = call(mod_of(name), question(ArrayRecord(model)), content, kind=kind)

    assert list(out.content) == ["before", "weights", "after"]
    record = out.content.array_records["weights"]
    assert list(record) == list(sent)
    assert_same(tensors(record), order(trained), rtol=0, atol=0)
    assert [str(value.dtype) for value in sent.values()] == [
        f"torch.{array.dtype}" for array in record.values()
    ]
    assert [tuple(value.shape) for value in trained.values()] == [
        record[key].shape for key in trained
    ]
    for other in ("before", "after"):
        assert out.content[other] is content[other]
    assert out.metadata == reply.metadata
    # The client's own reply, which it may keep, is as it was.
    assert reply.content is content
    assert content == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_arrays_of_another_precision_than_the_global_model_keep_it(dtype: torch.dtype) -> None:
    model = start("mlp")
    trained = {key: value.to(dtype) for key, value in near(model, 1).items()}
    sent = shuffled(named_spec("mlp"), trained, seed=5)
    _, out = call(mod_of("mlp"), question(ArrayRecord(model)), answer(ArrayRecord(sent)))
    assert_same(tensors(out.content.array_records["arrays"]), trained, rtol=0, atol=0)


def nameless(state: State) -> ArrayRecord:
    """A record as Flower's older interface makes it: places for names, no dtypes, no shapes."""
    arrays = [value.numpy() for value in state.values()]
    record = parameters_to_arrayrecord(ndarrays_to_parameters(arrays), keep_input=True)
    assert {(array.dtype, array.shape) for array in record.values()} == {("", ())}
    return record


RECORDS = {"named": ArrayRecord, "nameless": nameless}


@pytest.mark.parametrize("received", RECORDS)
@pytest.mark.parametrize("name", NETS)
def test_nameless_arrays_go_by_their_places(name: str, received: str) -> None:
    model = start(name)
    trained = near(model, 1)
    sent = nameless(shuffled(named_spec(name), trained, seed=5))
    _, out = call(
        mod_of(name),
        question(RECORDS[received](model), "fitins.parameters"),
        answer(sent, "fitres.parameters"),
    )
    assert out.content.array_records["fitres.parameters"] == nameless(trained)


def test_units_are_matched_by_their_activations_where_data_are_given() -> None:
    # The second input is always zero: only the weights say that the units are in order.
    model = {"0.weight": [[1, 5], [-1, 0]], "0.bias": [0, 0], "2.weight": [[1, 1]], "2.bias": [0]}
    trained = {**model, "0.weight": [[-1, 5], [1, 0]]}
    swapped = {**model, "0.weight": [[1, 0], [-1, 5]]}
    asked: list[Context] = []
    batches = [torch.tensor([[x, 0.0]]) for x in (-2.0, -1.0, 1.0, 2.0)]
    states = [
        {key: torch.tensor(value, dtype=torch.float32) for key, value in each.items()}
        for each in (model, trained, swapped)
    ]
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))

    def load(context: Context) -> tuple[nn.Module, Sequence[Tensor]]:
        asked.append(context)
        net.load_state_dict(states[1])  # To be overwritten.
        return net, batches

    received, sent, moved = map(ArrayRecord, states)
    for load_or_not, wanted in ((None, sent), (load, moved)):
        mod = rebasin_mod(net, torch.zeros(1, 2), load=load_or_not)
        _, out = call(mod, question(received), answer(sent))
        assert out.content.array_records["arrays"] == wanted
    assert [context.node_id for context in asked] == [1]


def test_the_global_model_is_the_one_that_was_received() -> None:
    model = start("mlp")
    trained = near(model, 1)

    def overwrite(message: Message) -> None:
        record = message.content.array_records["arrays"]
        other = ArrayRecord(shuffled(named_spec("mlp"), model, seed=6))
        for key, array in record.items():
            array.data = other[key].data
        record.pop("1.weight")
        message.content["more"] = other

    sent = ArrayRecord(shuffled(named_spec("mlp"), trained, seed=5))
    received = question(ArrayRecord(model))
    _, out = call(mod_of("mlp"), received, answer(sent), during=overwrite)
    assert_same(tensors(out.content.array_records["arrays"]), trained, rtol=0, atol=0)


# What it leaves alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message_type", ["evaluate", "query", "query.train", "evaluate.train"])
def test_messages_that_are_not_of_training_are_untouched(message_type: str, kind: str) -> None:
    model = start("mlp")
    content = answer(ArrayRecord(shuffled(named_spec("mlp"), model, seed=5)))
    before = copy.deepcopy(content)
    received = question(ArrayRecord(model))
    reply, out = call(mod_of("mlp"), received, content, message_type, kind)
    assert out is reply
    assert out.content is content
    assert content == before


def test_every_action_of_training_is_aligned() -> None:
    model = start("mlp")
    sent = ArrayRecord(shuffled(named_spec("mlp"), model, seed=5))
    _, out = call(mod_of("mlp"), question(ArrayRecord(model)), answer(sent), "train.personal")
    assert_same(tensors(out.content.array_records["arrays"]), model, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_untouched(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    received = question(ArrayRecord(start("mlp")))
    reply, out = call(mod_of("mlp"), received, Error(code=7, reason="out of memory"), kind=kind)
    assert out is reply
    assert out.error.reason == "out of memory"
    assert not caplog.messages


@pytest.mark.parametrize("name", NETS)
def test_a_model_in_order_is_handed_on_bit_for_bit(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = start(name)
    sent = ArrayRecord(near(model, 1))
    # Payloads that the mod would write otherwise.
    for array in sent.values():
        array.dtype, array.data = "float32", array.data + b"more"
    before = copy.deepcopy(sent)
    reply, out = call(mod_of(name), question(ArrayRecord(model)), answer(sent))
    assert out is reply
    assert out.content.array_records["arrays"] is sent
    assert sent == before
    assert "aligned to the global model" in caplog.text
    assert "0 units moved" in caplog.text


def filled(value: float) -> Callable[[ArrayRecord], None]:
    def change(record: ArrayRecord) -> None:
        record["1.weight"] = Array(np.full((7, 12), value, np.float32))

    return change


def payload(data: bytes) -> Callable[[ArrayRecord], None]:
    def change(record: ArrayRecord) -> None:
        record["1.weight"].data = data

    return change


def set_array(key: str, *shape: int) -> Callable[[ArrayRecord], None]:
    return lambda record: record.update({key: Array(np.zeros(shape, np.float32))})


MISFITS: dict[str, tuple[Callable[[ArrayRecord], Any], str]] = {
    "nan": (filled(np.nan), "its values: 1.weight holds NaN or infinite values"),
    "inf": (filled(-np.inf), "its values: 1.weight holds NaN or infinite values"),
    "shape": (set_array("1.weight", 7, 13), "1.weight has shape (7, 13), the spec expects (7, 12)"),
    "missing": (lambda record: record.pop("1.weight"), "the state dict lacks 1 keys"),
    "extra": (set_array("spare", 2), "the state dict has 1 keys beyond the spec: ['spare']"),
    "empty": (lambda record: record.clear(), "expected 6 arrays, in the order of the model's"),
    "pickle": (payload(pickle.dumps([1.0])), "allow_pickle"),
    "cut": (payload(b""), "No data left"),
    "vast": (
        payload(
            b"\x93NUMPY\x01\x00v\x00"
            + f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 13},), }}"
            .ljust(117).encode()
            + b"\n"
        ),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("side", ["the global model", "the trained model"])
@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit_is_left_to_the_server(
    case: str, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, words = MISFITS[case]
    model = start("mlp")
    received, sent = ArrayRecord(model), ArrayRecord(shuffled(named_spec("mlp"), model, seed=5))
    change(received if side == "the global model" else sent)
    before = copy.deepcopy(sent)
    reply, out = call(mod_of("mlp"), question(received), answer(sent))
    assert out is reply
    assert out.content.array_records["arrays"] is sent
    assert sent == before
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert line.getMessage().startswith(f"{UNALIGNED}{side}: ")
    assert words in line.getMessage()


@pytest.mark.parametrize("side", ["the global model", "the trained model"])
@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_array_records_is_left_to_the_server(
    count: int, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = start("mlp")
    received, content = question(ArrayRecord(model)), answer(ArrayRecord(model))
    changed = received if side == "the global model" else content
    if count:
        changed["more"] = ArrayRecord(model)
    else:
        del changed["arrays"]
    reply, out = call(mod_of("mlp"), received, content)
    assert out is reply
    assert caplog.messages == [
        f"{UNALIGNED}{side}: expected one ArrayRecord, got {count} (rebasin_mod must be the last "
        "in the list of mods)"
    ]


def test_nameless_arrays_of_another_number_are_left_to_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = start("conv-batchnorm-flatten")
    parameters = [key for key in model if "running" not in key and "num_batches" not in key]
    sent = nameless({key: model[key] for key in parameters})
    reply, out = call(mod_of("conv-batchnorm-flatten"), question(nameless(model)), answer(sent))
    assert out is reply
    assert f"expected {len(model)} arrays, in the order" in caplog.text
    assert f"got {len(parameters)}" in caplog.text


@pytest.mark.parametrize(
    ("batches", "words"),
    [([], "no batch"), ([torch.full((2, 3, 2, 2), torch.inf)], "an activation is NaN or infinite")],
    ids=["none", "infinite"],
)
def test_activations_that_cannot_be_compared_are_a_warning(
    batches: list[Tensor], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = start("mlp")
    sent = ArrayRecord(shuffled(named_spec("mlp"), model, seed=5))
    mod = mod_of("mlp", load=lambda context: (ZOO["mlp"].build(), batches))
    reply, out = call(mod, question(ArrayRecord(model)), answer(sent))
    assert out is reply
    (line,) = caplog.messages
    assert line.startswith(UNALIGNED)
    assert words in line


def test_what_load_raises_is_not_hidden() -> None:
    def load(context: Context) -> Any:
        raise FileNotFoundError("no data on this node")

    arrays = ArrayRecord(start("mlp"))
    with pytest.raises(FileNotFoundError, match="no data on this node"):
        call(mod_of("mlp", load=load), question(arrays), answer(arrays))


# How it is made


def test_model_that_gives_no_spec_is_refused() -> None:
    with pytest.raises(SpecError, match=r"cannot be run on the example inputs \(1, 5\)"):
        rebasin_mod(nn.Linear(3, 2), torch.zeros(1, 5))


def test_it_travels_without_a_model() -> None:
    # The simulation engine sends the ClientApp to its workers with every message.
    wide = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300))
    mod = rebasin_mod(wide, torch.zeros(1, 300))
    sent = pickle.dumps(mod)
    assert len(sent) < 10_000
    state = dict(wide.state_dict())
    spec = spec_of(Entry(lambda: wide, lambda: torch.zeros(1, 300), None))
    arrays = ArrayRecord(shuffled(spec, state, 5))
    _, out = call(pickle.loads(sent), question(ArrayRecord(state)), answer(arrays))
    assert_same(tensors(out.content.array_records["arrays"]), state, rtol=0, atol=0)


# For real: three clients that permute the units of what they train, on the simulation engine

NET = Entry(
    lambda: nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    ),
    lambda: torch.zeros(1, 8),
    (16, 16),
)
EXAMPLES = (10, 20, 40)
ROUNDS = 2
NORM = 1.0
"""More than an update is long, and much less than a permutation."""


def train(state: State, partition: int) -> State:
    """Train a little, and come out with the units in another order."""
    return shuffled(spec_of(NET), near(state, partition + 1), seed=partition)


def expected(model: State) -> State:
    """What averaging gives when no client permutes anything."""
    for _ in range(ROUNDS):
        clients = [near(model, partition + 1) for partition in range(len(EXAMPLES))]
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


class OlderClient(NumPyClient):
    """A client of Flower's older interface."""

    def __init__(self, partition: int) -> None:
        self.partition = partition

    def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[Any, int, Any]:
        state = dict(zip(NET.build().state_dict(), map(torch.from_numpy, parameters), strict=True))
        arrays = [value.numpy() for value in train(state, self.partition).values()]
        return arrays, EXAMPLES[self.partition], {}


def older_client(context: Context) -> Any:
    return OlderClient(int(context.node_config["partition-id"])).to_client()


def local_data(context: Context) -> tuple[nn.Module, list[Tensor]]:
    seed = int(context.node_config["partition-id"])
    return NET.build(), [random_inputs(NET, seed + place).float() for place in range(64)]


def fedavg() -> Strategy:
    # All nodes: at first they are not yet there.
    count = len(EXAMPLES)
    return FedAvg(fraction_evaluate=0, min_train_nodes=count, min_available_nodes=count)


def clipping() -> Strategy:
    return DifferentialPrivacyClientSideFixedClipping(fedavg(), 0.0, NORM, len(EXAMPLES))


@dataclass(frozen=True)
class Case:
    """A federation: its mods with an aligning one put in, and how far from the answer it ends.

    Attributes:
        mods: from the aligning mod, or from none, the list of mods.
        strategy: the server's; None for SecAgg+.
        tolerance: largest relative distance to the expected model when aligned.
        damage: smallest relative distance when not.
    """

    mods: Callable[[list[Mod]], list[Mod]]
    strategy: Callable[[], Strategy] | None
    tolerance: float
    damage: float


CASES = {
    "plain": Case(lambda own: own, fedavg, 1e-6, 0.5),
    "clipping": Case(lambda own: [fixedclipping_mod, *own], clipping, 1e-6, 0.05),
    "local-dp": Case(
        # Noise of a standard deviation of 5e-6.
        lambda own: [LocalDpMod(NORM, 1e-6, 1.0, 1e-5), *own],
        fedavg,
        1e-4,
        0.05,
    ),
    # Its grid is 4e-6 wide.
    "secagg+": Case(lambda own: [secaggplus_mod, *own], None, 1e-4, 0.5),
}


def make_apps() -> dict[str, ClientApp]:
    """Each case with and without alignment, and two variants."""
    by_weights = rebasin_mod(NET.build(), NET.inputs())
    mods = {}
    for name, case in CASES.items():
        mods[name, "aligned"] = case.mods([by_weights])
        mods[name, "naive"] = case.mods([])
    mods["plain", "activations"] = [rebasin_mod(NET.build(), NET.inputs(), load=local_data)]
    mods["clipping", "misordered"] = [by_weights, fixedclipping_mod]
    apps = {}
    for (name, variant), chosen in mods.items():
        if CASES[name].strategy is None:
            app = ClientApp(older_client, mods=chosen)
        else:
            app = ClientApp()
            app.train(mods=chosen)(train_message)
        apps[f"{name} {variant}"] = app
    return apps


class Switchboard(ClientApp):
    """Many apps in one: Ray takes longer to start than all cases to run."""

    def __init__(self, apps: dict[str, ClientApp]) -> None:
        super().__init__()
        self.apps = apps

    def __call__(self, message: Message, context: Context) -> Message:
        configs = message.content.config_records.values()
        # Only the messages that SecAgg+ keeps to itself say nothing: here every app will do.
        named = [str(config["case"]) for config in configs if "case" in config]
        return self.apps[named[0] if named else "secagg+ aligned"](message, context)


def secure_rounds(name: str, model: State, grid: Grid, context: Context) -> State:
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


def federate() -> dict[str, State]:
    """Return the models that the federations end with."""
    results: dict[str, State] = {}
    apps = make_apps()
    model = random_state(NET, 0)
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        for name in apps:
            make_strategy = CASES[name.split()[0]].strategy
            if make_strategy is None:
                results[name] = secure_rounds(name, model, grid, context)
                continue
            config = ConfigRecord({"case": name})
            result = make_strategy().start(
                grid, ArrayRecord(model), num_rounds=ROUNDS, train_config=config, timeout=60
            )
            results[name] = tensors(result.arrays)

    run_simulation(
        server_app,
        Switchboard(apps),
        num_supernodes=len(EXAMPLES),
        backend_config={
            "init_args": {"num_cpus": 2, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return results


def distance(left: State, right: State) -> float:
    gap = sum(float((left[key].double() - right[key]).square().sum()) for key in right)
    return (gap / sum(float(value.square().sum()) for value in right.values())) ** 0.5


def test_federations_of_permuted_clients_end_as_those_without_permutations(tmp_path: Path) -> None:
    # A process of its own keeps what Ray leaves behind; one test, so that Ray starts once.
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
    wanted = expected(random_state(NET, 0))
    distances = {name: distance(end, wanted) for name, end in torch.load(file).items()}
    for name, case in CASES.items():
        assert distances[f"{name} aligned"] < case.tolerance, distances
        assert distances[f"{name} naive"] > case.damage, distances
    assert distances["plain activations"] < CASES["plain"].tolerance, distances
    # Listed before clipping it comes too late.
    assert distances["clipping misordered"] > CASES["clipping"].damage, distances


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(federate(), sys.argv[1])
