"""Everything a ClientApp needs to answer the server, in one line."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.clientapp import ClientApp

from fl_rebasin.flower.align import PERMUTATION
from fl_rebasin.flower.guard import LOSSES
from fl_rebasin.flower.questions import LoadFn, answer_with
from fl_rebasin.merging.batchnorm import STATISTICS
from fl_rebasin.merging.clients import Question
from fl_rebasin.merging.joint_head.head_sums import FEATURES, HEAD
from fl_rebasin.merging.least_squares.sums import LAYER_SUMS, REGMEAN_SUMS

QUESTIONS = (STATISTICS, PERMUTATION, LAYER_SUMS, REGMEAN_SUMS, FEATURES, HEAD, LOSSES)
"""Every question of `ReBasinStrategy` and its options."""


def add_rebasin_handlers(
    app: ClientApp,
    load: LoadFn,
    load_held_back: LoadFn | None = None,
    *,
    load_all: LoadFn | None = None,
    more: Iterable[Question] = (),
) -> None:
    """Let a ClientApp answer every question of `ReBasinStrategy`.

    Args:
        app: the ClientApp; gets a query handler for each question.
        load: returns a module of the architecture, whose weights are overwritten, and batches of
            the client's inputs: tensors, or pairs of inputs and labels (which only
            straight-through matching needs). The module is called with the inputs as its only
            argument.
        load_held_back: the same with batches of inputs and labels that training leaves out; only
            the guard needs it.
        load_all: the same with all training batches, inputs and labels, which `JointHead` uses;
            `load` by default.
        more: questions of finishing steps of your own.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> app = ClientApp()
        >>> add_rebasin_handlers(app, lambda context: (nn.Linear(2, 2), [torch.rand(8, 2)]))
    """
    sources = {"some": load, "all": load_all or load, "held-back": load_held_back}
    for question in (*QUESTIONS, *more):
        source = sources[question.data]
        if source is not None:
            answer_with(app, question, source)
