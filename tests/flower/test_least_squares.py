"""Laws of least squares over clients: the same as in one place, whatever single ones answer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import cache
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
    client,
    dropped,
    failing,
    one_round,
    prepare,
    put,
    put_payload,
    replies_of,
    tensors,
    vast,
)
from fl_rebasin.flower.least_squares import fit_on_clients
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvgM
from helpers import State, assert_same, random_state
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo import ZOO

from fl_rebasin.flower import ReBasinStrategy
from fl_rebasin.merging.heads import without_label_prior
from fl_rebasin.merging.least_squares import fit_least_squares, plan
from fl_rebasin.merging.merge_many import merge_many

NETS = ("mlp", "conv-batchnorm-flatten", "residual-batchnorm")
METHODS = ("layerwise", "one-pass", "rescaling")
SIZES = {5: [30], 8: [20, 24], ODD_NODE: [9, 40]}
WEIGHTS = {5: 2.0, 8: 1.0, ODD_NODE: 4.0}


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


@cache
def data(name: str, node_id: int) -> list[Tensor]:
    return batches_of(ZOO[name].inputs().shape[1:], SIZES[node_id], seed=node_id % 4)


@cache
def strangers(name: str) -> dict[int, State]:
    return {node_id: random_state(ZOO[name], seed) for seed, node_id in enumerate(SIZES, start=1)}


def honest(name: str, node_id: int) -> Answer:
    return client(ZOO[name].build, data(name, node_id))


def federation(name: str, odd: Callable[[Answer], Answer | None] = lambda app: app) -> Federation:
    apps: dict[int, Answer | None] = {node_id: honest(name, node_id) for node_id in SIZES}
    apps[ODD_NODE] = odd(honest(name, ODD_NODE))
    return Federation(apps)


@cache
def strategy_for(name: str, method: str, **options: Any) -> ReBasinStrategy:
    return ReBasinStrategy(
        model=ZOO[name].build(),
        example_inputs=ZOO[name].inputs(),
        least_squares=method,  # type: ignore[arg-type]
        **options,
    )


def run_round(
    name: str, method: str, world: Federation, **options: Any
) -> tuple[State, MetricRecord]:
    replies = replies_of(strangers(name), WEIGHTS, loss=0.5)
    strategy = strategy_for(name, method, **options)
    result, metrics = one_round(strategy, world, random_state(ZOO[name], 0), replies)
    assert metrics is not None
    return tensors(result), metrics


def fitted(
    name: str, method: str, nodes: Mapping[int, Any] = SIZES, aligned: bool = True, **options: Any
) -> State:
    """The fit in one place, with the data of some of the clients."""
    models, gauge = strangers(name), random_state(ZOO[name], 0)
    spec = strategy_for(name, method).spec
    merge = merge_many(spec, list(models.values()), list(WEIGHTS.values()), unit_order_of=gauge)
    moved = [
        spec.apply(permutation, models[node_id])
        for permutation, node_id in zip(merge.permutations, models, strict=True)
        if node_id in nodes
    ]
    return fit_least_squares(
        ZOO[name].build(),
        merge.state_dict,
        moved,
        [data(name, node_id) for node_id in nodes],
        one_pass=method == "one-pass",
        **({"max_features": 0} if method == "rescaling" else options),
    )


def close(left: State, right: State) -> None:
    """Equal up to sums in another order, which a solver may magnify."""
    assert_same(left, right, rtol=2e-4, atol=2e-5)


# The same as in one place


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_fit_over_messages_is_the_fit_in_one_place(name: str, method: str) -> None:
    world = federation(name)
    result, metrics = run_round(name, method, world)
    expected = fitted(name, method)
    close(result, expected)

    plain, _ = run_round(name, "none", Federation(dict.fromkeys(SIZES)))
    assert any(not torch.allclose(result[key], plain[key], atol=1e-2) for key in result)

    steps = plan(ZOO[name].build(), ZOO[name].inputs(), 2500)
    messages = 1 if method == "one-pass" else len(steps)
    assert metrics["least-squares-messages"] == messages
    assert world.asked("least_squares") == sorted(messages * list(SIZES))
    assert metrics["least-squares-clients"] == len(SIZES)
    assert metrics["least-squares-bytes"] == world.bytes_of("least_squares")
    assert 0 < metrics["least-squares-seconds"] < 60


def test_layers_with_many_inputs_are_rescaled() -> None:
    name = "conv-batchnorm-flatten"
    # 28 inputs of the first layer and 6 of the last are fitted, the 55 between are not.
    result, _ = run_round(name, "layerwise", federation(name), max_features=28)
    close(result, fitted(name, "layerwise", max_features=28))
    more, _ = run_round(name, "layerwise", federation(name))
    assert not torch.allclose(result["5.weight"], more["5.weight"], atol=1e-2)


def test_without_alignment_the_plain_average_is_fitted() -> None:
    name = "mlp"
    result, metrics = run_round(name, "layerwise", federation(name), matching="none")
    models = strangers(name)
    shares = [weight / sum(WEIGHTS.values()) for weight in WEIGHTS.values()]
    average = {
        key: sum(share * model[key] for share, model in zip(shares, models.values(), strict=True))
        for key in models[5]
    }
    batches = [data(name, node_id) for node_id in SIZES]
    close(result, fit_least_squares(ZOO[name].build(), average, list(models.values()), batches))
    assert [key for key in metrics if key.startswith("rebasin-")] == ["rebasin-dropped"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS[1:])
def test_batchnorm_has_the_statistics_of_what_it_sees_and_the_function_stays(
    name: str, method: str
) -> None:
    world = federation(name)
    result, metrics = run_round(name, method, world)
    assert metrics["batchnorm-clients"] == len(SIZES)
    assert world.asked("batchnorm") == sorted(SIZES)
    model = ZOO[name].build()
    model.load_state_dict(result)
    model.eval()
    fed: dict[str, list[Tensor]] = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.register_forward_pre_hook(
                lambda _, args, key=layer_name: fed.setdefault(key, []).append(args[0].double())
            )
    with torch.no_grad():
        for node_id in SIZES:
            for batch in data(name, node_id):
                model(batch)
    assert fed
    for layer_name, inputs in fed.items():
        values = torch.cat([part.movedim(1, -1).reshape(-1, part.shape[1]) for part in inputs])
        varies = values.var(0) > 1e-6
        for key, expected in (("running_mean", values.mean(0)), ("running_var", values.var(0))):
            found = result[f"{layer_name}.{key}"].double()
            torch.testing.assert_close(found[varies], expected[varies], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("switch", [False, True])
def test_fitted_model_is_not_recalibrated_as_well(switch: bool) -> None:
    name = "conv-batchnorm-flatten"
    world = federation(name)
    result, _ = run_round(name, "layerwise", world, recalibrate_batchnorm=switch)
    assert world.asked("batchnorm") == sorted(SIZES)
    close(result, fitted(name, "layerwise"))


def test_what_clients_compute_is_corrected_for_their_labels() -> None:
    """With label counts the fit is that of models whose last bias has lost their own prior."""
    name = "mlp"
    counts = {node_id: [3 * node_id, 40, 0, 5] for node_id in SIZES}
    replies = replies_of(strangers(name), WEIGHTS, labels=counts)
    strategy = strategy_for(name, "layerwise", label_counts="labels")
    result, _ = one_round(strategy, federation(name), random_state(ZOO[name], 0), replies)

    models = list(strangers(name).values())
    merge = merge_many(
        strategy.spec, models, list(WEIGHTS.values()), unit_order_of=random_state(ZOO[name], 0)
    )
    table = [torch.tensor(each) for each in counts.values()]
    corrected = [
        without_label_prior(strategy.spec.apply(move, model), own, sum(table), "6.bias")
        for move, model, own in zip(merge.permutations, models, table, strict=True)
    ]
    batches = [data(name, node_id) for node_id in SIZES]
    expected = fit_least_squares(ZOO[name].build(), merge.state_dict, corrected, batches)
    close(tensors(result), expected)
    assert not torch.allclose(expected["6.bias"], fitted(name, "layerwise")["6.bias"], atol=1e-2)


def test_only_sums_travel() -> None:
    name = "mlp"
    world = federation(name)
    run_round(name, "layerwise", world)
    for reply in world.replies:
        assert list(reply.content) == ["sums"]
        for key, array in reply.content.array_records["sums"].items():
            layer, kind = key.split("/")
            inputs, units = {"1": (13, 7), "4": (8, 7), "6": (8, 4)}[layer]
            shapes = {
                "count": (1,), "gram": (inputs, inputs), "cross": (inputs, units),
                "squares": (units,),
            }  # fmt: skip
            assert array.numpy().shape == shapes[kind]
            assert array.numpy().dtype == np.float64


@pytest.mark.parametrize("method", METHODS)
def test_keys_keep_the_order_of_the_global_model(method: str) -> None:
    # Strategies with a memory pair arrays by position.
    name = "conv-batchnorm-flatten"
    gauge = random_state(ZOO[name], 0)
    backwards = {key: gauge[key] for key in reversed(gauge)}
    strategy = ReBasinStrategy(
        FedAvgM(server_momentum=0.5),
        model=ZOO[name].build(),
        example_inputs=ZOO[name].inputs(),
        least_squares=method,  # type: ignore[arg-type]
    )
    result, _ = one_round(
        strategy, federation(name), backwards, replies_of(strangers(name), WEIGHTS)
    )
    assert result is not None
    assert list(result) == list(backwards)
    for key, array in result.items():
        assert array.numpy().shape == tuple(gauge[key].shape)
        assert array.numpy().dtype == gauge[key].numpy().dtype


# Answers that are no good

NET = "mlp"
GRAM, CROSS, SQUARES, COUNT = "1/gram", "1/cross", "1/squares", "1/count"


def tampered(change: Callable[[RecordDict], object]) -> Callable[[Answer], Answer]:
    """Changes whatever is said of the first layer."""

    def careful(content: RecordDict) -> None:
        if any(key.startswith("1/") for key in content.array_records["sums"]):
            change(content)

    return lambda app: changing(app, "least_squares", careful)


def entry(key: str, change: Callable[[np.ndarray], Any]) -> Callable[[Answer], Answer]:
    def put_changed(content: RecordDict) -> None:
        old = content.array_records["sums"][key].numpy().copy()
        put(content, "sums", key, np.asarray(change(old)))

    return tampered(put_changed)


def at(place: tuple[int, ...], value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(old: np.ndarray) -> np.ndarray:
        old[place] = value
        return old

    return change


BAD_SUMS: dict[str, tuple[Callable[[Answer], Answer | None], str]] = {
    "nan-gram": (entry(GRAM, at((0, 0), np.nan)), "1: gram is not finite or too large"),
    "infinite-cross": (entry(CROSS, at((0, 0), np.inf)), "1: cross is not finite or too large"),
    "minus-infinite": (entry(CROSS, at((0, 0), -np.inf)), "1: cross is not finite or too large"),
    "huge": (entry(CROSS, at((0, 0), -1e31)), "1: cross is not finite or too large"),
    "asymmetric": (entry(GRAM, at((0, 1), 1e5)), r"1: X\^T X is not symmetric"),
    "negative-diagonal": (entry(GRAM, at((2, 2), -1.0)), r"1: X\^T X has a negative diagonal"),
    "negative-squares": (entry(SQUARES, at((0,), -1.0)), "1: squares is negative"),
    "negative-count": (entry(COUNT, lambda old: -old), r"1: -49\.0 is no number of samples"),
    "zero-count": (entry(COUNT, lambda old: 0 * old), r"1: 0\.0 is no number of samples"),
    "huge-count": (entry(COUNT, lambda old: old * 1e15), r"1: 4\.9e\+16 is no number of samples"),
    "nan-count": (entry(COUNT, lambda old: old * np.nan), "1: count is not finite or too large"),
    "flat-count": (entry(COUNT, lambda old: old[0]), r"1: count is float64 of shape \(\)"),
    "integer-count": (
        entry(COUNT, lambda old: old.astype(np.int64)),
        r"1: count is int64 of shape \(1,\), expected float64 of shape \(1,\)",
    ),
    "float32": (
        entry(GRAM, lambda old: old.astype(np.float32)),
        r"1: gram is float32 of shape \(13, 13\), expected float64 of shape \(13, 13\)",
    ),
    "complex": (entry(GRAM, lambda old: old.astype(complex)), "1: gram is complex128"),
    "text": (entry(COUNT, lambda old: ["many"]), "its payload is of dtype <U4, which is no number"),
    "short": (
        entry(GRAM, lambda old: old[:-1, :-1]),
        r"1: gram is float64 of shape \(12, 12\), expected float64 of shape \(13, 13\)",
    ),
    "broadcasts": (entry(CROSS, lambda old: old[:, :1]), r"1: cross is float64 of shape \(13, 1\)"),
    "transposed": (entry(CROSS, lambda old: old.T), r"1: cross is float64 of shape \(7, 13\)"),
    "missing-key": (
        tampered(lambda content: content.array_records["sums"].pop(CROSS)),
        r"other sums were asked for: \['1/cross'\]",
    ),
    "extra-key": (
        tampered(lambda content: put(content, "sums", "1/spare", np.zeros(1))),
        r"other sums were asked for: \['1/spare'\]",
    ),
    "another-layer": (
        tampered(lambda content: put(content, "sums", "9/count", np.ones(1))),
        r"other sums were asked for: \['9/count'\]",
    ),
    "nothing": (
        tampered(lambda content: content.array_records["sums"].clear()),
        r"other sums were asked for: \['1/count', '1/cross', '1/gram'\]",
    ),
    "no-record": (tampered(lambda content: content.pop("sums")), "'sums' is missing"),
    "metrics": (
        tampered(lambda content: content.update(sums=MetricRecord({COUNT: 1.0}))),
        "'sums' is missing",
    ),
    "garbage": (tampered(lambda content: put_payload(content, "sums", GRAM, b"x")), r"\S"),
    "vast": (
        tampered(lambda content: put_payload(content, "sums", GRAM, vast())),
        r"its payload claims .* 80000000000000 bytes, and holds 0",
    ),
}  # fmt: skip


@cache
def without_the_odd_one(name: str, method: str) -> State:
    return run_round(name, method, federation(name, lambda app: None))[0]


@pytest.mark.parametrize("method", METHODS)
def test_fit_goes_on_with_those_who_answer(method: str) -> None:
    others = {node_id: SIZES[node_id] for node_id in SIZES if node_id != ODD_NODE}
    for name in NETS[:2]:
        close(without_the_odd_one(name, method), fitted(name, method, others))


@pytest.mark.parametrize(
    ("case", "method"),
    [(case, "layerwise") for case in BAD_SUMS]
    + [(case, "one-pass") for case in ("nan-gram", "short", "missing-key", "extra-key", "vast")],
)
def test_bad_sums_are_dropped_and_named(
    case: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    odd, words = BAD_SUMS[case]
    expected = without_the_odd_one(NET, method)
    caplog.clear()
    result, metrics = run_round(NET, method, federation(NET, odd))
    assert_same(result, expected, rtol=0, atol=0)
    assert metrics["least-squares-clients"] == len(SIZES) - 1
    (line,) = dropped(caplog)
    assert re.match(
        rf"least-squares sums of node {ODD_NODE} dropped: {words}.*add_least_squares_handler\(app",
        line,
    ), line


BAD_MOMENTS = {
    "negative-spread": ("1/spread", at((0,), -1.0), "1: spread is negative"),
    "negative-deviation": ("1/deviation", at((3,), -1e-9), "1: deviation is negative"),
    "nan-mean": ("1/mean", at((3,), np.nan), "1: mean is not finite"),
    "infinite-sum": ("1/sum", at((3,), np.inf), "1: sum is not finite"),
    "short": ("1/sum", lambda old: old[1:], r"1: sum is float64 of shape \(6,\)"),
    "float32": ("1/mean", lambda old: old.astype(np.float32), r"1: mean is float32"),
}


@pytest.mark.parametrize("case", BAD_MOMENTS)
def test_bad_moments_are_dropped_and_named(case: str, caplog: pytest.LogCaptureFixture) -> None:
    key, change, words = BAD_MOMENTS[case]
    expected = without_the_odd_one(NET, "rescaling")
    caplog.clear()
    result, _ = run_round(NET, "rescaling", federation(NET, entry(key, change)))
    assert_same(result, expected, rtol=0, atol=0)
    (line,) = dropped(caplog)
    assert re.match(rf"least-squares sums of node {ODD_NODE} dropped: {words}", line), line


def test_who_fails_at_one_layer_is_not_asked_about_the_next() -> None:
    def careful(content: RecordDict) -> None:
        if "4/gram" in content.array_records["sums"]:
            content.pop("sums")

    world = federation(NET, lambda app: changing(app, "least_squares", careful))
    result, metrics = run_round(NET, "layerwise", world)
    assert [world.asked("least_squares").count(node_id) for node_id in SIZES] == [3, 3, 2]
    assert metrics["least-squares-clients"] == 2
    # The first layer is fitted on all, the others on the two that go on.
    assert not torch.equal(result["1.weight"], without_the_odd_one(NET, "layerwise")["1.weight"])
    expected = run_round(NET, "layerwise", federation(NET))[0]
    assert torch.equal(result["1.weight"], expected["1.weight"])
    assert not torch.equal(result["4.weight"], expected["4.weight"])


NOBODY: dict[str, Answer | None] = {
    "silent": None, "failing": failing, "without-handlers": ClientApp()
}  # fmt: skip


@pytest.mark.parametrize("who", NOBODY)
@pytest.mark.parametrize(
    ("name", "method"), [("mlp", method) for method in METHODS] + [(NETS[1], "layerwise")]
)
def test_nobody_answers_and_the_average_stays(
    name: str, method: str, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = Federation(dict.fromkeys(SIZES, NOBODY[who]))
    result, metrics = run_round(name, method, world)
    plain, _ = run_round(name, "none", world)
    assert_same(result, plain, rtol=0, atol=0)
    assert metrics["least-squares-clients"] == 0
    assert metrics["least-squares-messages"] == 1
    named = [line for line in dropped(caplog) if line.startswith("least-squares sums of node")]
    assert len(named) == len(SIZES)


@pytest.mark.parametrize("method", METHODS)
def test_where_nobody_answers_batchnorm_is_recalibrated_as_without_least_squares(
    method: str,
) -> None:
    name = "conv-batchnorm-flatten"

    def only_batchnorm(app: Answer) -> Answer:
        def answer(message: Any, context: Any) -> Any:
            if message.metadata.message_type == "query.rebasin_least_squares":
                raise OSError("no time")
            return app(message, context)

        return answer

    world = Federation({node_id: only_batchnorm(honest(name, node_id)) for node_id in SIZES})
    result, metrics = run_round(name, method, world)
    expected, expected_metrics = run_round(name, "none", federation(name))
    assert_same(result, expected, rtol=0, atol=0)
    assert metrics["batchnorm-clients"] == expected_metrics["batchnorm-clients"] == len(SIZES)


def test_merged_model_without_answers_is_the_one_that_came_in() -> None:
    model = ZOO[NET].build()
    merged = ArrayRecord(random_state(ZOO[NET], 0))
    before = copy.deepcopy(merged)
    own = {node_id: ArrayRecord(state) for node_id, state in strangers(NET).items()}
    steps = plan(model, ZOO[NET].inputs())
    result, _ = fit_on_clients(Federation(dict.fromkeys(own)).grid, model, steps, merged, own)
    assert result is merged
    assert merged == before


def test_fit_changes_nothing_that_it_is_given_and_keeps_the_timeout() -> None:
    model = ZOO[NET].build()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    merged = ArrayRecord(random_state(ZOO[NET], 0))
    own = {node_id: ArrayRecord(each) for node_id, each in strangers(NET).items()}
    before = copy.deepcopy((merged, own))
    steps = plan(model, ZOO[NET].inputs())
    world = federation(NET)
    result, _ = fit_on_clients(world.grid, model, steps, merged, own, timeout=11)
    assert result != merged
    assert (merged, own) == before
    assert_same(dict(model.state_dict()), state, rtol=0, atol=0)
    assert {call.kwargs["timeout"] for call in world.grid.send_and_receive.call_args_list} == {11}


# Sums that are well-formed and have no solution


def unsolvable(content: RecordDict) -> None:
    """Not the sums of any data: the first two inputs vary less than they vary together."""
    record = content.array_records["sums"]
    if GRAM not in record:
        return
    zeros = {key: np.zeros_like(array.numpy()) for key, array in record.items()}
    for key, values in zeros.items():
        put(content, "sums", key, values)
    put(content, "sums", COUNT, np.ones(1))
    put(content, "sums", CROSS, np.full_like(zeros[CROSS], 1e30))
    tiny = np.zeros_like(zeros[GRAM])
    tiny[0, 0] = 1e-300
    put(content, "sums", GRAM, tiny)


def test_unsolvable_sums_leave_the_layer_and_the_model_finite(
    caplog: pytest.LogCaptureFixture,
) -> None:
    apps = {
        node_id: changing(honest(NET, node_id), "least_squares", unsolvable) for node_id in SIZES
    }
    result, _ = run_round(NET, "layerwise", Federation(dict(apps)))
    plain, _ = run_round(NET, "none", federation(NET))
    assert all(bool(torch.isfinite(value).all()) for value in result.values())
    assert_same(
        {key: result[key] for key in ("1.weight", "1.bias")},
        {key: plain[key] for key in ("1.weight", "1.bias")},
        rtol=0,
        atol=0,
    )
    assert not torch.equal(result["4.weight"], plain["4.weight"])
    assert re.search(r"^.*1 keeps the average: \S", caplog.text, re.MULTILINE)


def off(state: State) -> State:
    return {**state, "1.weight": 0 * state["1.weight"], "1.bias": 0 * state["1.bias"] - 1}


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_always_off_ends_no_round(method: str) -> None:
    strategy = strategy_for(NET, method)
    replies = replies_of({node_id: off(state) for node_id, state in strangers(NET).items()})
    result, metrics = one_round(strategy, federation(NET), off(random_state(ZOO[NET], 0)), replies)
    assert all(bool(torch.isfinite(value).all()) for value in tensors(result).values())
    assert metrics is not None
    assert metrics["least-squares-clients"] == len(SIZES)


class OnlyNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs)


@pytest.mark.parametrize("method", METHODS)
def test_model_with_nothing_to_fit_sends_no_sums(method: str) -> None:
    strategy = ReBasinStrategy(
        model=OnlyNorms(),
        example_inputs=torch.zeros(2, 3),
        least_squares=method,  # type: ignore[arg-type]
    )
    batches = batches_of((3,), [8], seed=1)
    world = Federation({node_id: client(OnlyNorms, batches) for node_id in SIZES})
    state = dict(OnlyNorms().state_dict())
    replies = replies_of(dict.fromkeys(SIZES, state))
    result, metrics = one_round(strategy, world, state, replies)
    assert world.asked("least_squares") == []
    assert metrics is not None
    assert metrics["least-squares-messages"] == 0
    # But its BatchNorm is recalibrated.
    torch.testing.assert_close(tensors(result)["norm.running_mean"], batches[0].mean(0))
