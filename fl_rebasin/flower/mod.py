"""`rebasin_mod`: a client aligns its trained model to the global model before the upload."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from logging import INFO, WARNING

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.supercore import log
from torch import Tensor, nn

from fl_rebasin.flower.log_text import reason
from fl_rebasin.flower.questions import LoadFn
from fl_rebasin.flower.replies import only_arrays, reply_with_content
from fl_rebasin.matching.activations import match_activations
from fl_rebasin.matching.objective import check_finite
from fl_rebasin.matching.weights import Match, match_weights
from fl_rebasin.symmetry.derive import ExampleInputs, derive_spec
from fl_rebasin.symmetry.spec import PermutationSpec


def rebasin_mod(
    model: nn.Module, example_inputs: ExampleInputs, *, load: LoadFn | None = None
) -> Mod:
    """Return a mod that permutes a client's trained model to the unit order of the global model.

    The server does not need this package, and never sees an unaligned model. It works with plain
    FedAvg, and together with Flower's clipping, differential privacy and secure aggregation. Those
    mods must process the aligned model, so list this mod last (Flower runs the first mod
    outermost):

    - `@app.train(mods=[rebasin_mod(...)])`, or `ClientApp(mods=[rebasin_mod(...)])`
    - `@app.train(mods=[fixedclipping_mod, rebasin_mod(...)])`
    - `@app.train(mods=[LocalDpMod(...), rebasin_mod(...)])`
    - `ClientApp(client_fn, mods=[secaggplus_mod, rebasin_mod(...)])`, Flower's legacy interface,
      where arrays have no names: they must be in the order of `model.state_dict()`

    The mod changes only replies to training messages, and in them only the values of the arrays.
    Names, order and dtypes stay the same, and so does every bit if no unit has to move. The mod
    logs a warning and returns the reply unchanged if the reply or the global model belongs to
    another architecture or holds NaN or infinite values, or if the activations cannot be
    compared. It does not catch errors that `load` or the client raises.

    Args:
        model: a module of the federation's architecture, with any weights; neither changed nor
            kept.
        example_inputs: inputs that `model` runs on; only their shapes and dtypes matter.
        load: returns a module of the architecture, whose weights are overwritten, and batches of
            the client's inputs, as for `add_rebasin_handlers`. With it, units are matched by
            their activations on this data; without it, by their weights.

    Raises:
        SpecError: no spec can be derived from the model and inputs.

    Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin (ICLR 2023), sections 3.1 and 3.2.

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> app = ClientApp(mods=[rebasin_mod(net, torch.zeros(1, 4))])
    """
    # Derive the spec now: the simulation engine sends the app with every message, so the mod must
    # be small and must not have to derive the spec again.
    return _ReBasinMod(derive_spec(model, example_inputs), tuple(model.state_dict()), load)


class _UnfitError(ValueError):
    """The trained model cannot be aligned to the global model."""


@dataclass(frozen=True)
class _ReBasinMod:
    """The mod; it holds the architecture's spec but no weights.

    Attributes:
        spec: the permutation spec of the architecture.
        keys: keys of the state dict, in order.
        load: returns a module and data for activation matching; None matches weights.
    """

    spec: PermutationSpec
    keys: tuple[str, ...]
    load: LoadFn | None

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Let the client train, then align the model in its reply."""
        if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        # Copies, because the client may write to the message.
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
            return _unaligned(reply, error)
        started = time.perf_counter()
        if self.load is None:
            match = match_weights(self.spec, reference, trained)
        else:
            module, batches = self.load(context)
            try:
                match = match_activations(self.spec, module, reference, trained, batches)
            except ValueError as error:
                return _unaligned(reply, error)
        _log_match(match, time.perf_counter() - started)
        if match.permutation.is_identity:
            return reply
        return _with_tensors(reply, self.spec.apply(match.permutation, trained).values())

    def _read(self, records: Mapping[str, ArrayRecord], whose: str) -> dict[str, Tensor]:
        """Return the tensors of the only ArrayRecord, in its order, by state dict key.

        Raises:
            _UnfitError: the record is not a model of the architecture with finite values.
        """
        try:
            _, record = only_arrays(records)
        except ValueError as error:
            raise _UnfitError(
                f"{whose}: {error} (rebasin_mod must be the last in the list of mods)"
            ) from error
        try:
            tensors = [torch.from_numpy(array.numpy()) for array in record.values()]
            state_dict = dict(zip(_names(record, self.keys), tensors, strict=True))
            check_finite(self.spec, state_dict, "its values")
        except Exception as error:  # A payload may hold anything, and NumPy raises many errors.
            raise _UnfitError(f"{whose}: {reason(error)}") from error
        return state_dict


def _names(record: ArrayRecord, keys: tuple[str, ...]) -> list[str]:
    """Return the state dict keys of a record's arrays, in the record's order.

    Arrays named 0, 1, ... have no real names: they get the keys in order.
    """
    names = list(record)
    if {*names} == {*keys} or names != [str(index) for index in range(len(names))]:
        return names
    if len(names) != len(keys):
        raise _UnfitError(
            f"expected {len(keys)} arrays, in the order of the model's state_dict(), got "
            f"{len(names)}"
        )
    return list(keys)


def _with_tensors(reply: Message, tensors: Iterable[Tensor]) -> Message:
    """Return a copy of a reply with other values in its arrays; the reply does not change."""
    ((name, record),) = reply.content.array_records.items()
    arrays = {
        # The declared dtype and shape stay valid, even if an array declares neither.
        key: replace(old, data=Array(tensor.numpy()).data)
        for (key, old), tensor in zip(record.items(), tensors, strict=True)
    }
    content = RecordDict(dict(reply.content))
    content[name] = ArrayRecord(arrays)
    return reply_with_content(reply, content)


def _unaligned(reply: Message, error: Exception) -> Message:
    """Log why a reply is not aligned, and return it."""
    log(WARNING, "the trained model is uploaded unaligned: %s", reason(error))
    return reply


def _log_match(match: Match, seconds: float) -> None:
    log(
        INFO,
        "aligned to the global model: similarity %.3f -> %.3f, %s units moved, %.2f s",
        match.similarity_before,
        match.similarity,
        match.permutation.moved,
        seconds,
    )
