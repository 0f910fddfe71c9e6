"""Everything that a ClientApp needs to answer the server, in one line."""

from __future__ import annotations

from flwr.clientapp import ClientApp

from fl_rebasin.flower.batchnorm import add_batchnorm_handler
from fl_rebasin.flower.guard import add_guard_handler
from fl_rebasin.flower.least_squares import add_least_squares_handler
from fl_rebasin.flower.matching import add_matching_handler
from fl_rebasin.flower.questions import LoadFn


def add_rebasin_handlers(
    app: ClientApp, load: LoadFn, load_held_back: LoadFn | None = None
) -> None:
    """Let a ClientApp answer every question of `ReBasinStrategy`.

    Args:
        app: the ClientApp; gets query handlers for the actions `rebasin_batchnorm`,
            `rebasin_matching`, `rebasin_least_squares` and, with `load_held_back`,
            `rebasin_guard`.
        load: returns a module of the architecture, whose weights are overwritten, and batches of
            the client's inputs: tensors, or pairs of inputs and labels (which only
            straight-through matching needs).
        load_held_back: the same with batches of inputs and labels that training leaves out.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> app = ClientApp()
        >>> add_rebasin_handlers(app, lambda context: (nn.Linear(2, 2), [torch.rand(8, 2)]))
    """
    add_batchnorm_handler(app, load)
    add_matching_handler(app, load)
    add_least_squares_handler(app, load)
    if load_held_back is not None:
        add_guard_handler(app, load_held_back)
