"""Laws of the BatchNorm query: exact pooling over real ClientApps, whatever single ones answer."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from federation import Answer, Federation, dropped, failing, prepare, tensors
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from helpers import State, assert_same, generic, random_state, state_of
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import ZOO, Entry

from fl_rebasin import derive_spec
from fl_rebasin.flower import (
    BatchNormRecalibration,
    ReBasinStrategy,
    add_batchnorm_handler,
    recalibrate_on_clients,
)

BARE = Entry(lambda: nn.BatchNorm1d(3), lambda: torch.zeros(2, 3), ())
NETS = {
    "itself-a-batchnorm": BARE,
    "conv-batchnorm-flatten": ZOO["conv-batchnorm-flatten"],
    "residual-batchnorm": ZOO["residual-batchnorm"],
}
NET = NETS["conv-batchnorm-flatten"]
STATISTICS = ("running_mean", "running_var")


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


def data(entry: Entry, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Batches that differ in mean and scale, so that no client's statistics are another's."""
    generator = torch.Generator().manual_seed(seed)
    shape = entry.inputs().shape[1:]
    return [
        torch.randn(size, *shape, generator=generator, dtype=torch.float64) * (seed + 1) + seed
        for size in sizes
    ]


SIZES = ([5], [11], [3, 2, 9])


def client_data(entry: Entry, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    return [
        [batch.to(dtype) for batch in data(entry, sizes, seed)] for seed, sizes in enumerate(SIZES)
    ]


def answering(
    build: Callable[[], nn.Module], batches: Iterable[object], trained: State | None = None
) -> ClientApp:
    """A client that answers the query, and trains to a given model with 10 examples."""
    app = ClientApp()
    add_batchnorm_handler(app, lambda context: (build(), batches))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        assert trained is not None
        metrics = MetricRecord({"num-examples": 10, "loss": 0.25})
        return Message(
            RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics}), reply_to=message
        )

    return app


def federation(entry: Entry, batches: Sequence[Sequence[Tensor]]) -> Federation:
    apps = [answering(lambda: entry.build().double(), each) for each in batches]
    return Federation(dict(enumerate(apps, start=1)))


def statistics_keys(model: nn.Module) -> list[str]:
    return [key for key in model.state_dict() if key.endswith(STATISTICS)]


def seen_statistics(model: nn.Module, batches: Iterable[Tensor]) -> State:
    """Mean and unbiased variance of all that each BatchNorm layer is fed, taken directly."""
    model = copy.deepcopy(model).eval()
    fed: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.train()
            layer.register_forward_pre_hook(
                lambda _, args, name=name: fed.setdefault(name, []).append(args[0].double())
            )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    found = {}
    for name, inputs in fed.items():
        values = torch.cat([part.movedim(1, -1).reshape(-1, part.shape[1]) for part in inputs])
        prefix = f"{name}." if name else ""
        found[f"{prefix}running_mean"] = values.mean(0)
        found[f"{prefix}running_var"] = values.var(0, correction=1)
    return found


def assert_statistics(arrays: ArrayRecord, model: nn.Module, batches: Iterable[Tensor]) -> None:
    """These arrays are the model's, but for the statistics, which are those of the batches."""
    expected = state_of(model) | {
        key: value.to(model.state_dict()[key].dtype)
        for key, value in seen_statistics(model, batches).items()
    }
    wide = next(model.parameters()).dtype == torch.float64
    tolerance = 1e-11 if wide else 2e-5
    assert_same(tensors(arrays), expected, rtol=tolerance, atol=tolerance)


# Exact pooling


@pytest.mark.parametrize("name", NETS)
def test_pooled_statistics_are_those_of_all_data_together(name: str) -> None:
    entry = NETS[name]
    model, batches = generic(entry, 0), client_data(entry)
    arrays = ArrayRecord(state_of(model))
    before = copy.deepcopy(arrays)
    world = federation(entry, batches)
    result, metrics = recalibrate_on_clients(world.grid, [1, 2, 3], entry.build(), arrays)

    assert_statistics(result, model, [batch for each in batches for batch in each])
    for key in arrays:
        changed = result[key] != arrays[key]
        assert changed == (key in statistics_keys(model)), key
    assert arrays == before
    assert metrics["batchnorm-clients"] == 3
    assert set(metrics) == {"batchnorm-clients", "batchnorm-seconds", "batchnorm-bytes"}
    assert metrics["batchnorm-bytes"] == world.bytes_of("batchnorm") > 0
    assert metrics["batchnorm-seconds"] > 0


@pytest.mark.parametrize("name", NETS)
def test_first_layer_has_what_one_training_step_on_the_joint_batch_gives(name: str) -> None:
    entry = NETS[name]
    model, (left, right, _) = generic(entry, 0), client_data(entry)
    world = federation(entry, [left, right])
    arrays = ArrayRecord(state_of(model))
    result, _ = recalibrate_on_clients(world.grid, [1, 2], entry.build(), arrays)

    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = 1.0
    model.train()(torch.cat([*left, *right]))
    for key in statistics_keys(model)[:2]:
        torch.testing.assert_close(
            tensors(result)[key], model.state_dict()[key], rtol=1e-11, atol=1e-11
        )


def test_labels_are_passed_over() -> None:
    model, batches = generic(NET, 0), client_data(NET)
    arrays = ArrayRecord(state_of(model))
    labelled = [
        (batches[0][0], torch.zeros(5)),
        [batches[1][0], "anything"],
    ]
    app = answering(lambda: NET.build().double(), labelled)
    result, _ = recalibrate_on_clients(Federation({1: app}).grid, [1], NET.build(), arrays)
    assert_statistics(result, model, [batches[0][0], batches[1][0]])


def test_only_the_nodes_named_are_asked_and_the_timeout_is_kept() -> None:
    model = generic(NET, 0)
    world = federation(NET, client_data(NET))
    arrays = ArrayRecord(state_of(model))
    result, _ = recalibrate_on_clients(world.grid, [1, 3], NET.build(), arrays, timeout=17)
    assert world.asked("batchnorm") == [1, 3]
    assert world.grid.send_and_receive.call_args.kwargs == {"timeout": 17}
    batches = client_data(NET)
    assert_statistics(result, model, [*batches[0], *batches[2]])


# Answers that are no good


def answer_with(change: Callable[[RecordDict], object]) -> Answer:
    """A client that changes its good answer before it leaves."""
    app = answering(lambda: NET.build().double(), client_data(NET)[2])

    def tampered(message: Message, context: Context) -> Message:
        reply = app(message, context)
        change(reply.content)
        return reply

    return tampered


def tampered(key: str, values: object) -> Answer:
    def change(content: RecordDict) -> None:
        content.array_records["statistics"][key] = Array(np.asarray(values))

    return answer_with(change)


def without(key: str) -> Answer:
    return answer_with(lambda content: content.array_records["statistics"].pop(key))


def with_garbage(content: RecordDict) -> None:
    old = content.array_records["statistics"]["2.mean"]
    content.array_records["statistics"]["2.mean"] = Array(
        dtype=old.dtype, shape=old.shape, stype=old.stype, data=b"garbage"
    )


def renamed(content: RecordDict) -> ArrayRecord:
    record = content.array_records["statistics"]
    return ArrayRecord({f"other.{key}": array for key, array in record.items()})


GOOD_MEAN, GOOD_VARIANCE = np.zeros(6), np.ones(6)

BAD: dict[str, tuple[Answer, str]] = {
    "no-handler": (ClientApp(), "No query function registered with name 'rebasin_batchnorm'"),
    "error": (failing, r"disk is full \(a ClientApp answers"),
    "no-data": (answering(lambda: NET.build().double(), []), "no batch.* to re-estimate"),
    "nan-data": (
        answering(lambda: NET.build().double(), [client_data(NET)[0][0] * torch.nan]),
        "2: the activations hold NaN or infinite values",
    ),
    "other-model": (
        answering(lambda: ZOO["mlp"].build().double(), client_data(NET)[0]),
        r"Error\(s\) in loading state_dict",
    ),
    "nan-mean": (tampered("2.mean", GOOD_MEAN * np.nan), "2: mean or variance is not finite"),
    "infinite-mean": (tampered("6.mean", [0, 0, 0, 0, np.inf]), "6: mean or variance is not"),
    "nan-variance": (tampered("2.variance", GOOD_VARIANCE * np.nan), "2: mean or variance is not"),
    "negative-variance": (tampered("2.variance", -GOOD_VARIANCE), "2: .*a variance is negative"),
    "words": (tampered("2.mean", ["nought"] * 6), "dtype <U6, which is no number"),
    "short-mean": (tampered("2.mean", GOOD_MEAN[:1]), r"2: expected 6 channels, got \(1,\)"),
    "short-variance": (tampered("2.variance", GOOD_VARIANCE[:1]), "2: expected 6 channels"),
    "flat-count": (tampered("2.count", 3), "2: expected 6 channels"),
    "counts": (tampered("2.count", [3] * 6), "2: expected 6 channels"),
    "zero-count": (tampered("2.count", [0]), "2: 0 is no number of values"),
    "negative-count": (tampered("2.count", [-4]), "2: -4 is no number of values"),
    "huge-count": (tampered("2.count", [10**16]), "2: 10000000000000000 is no number"),
    "broken-count": (
        tampered("2.count", [2.5]),
        "2: mean and variance must be floats, and the count an integer",
    ),
    "no-count": (without("6.count"), r"6\.count"),
    "no-mean": (without("6.mean"), r"6\.mean"),
    "no-variance": (without("6.variance"), r"6\.variance"),
    "other-layers": (
        answer_with(lambda content: content.update(statistics=renamed(content))),
        "it holds statistics of no layer",
    ),
    "no-record": (answer_with(lambda content: content.pop("statistics")), "statistics"),
    "garbage": (answer_with(with_garbage), "no array in NumPy's format"),
}


@pytest.mark.parametrize("place", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("case", BAD)
def test_bad_answer_is_dropped_and_the_rest_pooled(
    case: str, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    app, words = BAD[case]
    arrays = ArrayRecord(state_of(generic(NET, 0)))
    good = federation(NET, client_data(NET)[:2])
    expected, _ = recalibrate_on_clients(good.grid, [1, 2], NET.build(), arrays)
    assert "dropped" not in caplog.text

    good.apps[77] = app
    nodes = [1, 2]
    nodes.insert(place, 77)
    result, metrics = recalibrate_on_clients(good.grid, nodes, NET.build(), arrays)
    assert result == expected
    assert metrics["batchnorm-clients"] == 2
    (line,) = [record for record in caplog.records if "dropped" in record.getMessage()]
    assert line.levelno == logging.WARNING
    assert re.match(
        rf"BatchNorm statistics of node 77 dropped: .*{words}.*add_batchnorm_handler",
        line.getMessage(),
    )
    assert "pooled from 2 of 3 clients" in caplog.text


OVERFLOWING = {
    "mean": tampered("2.mean", GOOD_MEAN + 1e39),
    "square-of-mean": tampered("2.mean", GOOD_MEAN + 1e200),
    "variance": tampered("2.variance", GOOD_VARIANCE * 1e39),
}


@pytest.mark.parametrize("case", OVERFLOWING)
def test_answer_beyond_the_models_dtype_leaves_it_finite(case: str) -> None:
    world = federation(NET, client_data(NET))
    world.apps[2] = OVERFLOWING[case]
    arrays = ArrayRecord(random_state(NET, 0))
    result, _ = recalibrate_on_clients(world.grid, [1, 2, 3], NET.build(), arrays)
    assert all(bool(torch.isfinite(value).all()) for value in tensors(result).values())


class WithSpare(nn.Module):
    """A BatchNorm layer beside the one that inference runs through."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.spare = nn.BatchNorm1d(3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs)


def test_layer_that_inference_never_runs_keeps_its_statistics() -> None:
    model = WithSpare()
    batch = data(BARE, [5], 1)[0].float()
    world = Federation({1: answering(WithSpare, [batch])})
    arrays = ArrayRecord(state_of(model))
    result, metrics = recalibrate_on_clients(world.grid, [1], model, arrays)
    assert metrics["batchnorm-clients"] == 1
    assert_statistics(result, model, [batch])


def test_layer_that_one_client_lacks_is_pooled_from_the_rest() -> None:
    def without_the_first(content: RecordDict) -> None:
        for key in ("count", "mean", "variance"):
            content.array_records["statistics"].pop(f"2.{key}")
        content.array_records["statistics"]["9.mean"] = Array(np.full(5, np.nan))

    arrays = ArrayRecord(state_of(generic(NET, 0)))
    world = federation(NET, client_data(NET))
    everybody, _ = recalibrate_on_clients(world.grid, [1, 2, 3], NET.build(), arrays)
    others, _ = recalibrate_on_clients(world.grid, [1, 2], NET.build(), arrays)
    world.apps[3] = answer_with(without_the_first)
    result, metrics = recalibrate_on_clients(world.grid, [1, 2, 3], NET.build(), arrays)
    assert metrics["batchnorm-clients"] == 3
    for key in STATISTICS:
        assert result[f"2.{key}"] == others[f"2.{key}"] != everybody[f"2.{key}"]
        assert result[f"6.{key}"] == everybody[f"6.{key}"] != others[f"6.{key}"]


def as_mock(reply: Message) -> Message:
    mock = Mock(spec=Message)
    mock.metadata.src_node_id = reply.metadata.src_node_id
    mock.has_error.return_value = reply.has_error()
    for name in ("error",) if reply.has_error() else ("content",):
        setattr(mock, name, getattr(reply, name))
    return mock


def test_mock_replies_are_read_as_well() -> None:
    arrays = ArrayRecord(state_of(generic(NET, 0)))
    world = federation(NET, client_data(NET))
    world.apps[2] = failing
    expected, _ = recalibrate_on_clients(world.grid, [1, 2, 3], NET.build(), arrays)
    world.grid.send_and_receive.side_effect = lambda messages, timeout: map(
        as_mock, world.deliver(messages, timeout=timeout)
    )
    result, metrics = recalibrate_on_clients(world.grid, [1, 2, 3], NET.build(), arrays)
    assert result == expected
    assert metrics["batchnorm-clients"] == 2


@pytest.mark.parametrize("apps", [{1: None, 2: None}, {1: failing, 2: ClientApp()}, {}])
def test_without_good_answers_the_arrays_stay(
    apps: dict[int, Answer | None], caplog: pytest.LogCaptureFixture
) -> None:
    arrays = ArrayRecord(state_of(generic(NET, 0)))
    before = copy.deepcopy(arrays)
    result, metrics = recalibrate_on_clients(Federation(apps).grid, list(apps), NET.build(), arrays)
    assert result == before
    assert metrics["batchnorm-clients"] == 0
    assert f"pooled from 0 of {len(apps)} clients" in caplog.text
    assert len(dropped(caplog)) == len(apps)


def test_a_silent_node_is_not_waited_for_but_named(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = generic(NET, 0), client_data(NET)
    world = federation(NET, batches)
    world.apps[2] = None
    arrays = ArrayRecord(state_of(model))
    result, metrics = recalibrate_on_clients(world.grid, [1, 2, 3], NET.build(), arrays)
    assert metrics["batchnorm-clients"] == 2
    assert_statistics(result, model, [*batches[0], *batches[2]])
    assert dropped(caplog) == ["BatchNorm statistics of node 2 dropped: no answer"]


@pytest.mark.parametrize(
    "model",
    [ZOO["mlp"].build(), nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))],
    ids=["no-batchnorm", "no-running-statistics"],
)
def test_model_without_statistics_sends_no_message(model: nn.Module) -> None:
    world = federation(NET, client_data(NET))
    arrays = ArrayRecord(state_of(model))
    result, metrics = recalibrate_on_clients(world.grid, [1, 2, 3], model, arrays)
    assert result is arrays
    assert metrics == {}
    world.grid.send_and_receive.assert_not_called()


# The client's side


def test_answering_changes_nothing_of_a_client_but_its_weights() -> None:
    own = generic(NET, 1).train()
    own[3].eval()
    batches = client_data(NET)[2]
    batches_before = copy.deepcopy(batches)
    app = ClientApp()
    add_batchnorm_handler(app, lambda context: (own, batches))
    world = Federation({1: app})
    world.contexts[1] = Context(1, 1, {}, RecordDict(), {})
    world.contexts[1].state["counter"] = MetricRecord({"round": 4})
    context_before = copy.deepcopy(world.contexts[1])
    arrays = ArrayRecord(state_of(generic(NET, 0)))
    recalibrate_on_clients(world.grid, [1], NET.build(), arrays)

    assert world.contexts[1] == context_before
    assert_same(dict(enumerate(batches)), dict(enumerate(batches_before)), rtol=0, atol=0)
    # The weights and statistics are those that were asked about, not those of the local data.
    assert ArrayRecord(state_of(own)) == arrays
    assert [module.training for module in own] == [True, True, True, False, *[True] * 5]
    assert not any(module._forward_pre_hooks for module in own.modules())
    assert all(parameter.grad is None for parameter in own.parameters())


def test_load_is_given_the_clients_context() -> None:
    seen: list[int] = []

    def load(context: Context) -> tuple[nn.Module, list[Tensor]]:
        seen.append(context.node_id)
        return NET.build().double(), client_data(NET)[0]

    app = ClientApp()
    add_batchnorm_handler(app, load)
    arrays = ArrayRecord(state_of(generic(NET, 0)))
    recalibrate_on_clients(Federation({5: app, 9: app}).grid, [5, 9], NET.build(), arrays)
    assert seen == [5, 9]


# Whole rounds


def narrow(entry: Entry, seed: int) -> tuple[nn.Module, State]:
    """A float32 model and its state dict."""
    state = random_state(entry, seed)
    model = entry.build()
    model.load_state_dict(state)
    return model, state


def trained_federation(states: Sequence[State]) -> Federation:
    batches = client_data(NET, torch.float32)
    apps = [answering(NET.build, each, state) for each, state in zip(batches, states, strict=True)]
    return Federation(dict(enumerate(apps, start=1)))


def joint_data() -> list[Tensor]:
    return [batch for each in client_data(NET, torch.float32) for batch in each]


def permuted_copies(state: State, count: int = 3) -> list[State]:
    spec, generator = derive_spec(NET.build(), NET.inputs()), torch.Generator().manual_seed(0)
    return [spec.apply(spec.random(generator), state) for _ in range(count)]


def test_recalibration_wraps_fedavg_from_start_to_end() -> None:
    states = [random_state(NET, seed) for seed in range(3)]
    world = trained_federation(states)
    initial = ArrayRecord(random_state(NET, 7))
    strategy = BatchNormRecalibration(FedAvg(fraction_evaluate=0.0), model=NET.build())
    outcome = strategy.start(world.grid, initial, num_rounds=2)

    mean = NET.build()
    mean.load_state_dict({key: sum(state[key] for state in states) / 3 for key in states[0]})
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
        assert set(metrics) == {
            "loss", "batchnorm-clients", "batchnorm-seconds", "batchnorm-bytes"
        }  # fmt: skip
        assert metrics["batchnorm-clients"] == 3
        assert metrics["loss"] == pytest.approx(0.25)


def rebasin(inner: Strategy | None = None, recalibrate_batchnorm: bool = True) -> ReBasinStrategy:
    inner = FedAvg(fraction_evaluate=0.0) if inner is None else inner
    return ReBasinStrategy(
        inner,
        model=NET.build(),
        example_inputs=NET.inputs(),
        recalibrate_batchnorm=recalibrate_batchnorm,
    )


def test_aligning_strategy_recalibrates_from_start_to_end() -> None:
    model, shared = narrow(NET, 0)
    world = trained_federation(permuted_copies(shared))
    outcome = rebasin().start(world.grid, ArrayRecord(shared), num_rounds=2)
    assert_statistics(outcome.arrays, model, joint_data())
    assert world.asked("batchnorm") == world.asked("train") == [1, 1, 2, 2, 3, 3]
    for metrics in outcome.train_metrics_clientapp.values():
        assert metrics["batchnorm-clients"] == 3
        assert metrics["rebasin-similarity-after"] == pytest.approx(1)
        assert metrics["loss"] == pytest.approx(0.25)
        assert "batchnorm-seconds" in metrics


def test_aligning_strategy_inside_the_recalibrating_one_does_the_same() -> None:
    model, shared = narrow(NET, 0)
    world = trained_federation(permuted_copies(shared))
    inner = rebasin(recalibrate_batchnorm=False)
    strategy = BatchNormRecalibration(inner, model=NET.build())
    outcome = strategy.start(world.grid, ArrayRecord(shared), num_rounds=1)
    assert_statistics(outcome.arrays, model, joint_data())
    metrics = outcome.train_metrics_clientapp[1]
    assert metrics["batchnorm-clients"] == 3
    assert metrics["rebasin-similarity-after"] == pytest.approx(1)


def test_without_recalibration_no_query_is_sent() -> None:
    _, shared = narrow(NET, 0)
    world = trained_federation(permuted_copies(shared))
    strategy = rebasin(recalibrate_batchnorm=False)
    outcome = strategy.start(world.grid, ArrayRecord(shared), num_rounds=1)
    assert_same(tensors(outcome.arrays), shared, rtol=1e-6, atol=1e-7)
    assert {message.metadata.message_type for message in world.sent} == {"train"}
    assert not any(key.startswith("batchnorm") for key in outcome.train_metrics_clientapp[1])


def test_aligning_strategy_asks_only_clients_whose_models_were_used() -> None:
    model, shared = narrow(NET, 0)
    copies = permuted_copies(shared)
    copies[1] = {**copies[1], "0.weight": copies[1]["0.weight"] * torch.nan}
    world = trained_federation(copies)
    outcome = rebasin().start(world.grid, ArrayRecord(shared), num_rounds=1)
    assert world.asked("train") == [1, 2, 3]
    assert world.asked("batchnorm") == [1, 3]
    batches = client_data(NET, torch.float32)
    assert_statistics(outcome.arrays, model, [*batches[0], *batches[2]])


@pytest.mark.parametrize("wrap", [rebasin, lambda s: BatchNormRecalibration(s, model=NET.build())])
def test_round_without_a_result_sends_no_query(wrap: Callable[[Strategy], Strategy]) -> None:
    world = federation(NET, client_data(NET))
    for app in world.apps:
        world.apps[app] = failing
    strategy = wrap(FedAvg())
    initial = ArrayRecord(random_state(NET, 0))
    messages = strategy.configure_train(1, initial, ConfigRecord(), world.grid)
    replies = world.grid.send_and_receive(messages, timeout=1)
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert world.asked("batchnorm") == []
    assert world.asked("train") == [1, 2, 3]


def test_everything_else_is_the_wrapped_strategys(caplog: pytest.LogCaptureFixture) -> None:
    inner = Mock(spec=Strategy)
    strategy = BatchNormRecalibration(inner, model=NET.build())
    arrays, config, grid = ArrayRecord(), ConfigRecord({"lr": 0.1}), Mock(spec=Grid)
    message = Message(RecordDict(), dst_node_id=2, message_type="train")

    inner.configure_train.return_value = iter([message])
    assert list(strategy.configure_train(3, arrays, config, grid)) == [message]
    inner.configure_train.assert_called_once_with(3, arrays, config, grid)
    inner.configure_evaluate.return_value = [message]
    assert strategy.configure_evaluate(3, arrays, config, grid) == [message]
    inner.configure_evaluate.assert_called_once_with(3, arrays, config, grid)
    inner.aggregate_evaluate.return_value = MetricRecord({"accuracy": 0.5})
    assert strategy.aggregate_evaluate(3, [message]) == MetricRecord({"accuracy": 0.5})
    inner.aggregate_evaluate.assert_called_once_with(3, [message])
    strategy.summary()
    inner.summary.assert_called_once_with()
    assert "BatchNorm statistics re-estimated on the clients" in caplog.text


def test_wrapped_strategy_is_fedavg_by_default() -> None:
    assert type(BatchNormRecalibration(model=NET.build()).strategy) is FedAvg
