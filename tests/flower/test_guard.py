"""Laws of the guard: the best candidate wins, and the wrapped strategy keeps the state of it."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from federation import (
    ODD_NODE,
    Aggregate,
    Answer,
    Federation,
    batches_of,
    changing,
    dropped,
    failing,
    federation,
    one_round,
    put,
    put_payload,
    replies_of,
    run_round,
    strangers,
    strategy_for,
    tensors,
    vast,
)
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    Strategy,
)
from helpers import State, assert_same, random_state
from torch.nn import functional as F
from zoo import ZOO

from fl_rebasin.flower import (
    ActivationMatching,
    ClassAwareHead,
    Guard,
    LeastSquares,
    ReBasinStrategy,
    RegMean,
    add_rebasin_handlers,
)
from fl_rebasin.flower.guard import _mean_loss
from fl_rebasin.matching.many import align_many
from fl_rebasin.merging.heads import class_aware_head, without_label_prior
from fl_rebasin.merging.least_squares import fit_least_squares
from fl_rebasin.merging.merge_many import merge_many
from fl_rebasin.state_dicts import average

NET = "mlp"
WITH_NORM = "conv-batchnorm-flatten"
CLASSES = 4
WEIGHTS = {1: 10.0, 2: 40.0, ODD_NODE: 20.0}
NAMES = ("aligned", "naive", "reference")
NAN, INF = float("nan"), float("inf")


def guarded(inner: Strategy | None = None, name: str = NET, **options: Any) -> ReBasinStrategy:
    """A strategy with a guard that has checked the wrapped strategy."""
    entry = ZOO[name]
    return ReBasinStrategy(
        inner, model=entry.build(), example_inputs=entry.inputs(), guard=Guard(), **options
    )


def plain_guard(name: str = NET) -> ReBasinStrategy:
    """A guard around FedAvg, without finishing steps."""
    return strategy_for(name, guard=Guard(), finish=[])


def models_of(name: str = NET) -> dict[int, State]:
    return strangers(name, WEIGHTS, first_seed=7)


def guarded_round(
    strategy: Strategy,
    world: Federation,
    name: str = NET,
    global_model: State | None = None,
    states: Mapping[int, State] | None = None,
    server_round: int = 1,
    **metrics: Any,
) -> tuple[State, MetricRecord]:
    """Run a round; by default the models are independent."""
    return run_round(
        strategy,
        world,
        random_state(ZOO[name], 0) if global_model is None else global_model,
        models_of(name) if states is None else states,
        WEIGHTS,
        server_round,
        **metrics,
    )


def held_back(name: str = NET) -> dict[int, list[Any]]:
    """Held-back batches of each node."""
    shape = ZOO[name].inputs().shape[1:]
    return {
        node_id: batches_of(shape, [6, 2 + node_id % 5], seed=node_id % 6, classes=CLASSES)
        for node_id in WEIGHTS
    }


def own_data(name: str = NET, size: int = 30) -> dict[int, list[Any]]:
    """Unlabelled batches of each node."""
    shape = ZOO[name].inputs().shape[1:]
    return {node_id: batches_of(shape, [size], seed=node_id % 6) for node_id in WEIGHTS}


def honest(name: str = NET) -> Federation:
    return federation(name, own_data(name), held_back(name))


def judging(count: Any, losses: Any) -> Answer:
    """A client that answers the guard with these arrays."""
    app = ClientApp()

    @app.query("rebasin_guard")
    def evaluate(message: Message, context: Context) -> Message:
        record = ArrayRecord({"count": Array(np.asarray(count)), "losses": Array(losses)})
        return Message(RecordDict({"answer": record}), reply_to=message)

    return app


def verdict(count: int, losses: Sequence[float]) -> Answer:
    """A client with a well-formed answer."""
    return judging([count], np.array(losses, dtype=np.float64))


def choosing(best: int, candidates: int = 3) -> Federation:
    """A federation that finds one candidate best."""
    losses = [1.0 + (place != best) for place in range(candidates)]
    return Federation({node_id: verdict(5, losses) for node_id in WEIGHTS})


def offered(world: Federation) -> list[State]:
    """The candidates that the clients were sent; the same for each client."""
    found = [
        [tensors(record) for record in message.content.array_records.values()]
        for message in world.sent
        if message.metadata.message_type == "query.rebasin_guard"
    ]
    for others in found[1:]:
        for left, right in zip(found[0], others, strict=True):
            assert_same(left, right, rtol=0, atol=0)
    return found[0]


def judged(metrics: MetricRecord) -> list[str]:
    """Names of the candidates with a held-back loss."""
    prefix = "guard-loss-"
    return [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]


def candidates(name: str = NET, global_model: State | None = None) -> dict[str, list[State]]:
    """The models that each candidate averages, found in one place."""
    models, weights = list(models_of(name).values()), list(WEIGHTS.values())
    order_of = random_state(ZOO[name], 0) if global_model is None else global_model
    spec = plain_guard(name).spec
    to_heaviest = align_many(spec, models, weights, unit_order_of=order_of, method="reference")
    found = {
        "aligned": merge_many(spec, models, weights, unit_order_of=order_of).permutations,
        "naive": [spec.identity()] * 3,
        "reference": to_heaviest.permutations,
    }
    return {
        candidate: [spec.apply(*pair) for pair in zip(permutations, models, strict=True)]
        for candidate, permutations in found.items()
    }


def scaled(state: State) -> dict[int, State]:
    """Models in which no unit needs to move."""
    return {
        node_id: {key: value * (1 + 1e-3 * place) for key, value in state.items()}
        for place, node_id in enumerate(WEIGHTS)
    }


# The candidates


@pytest.mark.parametrize("name", [NET, WITH_NORM])
def test_candidates_are_the_aligned_the_naive_and_the_reference_average(name: str) -> None:
    world = choosing(0)
    _, metrics = guarded_round(plain_guard(name), world, name)
    models = offered(world)
    assert len(models) == 3
    for (_, aligned), model in zip(candidates(name).items(), models, strict=True):
        assert_same(model, average(aligned, list(WEIGHTS.values())), rtol=1e-5, atol=1e-6)
    key = "1.weight" if name == NET else "0.weight"
    assert not torch.allclose(models[0][key], models[2][key])
    assert judged(metrics) == list(NAMES)


def test_two_clients_have_no_third_candidate() -> None:
    world = choosing(0, candidates=2)
    states = {node_id: models_of()[node_id] for node_id in (1, 2)}
    _, metrics = guarded_round(plain_guard(), world, states=states)
    assert len(offered(world)) == 2
    assert metrics["guard-clients"] == 2
    assert judged(metrics) == ["aligned", "naive"]


LABEL_COUNTS = {1: [9, 0, 1, 5], 2: [0, 3, 20, 1], ODD_NODE: [1, 1, 1, 0]}


def finished(aligned: Sequence[State]) -> dict[str, State]:
    """The average of aligned models after each of two finishing steps, found in one place."""
    tables = [torch.tensor(each) for each in LABEL_COUNTS.values()]
    plain = average(aligned, list(WEIGHTS.values()))
    headed = class_aware_head(plain, aligned, tables, "6.weight", "6.bias")
    corrected = [
        without_label_prior(model, own, sum(tables), "6.bias")
        for model, own in zip(aligned, tables, strict=True)
    ]
    fitted = fit_least_squares(ZOO[NET].build(), headed, corrected, list(own_data().values()))
    return {"": plain, "+class-aware-head": headed, "+class-aware-head+least-squares": fitted}


def test_each_alignment_is_a_candidate_after_each_finishing_step() -> None:
    world = honest()
    steps = [ClassAwareHead("labels"), LeastSquares(label_counts="labels")]
    _, metrics = guarded_round(guarded(finish=steps), world, labels=LABEL_COUNTS)
    expected = {
        candidate + variant: model
        for candidate, aligned in candidates().items()
        for variant, model in finished(aligned).items()
    }
    assert judged(metrics) == list(expected)
    models = offered(world)
    for model, wanted in zip(models, expected.values(), strict=True):
        assert_same(model, wanted, rtol=2e-4, atol=2e-5)
    # The costs of the three alignments are added up.
    assert metrics["least-squares-messages"] == 9
    assert metrics["least-squares-bytes"] == world.bytes_of("least_squares")


def test_a_step_that_no_client_answers_is_no_candidate() -> None:
    world = federation(NET, dict.fromkeys(WEIGHTS, ()), held_back())
    _, metrics = guarded_round(guarded(finish=[LeastSquares()]), world)
    assert judged(metrics) == list(NAMES)
    assert len(offered(world)) == 3
    assert metrics["least-squares-clients"] == 0


def test_invalid_label_counts_are_logged_once_for_all_candidates(
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = [ClassAwareHead("labels"), RegMean(label_counts="labels")]
    counts = {**LABEL_COUNTS, 2: [0, -3, 20, 1]}
    world = honest()
    guarded_round(guarded(finish=steps), world, labels=counts)
    assert len(offered(world)) == 9
    (line,) = dropped(caplog)
    assert line.startswith("label counts of node 2 dropped: ")


def test_each_candidate_has_its_own_batchnorm_statistics() -> None:
    world = honest(WITH_NORM)
    _, metrics = guarded_round(guarded(name=WITH_NORM), world, WITH_NORM)
    assert world.asked("batchnorm") == sorted(3 * list(WEIGHTS))
    assert metrics["batchnorm-bytes"] == world.bytes_of("batchnorm")
    assert metrics["batchnorm-messages"] == 3
    joint = torch.cat([batch for batches in own_data(WITH_NORM).values() for batch in batches])
    for model in offered(world):
        seen = F.max_pool2d(F.conv2d(joint, model["0.weight"]), 2)
        torch.testing.assert_close(
            model["2.running_mean"], seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-4
        )


def test_a_least_squares_candidate_competes_with_one_that_has_batchnorm_statistics() -> None:
    world = honest(WITH_NORM)
    strategy = guarded(name=WITH_NORM, finish=[LeastSquares()])
    _, metrics = guarded_round(strategy, world, WITH_NORM)
    assert judged(metrics) == [
        candidate + variant for candidate in NAMES for variant in ("", "+least-squares")
    ]
    joint = torch.cat([batch for batches in own_data(WITH_NORM).values() for batch in batches])
    for model in offered(world)[::2]:
        seen = F.max_pool2d(F.conv2d(joint, model["0.weight"]), 2)
        torch.testing.assert_close(
            model["2.running_mean"], seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-4
        )


def test_where_no_unit_moves_no_client_judges() -> None:
    global_model = random_state(ZOO[NET], 0)
    states = scaled(global_model)
    world = choosing(1)
    inner = Counting()
    result, metrics = guarded_round(guarded(inner), world, global_model=global_model, states=states)
    assert world.sent == []
    assert inner.rounds == 1
    assert not any(key.startswith("guard") for key in metrics)
    assert_same(result, average(list(states.values()), list(WEIGHTS.values())), rtol=0, atol=1e-6)


def test_where_no_unit_moves_least_squares_are_judged_nevertheless() -> None:
    global_model = random_state(ZOO[NET], 0)
    world = honest()
    _, metrics = guarded_round(
        guarded(finish=[LeastSquares()]),
        world,
        global_model=global_model,
        states=scaled(global_model),
    )
    assert world.asked("guard") == sorted(WEIGHTS)
    assert judged(metrics) == ["aligned", "aligned+least-squares"]


# Which candidate wins


VERDICTS: dict[str, tuple[dict[int, tuple[int, list[float]]], str]] = {
    "first": ({1: (5, [1.0, 2.0, 3.0]), 2: (5, [1.0, 2.0, 3.0])}, "aligned"),
    "second": ({1: (5, [2.0, 1.0, 3.0]), 2: (5, [2.0, 1.5, 3.0])}, "naive"),
    "third": ({1: (5, [2.0, 3.0, 1.0]), 2: (5, [2.0, 2.0, 1.0])}, "reference"),
    "tie-of-all": ({1: (5, [2.0, 2.0, 2.0]), 2: (7, [3.0, 3.0, 3.0])}, "aligned"),
    "tie-of-two": ({1: (5, [2.0, 1.0, 1.0]), 2: (7, [3.0, 2.0, 2.0])}, "naive"),
    # Means 2.5, 2.0; by examples 1.3, 2.0.
    "by-examples": ({1: (9, [1.0, 2.0, 9.0]), 2: (1, [4.0, 2.0, 9.0])}, "aligned"),
    "by-other-examples": ({1: (1, [1.0, 2.0, 9.0]), 2: (9, [4.0, 2.0, 9.0])}, "naive"),
    "diverged-on-one": ({1: (1, [NAN, 2.0, 3.0]), 2: (99, [1.0, 2.0, 3.0])}, "naive"),
    "infinite-on-one": ({1: (1, [INF, 2.0, 3.0]), 2: (99, [1.0, 2.0, 3.0])}, "naive"),
    "vast-on-one": ({1: (1, [1e7, 2.0, 3.0]), 2: (10**9, [1.0, 2.0, 3.0])}, "naive"),
    "each-diverged-once": ({1: (1, [INF, NAN, 3.0]), 2: (9, [1.0, 2.0, INF])}, "aligned"),
    "zero": ({1: (5, [1.0, 0.0, 3.0]), 2: (5, [1.0, 0.0, 3.0])}, "naive"),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
def test_lowest_example_weighted_loss_wins(case: str) -> None:
    scores, best = VERDICTS[case]
    apps: dict[int, Answer | None] = dict.fromkeys(WEIGHTS)
    apps |= {node_id: verdict(*score) for node_id, score in scores.items()}
    world = Federation(apps)
    result, metrics = guarded_round(plain_guard(), world)
    models = dict(zip(NAMES, offered(world), strict=True))
    assert_same(result, models[best], rtol=0, atol=0)
    assert metrics["guard-clients"] == len(scores)
    total = sum(count for count, _ in scores.values())
    for place, name in enumerate(NAMES):
        found = [losses[place] if losses[place] < 1e6 else INF for _, losses in scores.values()]
        counts = [count for count, _ in scores.values()]
        expected = sum(count * loss for count, loss in zip(counts, found, strict=True)) / total
        assert metrics[f"guard-loss-{name}"] == pytest.approx(expected)


def held_back_loss(name: str, state: State) -> float:
    """Mean loss over all held-back examples, each client at its best temperature."""
    model = ZOO[name].build().eval()
    model.load_state_dict(state)
    total, count = 0.0, 0
    for batches in held_back(name).values():
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        with torch.no_grad():
            logits = model(inputs)
        count += len(labels)
        total += len(labels) * min(
            float(F.cross_entropy(logits / temperature, labels))
            for temperature in np.sqrt(2) ** np.arange(-6, 9)
        )
    return total / count


@pytest.mark.parametrize("name", [NET, WITH_NORM])
def test_losses_are_those_of_the_candidates_on_held_back_data(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = federation(name, dict.fromkeys(WEIGHTS, ()), held_back(name))
    result, metrics = guarded_round(plain_guard(name), world, name)
    models = dict(zip(NAMES, offered(world), strict=True))
    losses = {candidate: held_back_loss(name, state) for candidate, state in models.items()}
    for candidate, loss in losses.items():
        assert metrics[f"guard-loss-{candidate}"] == pytest.approx(loss, rel=1e-5)
    best = min(losses, key=losses.__getitem__)
    assert_same(result, models[best], rtol=0, atol=0)
    assert metrics["guard-messages"] == 1
    assert metrics["guard-bytes"] == world.bytes_of("guard")
    table = rf"held-back loss of the candidates: aligned .*; {best} is chosen"
    assert re.search(table, caplog.text)


def test_a_model_that_is_only_more_confident_has_the_same_loss() -> None:
    torch.manual_seed(0)
    net, inputs = ZOO[NET].build(), torch.randn(200, 3, 2, 2)
    with torch.no_grad():
        pairs = [(inputs, torch.softmax(4 * net(inputs), 1).multinomial(1).flatten())]
    confident = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in list(confident.parameters())[-2:]:
            parameter.mul_(2)
    assert _mean_loss(net, pairs) == pytest.approx(_mean_loss(confident, pairs))
    rolled = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in list(rolled.parameters())[-2:]:
            parameter.copy_(parameter.roll(1, 0))
    assert _mean_loss(net, pairs) != pytest.approx(_mean_loss(rolled, pairs))


def test_judging_leaves_the_modes_of_the_clients_model_and_creates_no_gradients() -> None:
    own = ZOO[WITH_NORM].build().train()
    own[3].eval()
    app = ClientApp()
    pairs = held_back(WITH_NORM)[1]
    add_rebasin_handlers(app, lambda context: (own, []), lambda context: (own, pairs))
    world = Federation(dict.fromkeys(WEIGHTS, app))
    guarded_round(plain_guard(WITH_NORM), world, WITH_NORM)
    assert [module.training for module in own] == [True, True, True, False, *[True] * 5]
    assert all(parameter.grad is None for parameter in own.parameters())
    # Evaluation changes no statistics: they are those of the last candidate.
    assert_same(dict(own.state_dict()), offered(world)[-1], rtol=0, atol=0)


# Invalid scores


ODD_SCORES = verdict(1000, [9.0, 1.0, 9.0])


def tampered(change: Callable[[RecordDict], object]) -> Answer:
    """A client whose valid answer would decide; it is changed before it is sent."""
    return changing(ODD_SCORES, "guard", change)


def count(values: Any) -> Answer:
    return tampered(lambda content: put(content, "answer", "count", np.asarray(values)))


def losses(*values: Any, dtype: Any = np.float64) -> Answer:
    array = np.array(values, dtype=dtype)
    return tampered(lambda content: put(content, "answer", "losses", array))


def payload(key: str, data: bytes) -> Answer:
    return tampered(lambda content: put_payload(content, "answer", key, data))


def without(key: str) -> Answer:
    return tampered(lambda content: content.array_records["answer"].pop(key))


EXPECTED = "expected 3 losses in float64, got torch."
INVALID: dict[str, tuple[Answer | None, str]] = {
    "no-handler": (ClientApp(), "No query function registered"),
    "failing": (failing, "disk is full"),
    "unanswered": (None, "no answer"),
    "zero-count": (count([0]), r"\[0\] is not a number of examples"),
    "negative-count": (count([-3]), r"\[-3\] is not a number of examples"),
    "huge-count": (count([10**16]), r"\[10000000000000000\] is not a number of examples"),
    "largest-count": (count([2**63 - 1]), r"\[9223372036854775807 is not a number of examples"),
    "float-count": (count([5.0]), r"\[5\.0\] is not a number of examples"),
    "nan-count": (count([NAN]), r"\[nan\] is not a number of examples"),
    "two-counts": (count([5, 5]), r"\[5, 5\] is not a number of examples"),
    "many-counts": (count([5] * 1000), r"\[5, 5, 5, 5, 5, 5, 5 is not a number of examples"),
    "no-counts": (count(np.zeros(0, np.int64)), r"\[\] is not a number of examples"),
    "scalar-count": (count(5), "5 is not a number of examples"),
    "matrix-count": (count([[5]]), r"\[\[5\]\] is not a number of examples"),
    "bool-count": (count([True]), r"\[True\] is not a number of examples"),
    "int32-count": (count(np.array([5], np.int32)), r"\[5\] is not a number of examples"),
    "uint64-count": (count(np.array([5], np.uint64)), r"\[5\] is not a number of examples"),
    "complex-count": (count([5j]), r"\[5j\] is not a number of examples"),
    "text-count": (count(["5"]), "count: its payload is of dtype <U1, which is no number"),
    "other-endian-count": (count(np.array([5], ">i8")), "byte order"),
    "no-count": (without("count"), "'count' is missing"),
    "no-losses": (without("losses"), "'losses' is missing"),
    "one-loss": (losses(1.0), EXPECTED + r"float64 of shape \(1,\)"),
    "two-losses": (losses(9.0, 1.0), EXPECTED + r"float64 of shape \(2,\)"),
    "four-losses": (losses(9.0, 1.0, 9.0, 9.0), EXPECTED + r"float64 of shape \(4,\)"),
    "empty-losses": (losses(), EXPECTED + r"float64 of shape \(0,\)"),
    "matrix-of-losses": (losses([9.0, 1.0, 9.0]), EXPECTED + r"float64 of shape \(1, 3\)"),
    "float32-losses": (losses(9.0, 1.0, 9.0, dtype=np.float32), EXPECTED + "float32"),
    "integer-losses": (losses(9, 1, 9, dtype=np.int64), EXPECTED + "int64"),
    "complex-losses": (losses(9, 1, 9, dtype=np.complex128), EXPECTED + "complex128"),
    "bool-losses": (losses(True, False, True, dtype=np.bool_), EXPECTED + "bool"),
    "text-losses": (losses("9", "1", "9", dtype=np.str_), "losses: its payload is of dtype <U1"),
    "negative-loss": (losses(9.0, -1.0, 9.0), r"a loss of -1\.0 is impossible"),
    "minus-infinite": (losses(9.0, -INF, 9.0), "a loss of -inf is impossible"),
    "all-nan": (losses(NAN, NAN, NAN), "none of its losses is finite"),
    "all-infinite": (losses(INF, NAN, 1e300), "none of its losses is finite"),
    "no-record": (tampered(lambda content: content.pop("answer")), "'answer' is missing"),
    "no-arrays": (
        tampered(lambda content: content.array_records["answer"].clear()),
        "'count' is missing",
    ),
    "metrics": (
        tampered(
            lambda content: content.update(
                answer=MetricRecord({"count": [1000], "losses": [9.0, 1.0, 9.0]})
            )
        ),
        "'answer' is missing",
    ),
    "pickle": (payload("losses", pickle.dumps([9.0, 1.0, 9.0])), "no array in NumPy's format"),
    "garbage": (payload("count", b"garbage"), "no array in NumPy's format"),
    "no-bytes": (payload("losses", b""), "no array in NumPy's format"),
    "vast": (payload("losses", vast()), "80000000000000 bytes, and holds 0"),
    "vast-count": (payload("count", vast("<i8")), "80000000000000 bytes, and holds 0"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_scores_are_dropped_and_logged(case: str, caplog: pytest.LogCaptureFixture) -> None:
    odd, words = INVALID[case]
    world = choosing(2)
    world.apps[ODD_NODE] = odd
    result, metrics = guarded_round(plain_guard(), world)
    assert_same(result, offered(world)[2], rtol=0, atol=0)
    assert metrics["guard-clients"] == 2
    assert metrics["guard-loss-naive"] == 2
    (line,) = dropped(caplog)
    assert re.match(rf"evaluation of candidates of node {ODD_NODE} dropped: .*{words}", line), line


def test_the_invalid_scores_would_decide_if_they_were_valid() -> None:
    world = choosing(2)
    world.apps[ODD_NODE] = ODD_SCORES
    result, metrics = guarded_round(plain_guard(), world)
    assert metrics["guard-clients"] == 3
    assert_same(result, offered(world)[1], rtol=0, atol=0)


def test_without_any_scores_the_first_candidate_is_chosen_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = Federation({1: None, 2: failing, ODD_NODE: ClientApp()})
    result, metrics = guarded_round(plain_guard(), world)
    assert_same(result, offered(world)[0], rtol=0, atol=0)
    assert metrics["guard-clients"] == 0
    assert judged(metrics) == []
    assert len(dropped(caplog)) == 3
    (line,) = [record for record in caplog.records if "no client judged" in record.getMessage()]
    assert line.levelno == logging.WARNING
    assert line.getMessage() == "no client judged the candidates: aligned is chosen"


# The wrapped strategy and its state


class Counting(FedAvg):
    """Remembers how often it has aggregated; all copies together list their counts."""

    calls: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.rounds = 0
        self.log = logging.getLogger("flwr")

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        self.rounds += 1
        type(self).calls.append(self.rounds)
        return super().aggregate_train(server_round, replies)


@pytest.fixture(autouse=True)
def no_calls() -> None:
    Counting.calls = []


def test_each_candidate_is_aggregated_once_from_the_same_state() -> None:
    inner = Counting()
    strategy = guarded(inner)
    for server_round in (1, 2, 3):
        guarded_round(strategy, choosing(server_round % 3), server_round=server_round)
        assert strategy.strategy is inner
        assert inner.rounds == server_round
    assert Counting.calls == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def adaptive(inner: Strategy) -> Strategy:
    return DifferentialPrivacyServerSideAdaptiveClipping(
        inner, 0.0, num_sampled_clients=3, initial_clipping_norm=2.0
    )


INNER: dict[str, Callable[[], Strategy]] = {
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    "FedAdam": lambda: FedAdam(eta=0.05, beta_1=0.9, beta_2=0.99),
    "clipping": lambda: adaptive(FedAvg()),
    "clipping-FedAdam": lambda: adaptive(FedAdam(eta=0.05, beta_1=0.9, beta_2=0.99)),
    "clipping-clipping-FedAvgM": lambda: adaptive(adaptive(FedAvgM(server_momentum=0.9))),
}
MEMORY = ("momentum_vector", "current_arrays", "m_t", "v_t", "clipping_norm")


def levels(strategy: Strategy) -> list[Strategy]:
    found = [strategy]
    while isinstance(inner := getattr(found[-1], "strategy", None), Strategy):
        found.append(inner)
    return found


def memory(strategy: Strategy) -> list[np.ndarray]:
    """All numbers that a strategy and those it wraps keep from round to round."""
    found: list[np.ndarray] = []
    for level in levels(strategy):
        for name in MEMORY:
            value = getattr(level, name, None)
            if isinstance(value, Mapping):
                arrays: Sequence[Any] = [value[key] for key in sorted(value)]
            else:
                arrays = value if isinstance(value, list) else [value]
            found += [
                np.asarray(each.numpy() if hasattr(each, "numpy") else each, dtype=float)
                for each in arrays
                if each is not None
            ]
    return found


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("picks", [(0, 1), (1, 2)])
def test_the_state_is_that_of_the_chosen_candidates(inner: str, picks: tuple[int, int]) -> None:
    wrapped, plain = INNER[inner](), INNER[inner]()
    objects = levels(wrapped)
    strategy = guarded(wrapped)
    unasked = Federation(dict.fromkeys(WEIGHTS))
    global_model = random_state(ZOO[NET], 0)
    for server_round, pick in enumerate(picks, start=1):
        result, _ = guarded_round(
            strategy, choosing(pick), global_model=global_model, server_round=server_round
        )
        moved = list(candidates(global_model=global_model).values())[pick]
        states = dict(zip(WEIGHTS, moved, strict=True))
        expected, _ = run_round(plain, unasked, global_model, states, WEIGHTS, server_round)
        wanted = {key: value.float() for key, value in expected.items()}
        assert_same(result, wanted, rtol=1e-5, atol=1e-6)
        kept, known = memory(wrapped), memory(plain)
        assert len(kept) == len(known) > 0
        for left, right in zip(kept, known, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
        global_model = result
    # The objects are those that the user made, at every level.
    assert strategy.strategy is wrapped
    assert all(now is before for now, before in zip(levels(wrapped), objects, strict=True))


class Bound(FedAvg):
    """Passes one of its own methods to Flower, as users do."""

    def __init__(self) -> None:
        super().__init__(train_metrics_aggr_fn=self.count)
        self.seen = 0

    def count(self, records: list[RecordDict], key: str) -> MetricRecord:
        self.seen += 1
        return MetricRecord({"seen": self.seen})


def test_methods_that_a_strategy_keeps_are_its_own_afterwards() -> None:
    inner = Bound()
    strategy = guarded(inner)
    for server_round in (1, 2, 3):
        _, metrics = guarded_round(strategy, choosing(1), server_round=server_round)
        assert metrics["seen"] == inner.seen == server_round
        assert inner.train_metrics_aggr_fn.__self__ is inner


class Locked(FedAvg):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_strategy_that_cannot_be_copied_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"wrapped strategy that can be copied, Locked cannot: .*"):
        guarded(Locked())
    # Without the guard it need not be copied.
    ReBasinStrategy(Locked(), model=ZOO[NET].build(), example_inputs=ZOO[NET].inputs())


def test_a_grid_that_a_wrapped_strategy_keeps_is_not_copied() -> None:
    # The grid of a real server holds connections.
    world = honest(WITH_NORM)
    world.grid.connection = threading.Lock()
    inner = strategy_for(WITH_NORM, align=None)
    strategy = guarded(inner, WITH_NORM, finish=[])
    _, metrics = guarded_round(strategy, world, WITH_NORM)
    assert metrics["guard-clients"] == 3
    assert metrics["batchnorm-clients"] == 3
    assert strategy.strategy is inner
    assert inner._round is not None
    assert inner._round.grid is world.grid


class Choosy(FedAvg):
    """Refuses models whose first weight begins with a certain value."""

    refused: float = 0.0

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        if abs(float(arrays["1.weight"].numpy().flat[0]) - self.refused) < 1e-6:
            return None, None
        return arrays, metrics


@pytest.mark.parametrize("place", range(3))
def test_an_average_that_the_wrapped_strategy_refuses_is_no_candidate(place: int) -> None:
    first = choosing(0)
    guarded_round(plain_guard(), first)
    inner = Choosy()
    inner.refused = float(offered(first)[place]["1.weight"].flatten()[0])
    world = choosing(1, candidates=2)
    result, metrics = guarded_round(guarded(inner), world)
    left = [other for other in range(3) if other != place]
    assert judged(metrics) == [NAMES[other] for other in left]
    assert_same(result, offered(first)[left[1]], rtol=0, atol=0)


class Refusing(Counting):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        super().aggregate_train(server_round, replies)
        return None, None


def test_a_round_in_which_every_candidate_is_refused_has_no_result() -> None:
    inner, world = Refusing(), choosing(0)
    replies = replies_of(models_of(), WEIGHTS)
    assert one_round(guarded(inner), world, random_state(ZOO[NET], 0), replies) == (None, None)
    assert world.sent == []
    assert inner.rounds == 1


def test_the_summary_lists_the_options(caplog: pytest.LogCaptureFixture) -> None:
    guarded(align=ActivationMatching(), finish=[RegMean()]).summary()
    assert "align: ActivationMatching(then_weights=False); finish: RegMean(" in caplog.text
    assert "guard: Guard()" in caplog.text
