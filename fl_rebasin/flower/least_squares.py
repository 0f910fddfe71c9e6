"""Layerwise least squares over clients: only sums travel, no data and no labels."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from logging import INFO, WARNING
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import nn

from fl_rebasin.flower.arrays import read_array, read_header
from fl_rebasin.flower.batchnorm import recalibrate_on_clients
from fl_rebasin.flower.questions import TIMEOUT, LoadFn, Question, ask, loaded, reason
from fl_rebasin.merging.least_squares import (
    RIDGE,
    Step,
    Sums,
    add_up,
    own_input_sums,
    shapes,
    solve,
    step_sums,
)

QUESTION = Question("least_squares", "least-squares sums", "add_least_squares_handler")
MAX_COUNT = 1e15
MAX_ENTRY = 1e30
"""Larger sums could overflow when they are added up."""

Inputs: TypeAlias = Literal["merged", "own"]


def add_least_squares_handler(app: ClientApp, load: LoadFn) -> None:
    """Let a ClientApp answer the server's questions for least-squares sums.

    Args:
        app: the ClientApp; gets a query handler for the action `rebasin_least_squares`.
        load: returns a module of the architecture, whose weights are overwritten, and batches of
            the client's inputs: tensors, or tuples and lists whose first item is the input.
            Labels are not used.

    Example:
        >>> app = ClientApp()
        >>> add_least_squares_handler(app, lambda context: (nn.Linear(2, 2), [torch.rand(8, 2)]))
    """

    @app.query(QUESTION.action)
    def sums(message: Message, context: Context) -> Message:
        model, batches = load(context)
        records = message.content.array_records
        config = message.content.config_records["config"]
        steps = [
            Step(layer, norm if has_norm else None, bool(fitted))
            for layer, norm, has_norm, fitted in zip(
                *(cast(list[Any], config[key]) for key in ("layers", "norms", "normed", "fitted")),
                strict=True,
            )
        ]
        own = loaded(copy.deepcopy(model), records["own"])
        if config["inputs"] == "own":
            found = own_input_sums(own, steps, batches)
        else:
            merged = loaded(model, records["merged"])
            found = {steps[0].layer: step_sums(merged, own, steps[0], batches)}
        arrays = {
            f"{layer}/{key}": Array(value.numpy())
            for layer, each in found.items()
            for key, value in each.items()
        }
        return Message(RecordDict({"sums": ArrayRecord(arrays)}), reply_to=message)


def fit_on_clients(
    grid: Grid,
    model: nn.Module,
    steps: Sequence[Step],
    merged: ArrayRecord,
    own: Mapping[int, ArrayRecord],
    *,
    inputs: Inputs = "merged",
    ridge: float = RIDGE,
    timeout: float = TIMEOUT,
) -> tuple[ArrayRecord, dict[str, float | int]]:
    """Fit the merged model, layer by layer, to what the clients' own models compute.

    Args:
        grid: the ServerApp's grid.
        model: a module of the architecture, any weights; not changed.
        steps: what is done, in order: `fl_rebasin.merging.least_squares.plan`.
        merged: state dict of the merged model.
        own: for each node its aligned model; it is sent along, so that clients need no memory.
        inputs: `"merged"`: a layer is fitted on what it sees in the merged model so far, with one
            message a layer; `"own"`: on what the clients' own layers see, one message in all.
        ridge: pull towards the weights so far, as a share of the inputs' mean square.
        timeout: seconds to wait for the answers to a message.

    Returns:
        The fitted state dict, and metrics: `least-squares-clients` (good answers to the last
        message), `least-squares-seconds`, `least-squares-bytes`, `least-squares-messages`. A
        layer about which nobody answers well stays as it is; if that is true of all, `merged`
        itself is returned.
    """
    started = time.perf_counter()
    current = loaded(copy.deepcopy(model), merged)
    rounds = [[step] for step in steps]
    if inputs == "own":
        fitted = [step for step in steps if step.fitted]
        rounds = [fitted] if fitted else []
    nodes = list(own)
    done = moved = messages = 0
    for asked in rounds:
        if not nodes:
            break
        config = ConfigRecord(
            {
                "inputs": inputs,
                "layers": [step.layer for step in asked],
                "norms": [step.norm or "" for step in asked],
                "normed": [step.norm is not None for step in asked],
                "fitted": [step.fitted for step in asked],
            }
        )
        parts = {"config": config}
        if inputs == "merged":
            parts |= {"merged": ArrayRecord(current.state_dict())}  # type: ignore[dict-item]
        contents = {node: RecordDict({**parts, "own": own[node]}) for node in nodes}
        expected = shapes(current, asked)
        answers = ask(
            grid, QUESTION, contents, lambda reply, want=expected: _read(reply, want), timeout  # type: ignore[misc]
        )  # fmt: skip
        messages += 1
        moved += int(answers.metrics[f"{QUESTION.name}-bytes"])
        # Who fails once is not asked again: every message to one that is silent costs the timeout.
        nodes = list(answers.by_node)
        for step in asked if nodes else ():
            sums = add_up([each[step.layer] for each in answers.by_node.values()])
            try:
                current.load_state_dict(_solved(current, step, sums, ridge))
                done += 1
            except (ValueError, RuntimeError) as error:  # Sums can be well-formed and unsolvable.
                log(WARNING, "%s keeps the average: %s", step.layer, reason(error))
    log(INFO, "least squares: %s of %s layers, %s messages", done, len(steps), messages)
    metrics: dict[str, float | int] = {
        "least-squares-clients": len(nodes),
        "least-squares-seconds": time.perf_counter() - started,
        "least-squares-bytes": moved,
        "least-squares-messages": messages,
    }
    if not done:
        return merged, metrics
    state = current.state_dict()
    arrays, batchnorm = recalibrate_on_clients(
        grid, nodes or list(own), model, ArrayRecord({key: state[key] for key in merged}),
        timeout, frozen=True,
    )  # fmt: skip
    return arrays, metrics | batchnorm


def _solved(current: nn.Module, step: Step, sums: Sums, ridge: float) -> dict[str, torch.Tensor]:
    """Return the state dict with one layer set from the pooled sums.

    Raises:
        ValueError: the solution is not finite.
        RuntimeError: there is none.
    """
    state = solve(current, step, sums, ridge)
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise ValueError("the solution is not finite")
    return state


def _read(
    content: RecordDict, expected: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, Sums]:
    """Return a reply's sums, layer by layer.

    Raises:
        ValueError: they are not what was asked for.
    """
    record = content.array_records["sums"]
    wanted = {f"{layer}/{key}" for layer, each in expected.items() for key in each}
    if odd := sorted(record.keys() ^ wanted):
        raise ValueError(f"other sums were asked for: {odd[:3]}")
    found: dict[str, Sums] = {}
    for layer, each in expected.items():
        found[layer] = {}
        for key, shape in each.items():
            head = read_header(record[f"{layer}/{key}"])
            if head.dtype != np.float64 or head.shape != shape:
                raise ValueError(
                    f"{layer}: {key} is {head.dtype} of shape {head.shape}, expected float64 "
                    f"of shape {shape}"
                )
            values = read_array(record[f"{layer}/{key}"], head)
            if not bool((np.abs(values) <= MAX_ENTRY).all()):  # Written so that NaN fails.
                raise ValueError(f"{layer}: {key} is not finite or too large")
            if key in ("spread", "deviation", "squares") and values.min(initial=0.0) < 0:
                raise ValueError(f"{layer}: {key} is negative")
            found[layer][key] = torch.from_numpy(values)
        count = float(found[layer]["count"])
        if not 0 < count <= MAX_COUNT:
            raise ValueError(f"{layer}: {count} is no number of samples")
        if "gram" in each:
            gram = found[layer]["gram"]
            if not torch.allclose(gram, gram.T, rtol=1e-3, atol=1e-6 * float(gram.abs().max())):
                raise ValueError(f"{layer}: X^T X is not symmetric")
            if float(gram.diagonal().min()) < 0:
                raise ValueError(f"{layer}: X^T X has a negative diagonal")
    return found
