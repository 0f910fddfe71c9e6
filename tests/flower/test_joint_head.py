"""The joint head over clients: the same as in one place, whatever single clients answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from federation import (
    ODD_NODE,
    Answer,
    Federation,
    batches_of,
    changing,
    dropped,
    federation,
    put,
    run_round,
    strangers,
    strategy_for,
)
from flwr.app import Context, Message, MetricRecord, RecordDict
from helpers import State, assert_same, random_state
from torch import nn
from zoo import ZOO

from fl_rebasin import fit_joint_head
from fl_rebasin.flower import BatchNorm, Guard, JointHead, LeastSquares

NET = "conv-batchnorm-flatten"
CLASSES = 4
SIZES = {5: [60], 8: [40, 40], ODD_NODE: [30, 50]}
WEIGHTS = {5: 60.0, 8: 80.0, ODD_NODE: 80.0}


def data() -> dict[int, list[Any]]:
    shape = ZOO[NET].inputs().shape[1:]
    return {
        node: batches_of(shape, sizes, seed=node % 4, classes=CLASSES)
        for node, sizes in SIZES.items()
    }


def finished(world: Federation, **options: Any) -> tuple[State, MetricRecord]:
    strategy = strategy_for(NET, **options)
    global_model = random_state(ZOO[NET], 0)
    return run_round(strategy, world, global_model, strangers(NET, SIZES), WEIGHTS)


def in_one_place(nodes: list[int]) -> State:
    merged, _ = finished(federation(NET, data()), finish=[BatchNorm()])
    batches = [data()[node] for node in nodes]
    return dict(fit_joint_head(ZOO[NET].build(), merged, batches))


def test_the_head_over_messages_is_the_head_in_one_place() -> None:
    world = federation(NET, data())
    found, metrics = finished(world, finish=[BatchNorm(), JointHead()])
    assert_same(found, in_one_place(list(SIZES)), rtol=1e-4, atol=1e-5)
    assert metrics["joint-head-messages"] == 10
    assert metrics["joint-head-clients"] == len(SIZES)
    assert world.asked("joint_head_features") == sorted(SIZES)
    assert world.asked("joint_head") == sorted(9 * list(SIZES))
    both = world.bytes_of("joint_head_features") + world.bytes_of("joint_head")
    assert metrics["joint-head-bytes"] == both


def test_clients_send_sums_of_these_shapes_only() -> None:
    world = federation(NET, data())
    finished(world, finish=[BatchNorm(), JointHead()])
    shapes = {
        message.metadata.message_type: {
            key: tuple(array.shape)
            for key, array in message.content.array_records["answer"].items()
        }
        for message in world.replies
        if "joint_head" in message.metadata.message_type
    }
    features = shapes["query.rebasin_joint_head_features"]["gram"][0]
    assert shapes == {
        "query.rebasin_joint_head_features": {
            "gram": (features, features),
            "class-sums": (features, CLASSES),
        },
        "query.rebasin_joint_head": {
            "probability-sums": (features, CLASSES),
            "squares": (CLASSES,),
            "losses": (2,),
            "held-back": (1,),
        },
    }


def test_clients_keep_the_features_of_the_merged_model() -> None:
    world = federation(NET, data())
    strategy = strategy_for(NET, finish=[JointHead()])
    entry = ZOO[NET]
    result, _ = run_round(strategy, world, random_state(entry, 0), strangers(NET, SIZES), WEIGHTS)
    kept = world.contexts[5].state.array_records["rebasin/features"]["values"].numpy()
    assert kept.shape[0] == sum(SIZES[5])
    model = entry.build().eval()
    model.load_state_dict(result)
    seen: list[torch.Tensor] = []
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.cat([inputs for inputs, _ in data()[5]]))
    np.testing.assert_allclose(kept[:, :-1], seen[0].numpy(), rtol=1e-5, atol=1e-6)


def silent_after(messages: int) -> Callable[[Answer], Answer]:
    """A client that fails once it has answered so many questions about heads."""

    def odd(app: Answer) -> Answer:
        answered = 0

        def answer(message: Message, context: Context) -> Message:
            nonlocal answered
            if message.metadata.message_type == "query.rebasin_joint_head":
                answered += 1
                if answered > messages:
                    raise OSError("the disk is full")
            return app(message, context)

        return answer

    return odd


@pytest.mark.parametrize("messages", [0, 1, 4])
def test_a_client_that_falls_silent_is_left_out(
    messages: int, caplog: pytest.LogCaptureFixture
) -> None:
    world = federation(NET, data(), odd=silent_after(messages))
    found, metrics = finished(world, finish=[BatchNorm(), JointHead(messages=60)])
    merged, _ = finished(federation(NET, data()), finish=[BatchNorm()])
    others = [data()[node] for node in (5, 8)]
    expected = fit_joint_head(ZOO[NET].build(), merged, others, JointHead(messages=60))
    losses = [loss_of(state, [5, 8]) for state in (found, dict(expected), merged)]
    assert losses[0] - losses[1] < 0.1 * (losses[2] - losses[1])
    assert metrics["joint-head-clients"] == 2
    assert len(dropped(caplog)) == 1


def loss_of(state: State, nodes: list[int]) -> float:
    model = ZOO[NET].build().eval()
    model.load_state_dict(state)
    pairs = [pair for node in nodes for pair in data()[node]]
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x), y, reduction="sum") for x, y in pairs]
    return float(sum(losses)) / sum(len(y) for _, y in pairs)


def scaled(question: str, key: str, factor: float) -> Callable[[Answer], Answer]:
    def change(content: RecordDict) -> None:
        values = content.array_records["answer"][key].numpy()
        put(content, "answer", key, values * factor)

    return lambda app: changing(app, question, change)


def shifted(question: str, key: str, values: Any) -> Callable[[Answer], Answer]:
    return lambda app: changing(app, question, lambda content: put(content, "answer", key, values))


def times_a_thousand(content: RecordDict) -> None:
    """The sums of a client whose features are a thousand times as large; consistent otherwise."""
    arrays = content.array_records["answer"]
    scale = np.full((len(arrays["gram"].numpy()), 1), 1e3)
    scale[-1] = 1
    put(content, "answer", "gram", arrays["gram"].numpy() * scale * scale.T)
    put(content, "answer", "class-sums", arrays["class-sums"].numpy() * scale)


def correlated_beyond_one(content: RecordDict) -> None:
    """Two features that correlate by more than 1."""
    values = content.array_records["answer"]["gram"].numpy().copy()
    values[0, 1] = values[1, 0] = 2 * (values[0, 0] * values[1, 1]) ** 0.5 + 1
    put(content, "answer", "gram", values)


def first_feature(question: str, key: str) -> Callable[[Answer], Answer]:
    """Add to the sums of one feature what no example can add."""

    def change(content: RecordDict) -> None:
        values = content.array_records["answer"][key].numpy().copy()
        values[0] += 1e6
        put(content, "answer", key, values)

    return lambda app: changing(app, question, change)


LIES: dict[str, tuple[Callable[[Answer], Answer], str]] = {
    "vast-gram": (scaled("joint_head_features", "gram", 1e40), "gram is not finite or too large"),
    "negative-gram": (scaled("joint_head_features", "gram", -1.0), "negative diagonal"),
    "larger-class-sums": (scaled("joint_head_features", "class-sums", 50.0), "not all examples"),
    "larger-features": (
        lambda app: changing(app, "joint_head_features", times_a_thousand),
        "the mean square of its features is",
    ),
    "impossible-class-sums": (
        first_feature("joint_head_features", "class-sums"),
        "class-sums holds a sum beyond what its examples allow",
    ),
    "impossible-probability-sums": (
        first_feature("joint_head", "probability-sums"),
        "probability-sums holds a sum beyond what its examples allow",
    ),
    "impossible-gram": (
        lambda app: changing(app, "joint_head_features", correlated_beyond_one),
        "X^T X has an entry beyond what its diagonal allows",
    ),
    "single": (
        shifted("joint_head_features", "gram", np.zeros((2, 2), dtype=np.float32)),
        "gram is torch.float32 of shape",
    ),
    "larger-sums": (scaled("joint_head", "probability-sums", 50.0), "do not sum to the number"),
    "larger-squares": (scaled("joint_head", "squares", 50.0), "exceed the probabilities"),
    "negative-loss": (scaled("joint_head", "losses", -1.0), "a loss is negative"),
    "nan-loss": (scaled("joint_head", "losses", float("nan")), "losses is not finite"),
    "count": (
        shifted("joint_head", "held-back", np.array([10**12])),
        "is not a number of held-back examples",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_impossible_sums_are_dropped_and_named(case: str, caplog: pytest.LogCaptureFixture) -> None:
    odd, words = LIES[case]
    found, metrics = finished(federation(NET, data(), odd=odd), finish=[BatchNorm(), JointHead()])
    assert metrics["joint-head-clients"] >= 2
    assert words in caplog.text
    assert_same(found, in_one_place([5, 8]), rtol=1e-3, atol=1e-4)


def test_a_client_has_no_more_weight_than_the_examples_of_its_reply() -> None:
    """Ten times the data, all else equal, counts as the data once."""
    honest = data()
    repeated = {**honest, ODD_NODE: 10 * honest[ODD_NODE]}
    found, _ = finished(federation(NET, repeated), finish=[JointHead()])
    expected, _ = finished(federation(NET, honest), finish=[JointHead()])
    assert loss_of(found, [5, 8]) == pytest.approx(loss_of(expected, [5, 8]), rel=0.02)
    strategy = strategy_for(NET, finish=[JointHead()])
    vast = {**WEIGHTS, ODD_NODE: 10 * WEIGHTS[ODD_NODE]}
    world, model = federation(NET, repeated), random_state(ZOO[NET], 0)
    heavy, _ = run_round(strategy, world, model, strangers(NET, SIZES), vast)
    assert loss_of(heavy, [5, 8]) > 1.05 * loss_of(found, [5, 8])


def test_where_no_client_answers_the_model_is_the_one_before() -> None:
    silent = Federation(dict.fromkeys(SIZES))
    found, metrics = finished(silent, finish=[JointHead()])
    expected, _ = finished(silent, finish=[])
    assert_same(found, expected, rtol=0, atol=0)
    assert metrics["joint-head-clients"] == 0


def test_the_guard_can_choose_it() -> None:
    world = federation(NET, data(), data())
    finish = [LeastSquares(), JointHead()]
    _, metrics = finished(world, finish=finish, guard=Guard(), align=None)
    losses = {key: value for key, value in metrics.items() if key.startswith("guard-loss-")}
    assert list(losses) == [
        "guard-loss-aligned",
        "guard-loss-aligned+least-squares",
        "guard-loss-aligned+least-squares+joint-head",
    ]
    assert min(losses, key=losses.__getitem__) == "guard-loss-aligned+least-squares+joint-head"


def test_batches_without_labels_skip_the_step(caplog: pytest.LogCaptureFixture) -> None:
    inputs = {node: [pair[0] for pair in pairs] for node, pairs in data().items()}
    found, _ = finished(federation(NET, inputs), finish=[BatchNorm(), JointHead()])
    expected, _ = finished(federation(NET, inputs), finish=[BatchNorm()])
    assert_same(found, expected, rtol=0, atol=0)
    assert "needs batches of inputs and labels" in caplog.text
