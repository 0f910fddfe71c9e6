"""`rebasin_mod`: a client aligns what it trained to the global model before it uploads it."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from logging import INFO, WARNING

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.supercore import log
from torch import Tensor, nn

from fl_rebasin.flower.questions import LoadFn, reason
from fl_rebasin.matching.activations import match_activations
from fl_rebasin.matching.objective import check_finite
from fl_rebasin.matching.weights import Match, match_weights
from fl_rebasin.symmetry.derive import ExampleInputs, derive_spec
from fl_rebasin.symmetry.spec import PermutationSpec


def rebasin_mod(
    model: nn.Module, example_inputs: ExampleInputs, *, load: LoadFn | None = None
) -> Mod:
    """Return a mod that permutes a client's trained model to the unit order of the global one.

    The server needs nothing of this package and sees no unaligned model: it works with plain
    FedAvg, and inside Flower's clipping, differential privacy and secure aggregation. Those have
    to work on what is uploaded, so list this mod last; the first is the outermost.

    - `@app.train(mods=[rebasin_mod(...)])`, or `ClientApp(mods=[rebasin_mod(...)])`
    - `@app.train(mods=[fixedclipping_mod, rebasin_mod(...)])`
    - `@app.train(mods=[LocalDpMod(...), rebasin_mod(...)])`
    - `ClientApp(client_fn, mods=[secaggplus_mod, rebasin_mod(...)])`, Flower's older interface,
      where arrays have no names: they are taken to be in the order of `model.state_dict()`

    Only training messages are touched, and of the reply only the values of its arrays: names,
    order and dtypes stay, and so does every bit if no unit has to move. A reply or a global model
    that is of another architecture, or holds NaN or infinite values, is left to the server: the
    reply is handed on as it is, with a warning in the log. So is one whose activations cannot be
    compared. What `load` or the client itself raises is not caught.

    Args:
        model: a module of the federation's architecture, any weights; not changed or kept.
        example_inputs: inputs that `model` runs on; only shapes and dtypes matter.
        load: returns a module of the architecture, whose weights are overwritten, and batches of
            the client's inputs, as for `add_rebasin_handlers`. With it units are matched by
            their activations on these data, without it by their weights.

    Raises:
        SpecError: no spec can be derived from model and inputs.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin (ICLR 2023), sections 3.1 and 3.2.

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> app = ClientApp(mods=[rebasin_mod(net, torch.zeros(1, 4))])
    """
    # Now, not in the first round: the simulation engine sends the app anew with every message, so
    # that it must carry the spec, and no model.
    return _ReBasinMod(derive_spec(model, example_inputs), tuple(model.state_dict()), load)


class _UnfitError(ValueError):
    """A model that cannot be aligned, or not aligned to."""


@dataclass(frozen=True)
class _ReBasinMod:
    """The mod: what it knows of the architecture, without weights.

    Attributes:
        spec: spec of the architecture.
        keys: keys of its state dict in their order.
        load: module and data to match activations on, if any.
    """

    spec: PermutationSpec
    keys: tuple[str, ...]
    load: LoadFn | None

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Let the client train, then align its reply."""
        if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        # Copies: the client may write to the message.
        received = {
            name: ArrayRecord(dict(record))
            for name, record in message.content.array_records.items()
        }
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        try:
            reference = self._read(received, "the global model")
            trained = self._read(reply.content.array_records, "the trained model")
        except _UnfitError as error:
            return _as_it_is(reply, error)
        started = time.perf_counter()
        if self.load is None:
            match = match_weights(self.spec, reference, trained)
        else:
            module, batches = self.load(context)
            try:
                match = match_activations(self.spec, module, reference, trained, batches)
            except ValueError as error:
                return _as_it_is(reply, error)
        _report(match, time.perf_counter() - started)
        if match.permutation.is_identity:
            return reply
        return _with_tensors(reply, self.spec.apply(match.permutation, trained).values())

    def _read(self, records: Mapping[str, ArrayRecord], whose: str) -> dict[str, Tensor]:
        """Return the tensors of the one ArrayRecord in its order, under the state dict's names.

        Raises:
            _UnfitError: it is not a model of the architecture with finite values.
        """
        if len(records) != 1:
            raise _UnfitError(
                f"{whose}: expected one ArrayRecord, got {len(records)} (rebasin_mod must be the "
                "last in the list of mods)"
            )
        (record,) = records.values()
        try:
            tensors = [torch.from_numpy(array.numpy()) for array in record.values()]
            state_dict = dict(zip(_names(record, self.keys), tensors, strict=True))
            check_finite(self.spec, state_dict, "its values")
        except Exception as error:  # Payloads can be anything, and numpy says so in many ways.
            raise _UnfitError(f"{whose}: {reason(error)}") from error
        return state_dict


def _names(record: ArrayRecord, keys: tuple[str, ...]) -> list[str]:
    """Return what the arrays of a record are called in the state dict, in the record's order.

    Arrays called 0, 1, ... have no names: they go by their places.
    """
    names = list(record)
    if {*names} == {*keys} or names != [str(place) for place in range(len(names))]:
        return names
    if len(names) != len(keys):
        raise _UnfitError(
            f"expected {len(keys)} arrays, in the order of the model's state_dict(), got "
            f"{len(names)}"
        )
    return list(keys)


def _with_tensors(reply: Message, tensors: Iterable[Tensor]) -> Message:
    """Return a copy of a reply whose arrays have other values; the reply stays as it is."""
    ((name, record),) = reply.content.array_records.items()
    arrays = {
        # What an array says of its dtype and shape still holds, even if that is nothing.
        key: replace(old, data=Array(tensor.numpy()).data)
        for (key, old), tensor in zip(record.items(), tensors, strict=True)
    }
    content = RecordDict(dict(reply.content))
    content[name] = ArrayRecord(arrays)
    remade = copy.copy(reply)
    remade.content = content
    return remade


def _as_it_is(reply: Message, error: Exception) -> Message:
    """Say why a reply is not aligned, and return it."""
    log(WARNING, "the trained model is handed on unaligned: %s", reason(error))
    return reply


def _report(match: Match, seconds: float) -> None:
    log(
        INFO,
        "aligned to the global model: similarity %.3f -> %.3f, %s units moved, %.2f s",
        *(match.similarity_before, match.similarity, match.permutation.moved, seconds),
    )
