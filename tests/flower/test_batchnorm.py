"""BatchNorm statistics over clients: pooled exactly, whatever a single client answers."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from batchnorm_inputs import batchnorm_inputs
from federation import (
    ODD_NODE,
    Answer,
    Federation,
    Net,
    as_mock,
    changing,
    client,
    dropped,
    entry_of,
    failing,
    federation,
    put,
    put_payload,
    strategy_for,
    tensors,
    vast,
)
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from helpers import State, assert_same, generic, named_spec, random_state, state_of
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import ZOO, Entry

from fl_rebasin.flower import BatchNorm, ReBasinStrategy, add_rebasin_handlers
from fl_rebasin.flower.questions import TIMEOUT
from fl_rebasin.flower.round_clients import RoundClients
from fl_rebasin.merging.batchnorm import MAX_MEAN, MAX_VARIANCE
from fl_rebasin.merging.finishing_step import Finished

BARE = Entry(lambda: nn.BatchNorm1d(3), lambda: torch.zeros(2, 3), ())
NETS: dict[str, Net] = {
    "itself-a-batchnorm": BARE,
    "conv-batchnorm-flatten": "conv-batchnorm-flatten",
    "residual-batchnorm": "residual-batchnorm",
}
NET = "conv-batchnorm-flatten"
STATISTICS = ("running_mean", "running_var")
SIZES = {1: [5], 2: [11], 3: [3, 2, 9]}
NODES = list(SIZES)


def double(net: Net) -> Entry:
    """The same model in float64."""
    entry = entry_of(net)
    return Entry(lambda: entry.build().double(), lambda: entry.inputs().double(), entry.groups)


def client_data(net: Net, dtype: torch.dtype = torch.float64) -> dict[int, list[Tensor]]:
    """Batches that differ in mean and scale from client to client, and so in their statistics."""
    shape = entry_of(net).inputs().shape[1:]
    data = {}
    for seed, (node, sizes) in enumerate(SIZES.items()):
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            torch.randn(size, *shape, generator=generator, dtype=torch.float64) for size in sizes
        ]
        data[node] = [(batch * (seed + 1) + seed).to(dtype) for batch in drawn]
    return data


def joint(data: Mapping[int, Iterable[Tensor]], nodes: Iterable[int] = NODES) -> list[Tensor]:
    """The batches of several clients."""
    return [batch for node in nodes for batch in data[node]]


def honest(net: Net = NET) -> Federation:
    return federation(double(net), client_data(net))


def recalibrated(
    net: Net, state: State, world: Federation, nodes: Sequence[int] = NODES
) -> Finished:
    """Run the step on one model, outside a round."""
    entry = entry_of(net)
    finish = BatchNorm().bind(entry.build(), entry.inputs())
    assert finish is not None
    replies = {node: Mock(spec=Message) for node in nodes}
    return finish(state, RoundClients(world.grid, replies))


def answered(result: Finished) -> int:
    return result.costs["batchnorm"].clients


def statistics_keys(model: nn.Module) -> list[str]:
    return [key for key in model.state_dict() if key.endswith(STATISTICS)]


def seen_statistics(model: nn.Module, batches: Iterable[Tensor]) -> State:
    """Mean and unbiased variance of all inputs of each BatchNorm layer, computed directly."""
    found = {}
    for name, values in batchnorm_inputs(model, batches).items():
        prefix = f"{name}." if name else ""
        found[f"{prefix}running_mean"] = values.mean(0)
        found[f"{prefix}running_var"] = values.var(0, correction=1)
    return found


def assert_statistics(
    state: Mapping[str, Tensor], model: nn.Module, batches: Iterable[Tensor]
) -> None:
    """The state is the model's, except for the statistics, which are those of the batches."""
    expected = state_of(model) | {
        key: value.to(model.state_dict()[key].dtype)
        for key, value in seen_statistics(model, batches).items()
    }
    in_double = next(model.parameters()).dtype == torch.float64
    tolerance = 1e-11 if in_double else 2e-5
    assert_same(state, expected, rtol=tolerance, atol=tolerance)


# Exact pooling


@pytest.mark.parametrize("name", NETS)
def test_pooled_statistics_are_those_of_all_data_together(name: str) -> None:
    net = NETS[name]
    model, data = generic(entry_of(net), 0), client_data(net)
    state = state_of(model)
    before = copy.deepcopy(state)
    world = federation(double(net), data)
    result = recalibrated(net, state, world)

    assert_statistics(result.state_dict, model, joint(data))
    for key, value in state.items():
        changed = not torch.equal(result.state_dict[key], value)
        assert changed == (key in statistics_keys(model)), key
    assert_same(state, before, rtol=0, atol=0)
    assert result.applied
    assert result.report == "BatchNorm statistics pooled from 3 of 3 clients"
    (cost,) = result.costs.values()
    assert list(result.costs) == ["batchnorm"]
    assert cost.clients == 3
    assert cost.messages == 1
    assert cost.bytes == world.bytes_of("batchnorm") > 0
    assert cost.seconds > 0


@pytest.mark.parametrize("name", NETS)
def test_the_first_layer_gets_what_a_training_step_on_the_joint_batch_gives(name: str) -> None:
    net = NETS[name]
    model, data = generic(entry_of(net), 0), client_data(net)
    result = recalibrated(net, state_of(model), honest(net), nodes=[1, 2])

    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = 1.0
    model.train()(torch.cat([*data[1], *data[2]]))
    for key in statistics_keys(model)[:2]:
        torch.testing.assert_close(
            result.state_dict[key], model.state_dict()[key], rtol=1e-11, atol=1e-11
        )


def test_labels_are_ignored() -> None:
    model, data = generic(ZOO[NET], 0), client_data(NET)
    labelled = [(data[1][0], torch.zeros(5)), [data[2][0], "anything"]]
    world = federation(double(NET), {1: labelled})
    result = recalibrated(NET, state_of(model), world, nodes=[1])
    assert_statistics(result.state_dict, model, joint(data, [1, 2]))


def test_only_the_given_nodes_are_asked() -> None:
    model, world = generic(ZOO[NET], 0), honest()
    result = recalibrated(NET, state_of(model), world, nodes=[1, 3])
    assert world.asked("batchnorm") == [1, 3]
    assert world.grid.send_and_receive.call_args.kwargs == {"timeout": TIMEOUT}
    assert_statistics(result.state_dict, model, joint(client_data(NET), [1, 3]))


# Invalid answers


def changed(change: Callable[[RecordDict], object]) -> Answer:
    """A client that changes its valid answer before sending it."""
    app = client(double(NET).build, client_data(NET)[3])
    return changing(app, "batchnorm", change)


def replaced(key: str, values: object) -> Answer:
    return changed(lambda content: put(content, "answer", key, np.asarray(values)))


def payload(data: bytes) -> Answer:
    return changed(lambda content: put_payload(content, "answer", "2.mean", data))


def without(key: str) -> Answer:
    return changed(lambda content: content.array_records["answer"].pop(key))


def renamed(content: RecordDict) -> None:
    record = content.array_records["answer"]
    content["answer"] = ArrayRecord({f"other.{key}": array for key, array in record.items()})


def on_data(net: Net, batches: Iterable[Tensor]) -> Answer:
    return client(double(net).build, batches)


MEAN, VARIANCE = np.zeros(6), np.ones(6)

BAD: dict[str, tuple[Answer, str]] = {
    "no-handler": (ClientApp(), "No query function registered with name 'rebasin_batchnorm'"),
    "error": (failing, r"disk is full \(a ClientApp answers"),
    "no-data": (on_data(NET, []), "no batch.* to re-estimate"),
    "nan-data": (
        on_data(NET, [client_data(NET)[1][0] * torch.nan]),
        "2: the activations hold NaN or infinite values",
    ),
    "other-model": (on_data("mlp", client_data(NET)[1]), r"Error\(s\) in loading state_dict"),
    "nan-mean": (replaced("2.mean", MEAN * np.nan), "2: mean or variance is not finite"),
    "infinite-mean": (replaced("6.mean", [0, 0, 0, 0, np.inf]), "6: mean or variance is not"),
    "nan-variance": (replaced("2.variance", VARIANCE * np.nan), "2: mean or variance is not"),
    "negative-variance": (replaced("2.variance", -VARIANCE), "2: .*a variance is negative"),
    "huge-mean": (replaced("2.mean", MEAN - 2 * MAX_MEAN), "2: .*too large"),
    "huge-variance": (replaced("2.variance", VARIANCE * 2 * MAX_VARIANCE), "2: .*too large"),
    "text": (replaced("2.mean", ["zero"] * 6), "dtype <U4, which is no"),
    "integer-mean": (
        replaced("2.mean", [1] * 6),
        "2: mean and variance must be floats .*, got torch.int64, torch.float64 and torch.int64",
    ),
    "complex-variance": (
        replaced("2.variance", VARIANCE * 1j),
        "2: mean and variance must be floats .*, got torch.float64, torch.complex128",
    ),
    "short-mean": (replaced("2.mean", MEAN[:1]), r"2: expected 6 channels, got \(1,\)"),
    "short-variance": (replaced("2.variance", VARIANCE[:1]), "2: expected 6 channels"),
    "scalar-count": (replaced("2.count", 3), "2: expected 6 channels"),
    "count-by-channel": (replaced("2.count", [3] * 6), "2: expected 6 channels"),
    "zero-count": (replaced("2.count", [0]), "2: 0 is not a number of values"),
    "negative-count": (replaced("2.count", [-4]), "2: -4 is not a number of values"),
    "huge-count": (replaced("2.count", [10**16]), "2: 10000000000000000 is not a number"),
    "float-count": (
        replaced("2.count", [2.5]),
        "2: mean and variance must be floats and the count int64, got .* and torch.float64",
    ),
    "int32-count": (replaced("2.count", np.array([3], np.int32)), "2: .* and torch.int32"),
    "no-count": (without("6.count"), r"'6\.count' is missing"),
    "no-mean": (without("6.mean"), r"'6\.mean' is missing"),
    "no-variance": (without("6.variance"), r"'6\.variance' is missing"),
    "other-layers": (changed(renamed), "it holds statistics of no layer"),
    "no-layers": (
        changed(lambda content: content.array_records["answer"].clear()),
        "it holds statistics of no layer",
    ),
    "no-record": (changed(lambda content: content.pop("answer")), "'answer' is missing"),
    "metrics": (
        changed(lambda content: content.update(answer=MetricRecord({"2.count": 3}))),
        "'answer' is missing",
    ),
    "garbage": (payload(b"garbage"), "2.mean: .* array in NumPy's format"),
    "no-bytes": (payload(b""), "2.mean: .* array in NumPy's format"),
    "vast": (payload(vast()), "2.mean: its payload claims .* 80000000000000 bytes, .* holds 0"),
}


@pytest.mark.parametrize("place", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("case", BAD)
def test_an_invalid_answer_is_dropped_and_the_others_are_pooled(
    case: str, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    app, words = BAD[case]
    state = state_of(generic(ZOO[NET], 0))
    world = honest()
    expected = recalibrated(NET, state, world, nodes=[1, 2])
    assert dropped(caplog) == []

    world.apps[ODD_NODE] = app
    nodes = [1, 2]
    nodes.insert(place, ODD_NODE)
    result = recalibrated(NET, state, world, nodes)
    assert_same(result.state_dict, expected.state_dict, rtol=0, atol=0)
    assert answered(result) == 2
    assert result.report == "BatchNorm statistics pooled from 2 of 3 clients"
    (line,) = [record for record in caplog.records if "dropped" in record.getMessage()]
    assert line.levelno == logging.WARNING
    assert re.match(
        rf"BatchNorm statistics of node {ODD_NODE} dropped: .*{words}.*add_rebasin_handlers\(app",
        line.getMessage(),
    ), line.getMessage()


LARGE = {
    "largest-mean": (replaced("2.mean", MEAN + MAX_MEAN), 3),
    "largest-variance": (replaced("2.variance", VARIANCE * MAX_VARIANCE), 3),
    "mean-beyond-float32": (replaced("2.mean", MEAN + 1e39), 2),
    "square-of-mean-beyond-float64": (replaced("2.mean", MEAN + 1e200), 2),
    "variance-beyond-float32": (replaced("2.variance", VARIANCE * 1e39), 2),
}


@pytest.mark.parametrize("case", LARGE)
def test_large_statistics_leave_the_model_finite(case: str) -> None:
    app, count = LARGE[case]
    world = honest()
    world.apps[2] = app
    result = recalibrated(NET, random_state(ZOO[NET], 0), world)
    assert answered(result) == count
    assert all(bool(torch.isfinite(value).all()) for value in result.state_dict.values())


class WithSpare(nn.Module):
    """A model with a second BatchNorm layer, which the forward pass does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.spare = nn.BatchNorm1d(3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs)


def test_a_layer_that_the_forward_pass_does_not_use_keeps_its_statistics() -> None:
    net = Entry(WithSpare, lambda: torch.zeros(2, 3), ())
    model, data = WithSpare(), client_data(BARE, torch.float32)
    world = federation(net, data)
    result = recalibrated(net, state_of(model), world)
    assert answered(result) == 3
    assert_statistics(result.state_dict, model, joint(data))


def test_a_layer_missing_from_one_answer_is_pooled_from_the_others() -> None:
    def without_the_first(content: RecordDict) -> None:
        for key in ("count", "mean", "variance"):
            content.array_records["answer"].pop(f"2.{key}")
        put(content, "answer", "9.mean", np.full(5, np.nan))

    state = state_of(generic(ZOO[NET], 0))
    world = honest()
    of_all = recalibrated(NET, state, world).state_dict
    of_two = recalibrated(NET, state, world, nodes=[1, 2]).state_dict
    world.apps[3] = changed(without_the_first)
    result = recalibrated(NET, state, world)
    assert answered(result) == 3
    for key in STATISTICS:
        first, second = f"2.{key}", f"6.{key}"
        assert torch.equal(result.state_dict[first], of_two[first])
        assert not torch.equal(result.state_dict[first], of_all[first])
        assert torch.equal(result.state_dict[second], of_all[second])
        assert not torch.equal(result.state_dict[second], of_two[second])


def test_mock_replies_are_read_as_well() -> None:
    state, world = state_of(generic(ZOO[NET], 0)), honest()
    world.apps[2] = failing
    expected = recalibrated(NET, state, world)
    world.grid.send_and_receive.side_effect = lambda messages, timeout: map(
        as_mock, world.deliver(messages, timeout=timeout)
    )
    result = recalibrated(NET, state, world)
    assert_same(result.state_dict, expected.state_dict, rtol=0, atol=0)
    assert answered(result) == 2


@pytest.mark.parametrize("apps", [{1: None, 2: None}, {1: failing, 2: ClientApp()}, {}])
def test_without_valid_answers_the_model_is_unchanged(
    apps: dict[int, Answer | None], caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(generic(ZOO[NET], 0))
    before = copy.deepcopy(state)
    result = recalibrated(NET, state, Federation(apps), nodes=list(apps))
    assert result.state_dict is state
    assert_same(state, before, rtol=0, atol=0)
    assert not result.applied
    assert answered(result) == 0
    assert result.report == f"BatchNorm statistics pooled from 0 of {len(apps)} clients"
    assert len(dropped(caplog)) == len(apps)


def test_a_node_that_does_not_answer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, world = generic(ZOO[NET], 0), honest()
    world.apps[2] = None
    result = recalibrated(NET, state_of(model), world)
    assert answered(result) == 2
    assert_statistics(result.state_dict, model, joint(client_data(NET), [1, 3]))
    assert dropped(caplog) == ["BatchNorm statistics of node 2 dropped: no answer"]


NO_STATISTICS: dict[str, Net] = {
    "no-batchnorm": "mlp",
    "no-running-statistics": Entry(
        lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
        lambda: torch.zeros(2, 3),
        (),
    ),
}


@pytest.mark.parametrize("case", NO_STATISTICS)
def test_a_model_without_statistics_asks_nothing(case: str) -> None:
    net = NO_STATISTICS[case]
    entry = entry_of(net)
    assert BatchNorm().bind(entry.build(), entry.inputs()) is None
    state = random_state(entry, 0)
    world = trained_federation(dict.fromkeys(NODES, state), net, dict.fromkeys(NODES, ()))
    strategy = strategy_for(net, FedAvg(fraction_evaluate=0.0))
    outcome = strategy.start(world.grid, ArrayRecord(state), num_rounds=1)
    assert_same(tensors(outcome.arrays), state, rtol=1e-6, atol=1e-7)
    assert {message.metadata.message_type for message in world.sent} == {"train"}
    assert not any(key.startswith("batchnorm") for key in outcome.train_metrics_clientapp[1])


# The client's side


def test_answering_changes_only_the_weights_of_the_clients_module() -> None:
    own = generic(ZOO[NET], 1).train()
    own[3].eval()
    batches = client_data(NET)[3]
    batches_before = copy.deepcopy(batches)
    world = Federation({1: client(lambda: own, batches)})
    world.contexts[1] = Context(1, 1, {}, RecordDict(), {})
    world.contexts[1].state["counter"] = MetricRecord({"round": 4})
    context_before = copy.deepcopy(world.contexts[1])
    state = state_of(generic(ZOO[NET], 0))
    recalibrated(NET, state, world, nodes=[1])

    assert world.contexts[1] == context_before
    assert_same(dict(enumerate(batches)), dict(enumerate(batches_before)), rtol=0, atol=0)
    # Weights and statistics are those of the message, not those of the local data.
    assert_same(state_of(own), state, rtol=0, atol=0)
    assert [module.training for module in own] == [True, True, True, False, *[True] * 5]
    assert not any(module._forward_pre_hooks for module in own.modules())
    assert not any(module._forward_hooks for module in own.modules())
    assert all(parameter.grad is None for parameter in own.parameters())


def test_load_gets_the_clients_context() -> None:
    seen: list[int] = []

    def load(context: Context) -> tuple[nn.Module, list[Tensor]]:
        seen.append(context.node_id)
        return double(NET).build(), client_data(NET)[1]

    app = ClientApp()
    add_rebasin_handlers(app, load)
    state = state_of(generic(ZOO[NET], 0))
    recalibrated(NET, state, Federation({5: app, 9: app}), nodes=[5, 9])
    assert seen == [5, 9]


# Whole rounds


def trained_federation(
    states: Mapping[int, State],
    net: Net = NET,
    data: Mapping[int, Iterable[Tensor]] | None = None,
) -> Federation:
    """Clients that train to a given model with 10 examples, and answer every question."""
    data = client_data(net, torch.float32) if data is None else data
    apps: dict[int, Answer | None] = {}
    for node, state in states.items():
        app = client(entry_of(net).build, data[node])

        @app.train()
        def train(message: Message, context: Context, state: State = state) -> Message:
            metrics = MetricRecord({"num-examples": 10, "loss": 0.25})
            content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
            return Message(content, reply_to=message)

        apps[node] = app
    return Federation(apps)


def narrow(seed: int) -> tuple[nn.Module, State]:
    """A float32 model and its state dict."""
    state = random_state(ZOO[NET], seed)
    model = ZOO[NET].build()
    model.load_state_dict(state)
    return model, state


def permuted_copies(state: State) -> dict[int, State]:
    spec, generator = named_spec(NET), torch.Generator().manual_seed(0)
    return {node: spec.apply(spec.random(generator), state) for node in NODES}


def joint_data(nodes: Iterable[int] = NODES) -> list[Tensor]:
    return joint(client_data(NET, torch.float32), nodes)


def rebasin(inner: Strategy | None = None, **options: object) -> ReBasinStrategy:
    return strategy_for(NET, FedAvg(fraction_evaluate=0.0) if inner is None else inner, **options)


COSTS = {"batchnorm-clients", "batchnorm-seconds", "batchnorm-bytes", "batchnorm-messages"}


def test_without_alignment_the_plain_average_is_recalibrated() -> None:
    states = {node: random_state(ZOO[NET], seed) for seed, node in enumerate(NODES)}
    world = trained_federation(states)
    initial = ArrayRecord(random_state(ZOO[NET], 7))
    outcome = rebasin(align=None).start(world.grid, initial, num_rounds=2)

    mean = ZOO[NET].build()
    mean.load_state_dict({key: sum(state[key] for state in states.values()) / 3 for key in initial})
    result = tensors(outcome.arrays)
    expected = state_of(mean) | seen_statistics(mean, joint_data())
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            result[key].double(), value.double(), rtol=1e-4, atol=1e-4, msg=key
        )
    # Each round asks each client once.
    assert world.asked("batchnorm") == world.asked("train") == [1, 1, 2, 2, 3, 3]
    for metrics in outcome.train_metrics_clientapp.values():
        assert set(metrics) == {"loss", "rebasin-dropped", *COSTS}
        assert metrics["batchnorm-clients"] == 3
        assert metrics["batchnorm-messages"] == 1
        assert metrics["loss"] == pytest.approx(0.25)


def test_the_aligned_average_is_recalibrated(caplog: pytest.LogCaptureFixture) -> None:
    model, shared = narrow(0)
    world = trained_federation(permuted_copies(shared))
    outcome = rebasin().start(world.grid, ArrayRecord(shared), num_rounds=2)
    assert_statistics(tensors(outcome.arrays), model, joint_data())
    assert world.asked("batchnorm") == world.asked("train") == [1, 1, 2, 2, 3, 3]
    assert caplog.messages.count("BatchNorm statistics pooled from 3 of 3 clients") == 2
    for metrics in outcome.train_metrics_clientapp.values():
        assert metrics["batchnorm-clients"] == 3
        assert metrics["rebasin-similarity-after"] == pytest.approx(1)
        assert metrics["loss"] == pytest.approx(0.25)
        assert metrics.keys() >= COSTS


def test_recalibration_may_wrap_a_strategy_that_only_aligns() -> None:
    model, shared = narrow(0)
    world = trained_federation(permuted_copies(shared))
    strategy = rebasin(rebasin(finish=[]), align=None)
    outcome = strategy.start(world.grid, ArrayRecord(shared), num_rounds=1)
    assert_statistics(tensors(outcome.arrays), model, joint_data())
    metrics = outcome.train_metrics_clientapp[1]
    assert metrics["batchnorm-clients"] == 3
    assert metrics["rebasin-similarity-after"] == pytest.approx(1)


def test_without_finishing_steps_no_question_is_sent() -> None:
    _, shared = narrow(0)
    world = trained_federation(permuted_copies(shared))
    outcome = rebasin(finish=[]).start(world.grid, ArrayRecord(shared), num_rounds=1)
    assert_same(tensors(outcome.arrays), shared, rtol=1e-6, atol=1e-7)
    assert {message.metadata.message_type for message in world.sent} == {"train"}
    assert not any(key.startswith("batchnorm") for key in outcome.train_metrics_clientapp[1])


def test_only_clients_whose_models_were_used_are_asked() -> None:
    model, shared = narrow(0)
    copies = permuted_copies(shared)
    copies[2] = {**copies[2], "0.weight": copies[2]["0.weight"] * torch.nan}
    world = trained_federation(copies)
    outcome = rebasin().start(world.grid, ArrayRecord(shared), num_rounds=1)
    assert world.asked("train") == [1, 2, 3]
    assert world.asked("batchnorm") == [1, 3]
    assert_statistics(tensors(outcome.arrays), model, joint_data([1, 3]))


@pytest.mark.parametrize("options", [{}, {"align": None}], ids=["aligned", "unaligned"])
def test_a_round_without_a_result_asks_nothing(options: dict[str, object]) -> None:
    world = Federation(dict.fromkeys(NODES, failing))
    strategy = strategy_for(NET, **options)
    initial = ArrayRecord(random_state(ZOO[NET], 0))
    messages = strategy.configure_train(1, initial, ConfigRecord(), world.grid)
    replies = world.grid.send_and_receive(messages, timeout=1)
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert world.asked("batchnorm") == []
    assert world.asked("train") == [1, 2, 3]
