"""Matching where the data are: each client finds the permutation of its own model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from logging import INFO
from typing import Literal, cast, get_args

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import nn

from fl_rebasin.flower.arrays import read_array, read_header
from fl_rebasin.flower.questions import TIMEOUT, LoadFn, Question, ask, loaded
from fl_rebasin.matching.activations import match_activations
from fl_rebasin.matching.straight_through import match_straight_through
from fl_rebasin.state_dicts import StateDict
from fl_rebasin.symmetry.serialization import spec_from_json, spec_to_json
from fl_rebasin.symmetry.spec import Permutation, PermutationSpec

QUESTION = Question("matching", "permutation", "add_matching_handler")

ClientMethod = Literal["activations", "straight-through"]
"""How a client matches its model: by activations, or by the loss of the merged model."""


def add_matching_handler(app: ClientApp, load: LoadFn) -> None:
    """Let a ClientApp match its own model to one that the server names, on its own data.

    Only the permutation goes back: a few kilobytes.

    Args:
        app: the ClientApp; gets a query handler for the action `rebasin_matching`.
        load: returns a module of the architecture, whose weights are overwritten, and batches of
            the client's inputs; for `"straight-through"` pairs of inputs and labels.

    Example:
        >>> app = ClientApp()
        >>> add_matching_handler(app, lambda context: (nn.Linear(2, 2), [torch.rand(8, 2)]))
    """

    @app.query(QUESTION.action)
    def match(message: Message, context: Context) -> Message:
        model, batches = load(context)
        records = message.content.array_records
        reference = loaded(copy.deepcopy(model), records["reference"])
        own = loaded(model, records["own"])
        config = message.content.config_records["config"]
        spec = spec_from_json(cast(str, config["spec"]), own)
        method = cast(ClientMethod, config["method"])
        permutation = match_on_data(spec, reference, own, batches, method)
        indices = {name: Array(index.numpy()) for name, index in permutation.indices.items()}
        return Message(RecordDict({"permutation": ArrayRecord(indices)}), reply_to=message)


def match_on_data(
    spec: PermutationSpec, reference: nn.Module, own: nn.Module, batches: object, method: str
) -> Permutation:
    """Match a model to a reference by one of the methods that need data."""
    if method not in get_args(ClientMethod):
        raise ValueError(f"unknown matching {method!r}: use one of {get_args(ClientMethod)}")
    if method == "straight-through":
        pairs = list(batches)  # type: ignore[call-overload]
        if pairs and not (isinstance(pairs[0], (tuple, list)) and len(pairs[0]) == 2):
            raise ValueError("straight-through matching needs batches of inputs and labels")
        start = match_activations(spec, reference, own, pairs).permutation
        return match_straight_through(spec, reference, own, pairs, start=start).permutation
    return match_activations(spec, reference, own, batches).permutation  # type: ignore[arg-type]


def match_on_clients(
    grid: Grid,
    spec: PermutationSpec,
    models: Mapping[int, StateDict],
    reference: int,
    method: ClientMethod,
    timeout: float = TIMEOUT,
) -> tuple[dict[int, Permutation], dict[str, float | int]]:
    """Let clients match their models to that of one of them.

    Args:
        grid: the ServerApp's grid.
        spec: spec of the models.
        models: for each node its model.
        reference: the node whose model stays.
        method: how the clients match.
        timeout: seconds to wait for the answers.

    Returns:
        For each node that answered well, and for the reference, its permutation; and metrics:
        `matching-clients`, `matching-seconds`, `matching-bytes`.
    """
    arrays = {node: ArrayRecord(dict(model)) for node, model in models.items()}
    config = ConfigRecord({"method": method, "spec": spec_to_json(spec)})
    contents = {
        node: RecordDict({"reference": arrays[reference], "own": own, "config": config})
        for node, own in arrays.items()
        if node != reference
    }
    answers = ask(grid, QUESTION, contents, lambda reply: _read(reply, spec), timeout)
    log(INFO, "%s of %s clients matched their models", len(answers.by_node), len(contents))
    return {reference: spec.identity(), **answers.by_node}, answers.metrics


def _read(content: RecordDict, spec: PermutationSpec) -> Permutation:
    """Return a reply's permutation.

    Raises:
        ValueError: it is none of this spec.
    """
    record = content.array_records["permutation"]
    still = spec.identity()
    if odd := sorted(record.keys() ^ still.indices.keys()):
        raise ValueError(f"permutation and spec differ in the groups {odd[:3]}")
    indices = {}
    for name, expected in still.indices.items():
        head = read_header(record[name])
        if head.dtype != np.int64 or head.shape != tuple(expected.shape):
            raise ValueError(
                f"{name}: an order of {tuple(expected.shape)} units was asked for, got "
                f"{head.dtype} of shape {head.shape}"
            )
        indices[name] = torch.from_numpy(read_array(record[name], head))
    permutation = Permutation(indices, spec.within)
    spec.check_permutation(permutation)
    return permutation
