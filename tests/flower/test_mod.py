"""Laws of the client mod: what it aligns, what it leaves unchanged, and how it is created."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import helpers
import numpy as np
import pytest
import torch
from federation import prepare, tensors, vast
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
from flwr.clientapp.typing import Mod
from flwr.common import ndarrays_to_parameters
from flwr.compat.common.recorddict_compat import parameters_to_arrayrecord
from helpers import State, assert_same, named_spec, random_state, spec_of
from torch import Tensor, nn
from zoo import ZOO, Entry

from fl_rebasin import PermutationSpec, SpecError
from fl_rebasin.flower import rebasin_mod

# With integer buffers, more than ten arrays and tied tensors.
NETS = ("mlp", "conv-batchnorm-flatten", "residual-batchnorm", "tied-shared")
UNALIGNED = "the trained model is uploaded unaligned: "


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prepare(monkeypatch, caplog)


def mod_of(name: str, **options: Any) -> Mod:
    return rebasin_mod(ZOO[name].build(), ZOO[name].inputs(), **options)


def nearby(state: State, seed: int, scale: float = 1e-2) -> State:
    """A state dict nearby, as after a little training; tied tensors stay tied."""
    moved = helpers.nearby(state, seed, scale)
    if "embed.weight" in moved:
        moved["out.weight"] = moved["embed.weight"].clone()
    return moved


def start(name: str) -> State:
    return nearby(random_state(ZOO[name], 0), 0, scale=0)


def shuffled(spec: PermutationSpec, state: State, seed: int) -> State:
    permutation = spec.random(torch.Generator().manual_seed(seed))
    assert not permutation.is_identity
    return spec.apply(permutation, state)


def reverse_keys(state: State) -> State:
    return {key: state[key] for key in reversed(state)}


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
    """Send a message through a mod; return the client's reply and the mod's."""
    make_message, make_reply = KINDS[kind]
    message, reply = make_message(received, message_type), make_reply(trained)
    context = Context(1, 1, {}, RecordDict(), {})

    def client(its_message: Message, its_context: Context) -> Message:
        assert its_message is message
        assert its_context is context
        during(message)
        return reply

    return reply, mod(message, context, client)


# What the mod aligns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [dict, reverse_keys], ids=["in-order", "reversed"])
@pytest.mark.parametrize("name", NETS)
def test_permuted_units_are_restored_and_all_else_is_unchanged(
    name: str, order: Callable[[State], State], kind: str
) -> None:
    model = start(name)
    trained = nearby(model, 1)
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
    # The client may keep its own reply: it is unchanged.
    assert reply.content is content
    assert content == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_arrays_keep_a_precision_that_differs_from_the_global_model(dtype: torch.dtype) -> None:
    model = start("mlp")
    trained = {key: value.to(dtype) for key, value in nearby(model, 1).items()}
    sent = shuffled(named_spec("mlp"), trained, seed=5)
    _, out = call(mod_of("mlp"), question(ArrayRecord(model)), answer(ArrayRecord(sent)))
    assert_same(tensors(out.content.array_records["arrays"]), trained, rtol=0, atol=0)


def nameless(state: State) -> ArrayRecord:
    """A record of Flower's legacy interface: numbers for names, and no dtypes or shapes."""
    arrays = [value.numpy() for value in state.values()]
    record = parameters_to_arrayrecord(ndarrays_to_parameters(arrays), keep_input=True)
    assert {(array.dtype, array.shape) for array in record.values()} == {("", ())}
    return record


RECORDS = {"named": ArrayRecord, "nameless": nameless}


@pytest.mark.parametrize("received", RECORDS)
@pytest.mark.parametrize("name", NETS)
def test_nameless_arrays_are_identified_by_their_order(name: str, received: str) -> None:
    model = start(name)
    trained = nearby(model, 1)
    sent = nameless(shuffled(named_spec(name), trained, seed=5))
    _, out = call(
        mod_of(name),
        question(RECORDS[received](model), "fitins.parameters"),
        answer(sent, "fitres.parameters"),
    )
    assert out.content.array_records["fitres.parameters"] == nameless(trained)


def test_units_are_matched_by_activations_if_there_is_data() -> None:
    # The second input is always zero: the weights match in order, the activations do not.
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


def test_the_reference_is_the_global_model_as_received() -> None:
    model = start("mlp")
    trained = nearby(model, 1)

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


# What the mod leaves unchanged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message_type", ["evaluate", "query", "query.train", "evaluate.train"])
def test_messages_other_than_training_are_unchanged(message_type: str, kind: str) -> None:
    model = start("mlp")
    content = answer(ArrayRecord(shuffled(named_spec("mlp"), model, seed=5)))
    before = copy.deepcopy(content)
    received = question(ArrayRecord(model))
    reply, out = call(mod_of("mlp"), received, content, message_type, kind)
    assert out is reply
    assert out.content is content
    assert content == before


def test_replies_to_every_training_action_are_aligned() -> None:
    model = start("mlp")
    sent = ArrayRecord(shuffled(named_spec("mlp"), model, seed=5))
    _, out = call(mod_of("mlp"), question(ArrayRecord(model)), answer(sent), "train.personal")
    assert_same(tensors(out.content.array_records["arrays"]), model, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_unchanged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    received = question(ArrayRecord(start("mlp")))
    reply, out = call(mod_of("mlp"), received, Error(code=7, reason="out of memory"), kind=kind)
    assert out is reply
    assert out.error.reason == "out of memory"
    assert not caplog.messages


@pytest.mark.parametrize("name", NETS)
def test_an_aligned_model_is_returned_bit_for_bit(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = start(name)
    sent = ArrayRecord(nearby(model, 1))
    # Payloads that differ from what the mod itself would write.
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
    "vast": (payload(vast("<f4")), ""),
}


@pytest.mark.parametrize("side", ["the global model", "the trained model"])
@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit_is_uploaded_unaligned(
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
def test_another_number_of_array_records_is_uploaded_unaligned(
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


def test_another_number_of_nameless_arrays_is_uploaded_unaligned(
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
def test_activations_that_cannot_be_compared_cause_a_warning(
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


def test_errors_of_load_are_not_caught() -> None:
    def load(context: Context) -> Any:
        raise FileNotFoundError("no data on this node")

    arrays = ArrayRecord(start("mlp"))
    with pytest.raises(FileNotFoundError, match="no data on this node"):
        call(mod_of("mlp", load=load), question(arrays), answer(arrays))


# How the mod is created


def test_a_model_without_a_spec_is_refused() -> None:
    with pytest.raises(SpecError, match=r"cannot be run on the example inputs \(1, 5\)"):
        rebasin_mod(nn.Linear(3, 2), torch.zeros(1, 5))


def test_the_mod_is_pickled_without_a_model() -> None:
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
