"""The part that speaks Flower: strategies for a ServerApp, handlers for a ClientApp."""

from fl_rebasin.flower.batchnorm import (
    BatchNormRecalibration,
    add_batchnorm_handler,
    recalibrate_on_clients,
)
from fl_rebasin.flower.checkpoint import Checkpoint, Checkpointed, load_checkpoint
from fl_rebasin.flower.guard import add_guard_handler
from fl_rebasin.flower.handlers import add_rebasin_handlers
from fl_rebasin.flower.least_squares import add_least_squares_handler
from fl_rebasin.flower.matching import add_matching_handler
from fl_rebasin.flower.mod import rebasin_mod
from fl_rebasin.flower.strategy import ReBasinStrategy
from fl_rebasin.flower.wrapper import WrappedStrategy

__all__ = [
    "BatchNormRecalibration",
    "Checkpoint",
    "Checkpointed",
    "ReBasinStrategy",
    "WrappedStrategy",
    "add_batchnorm_handler",
    "add_guard_handler",
    "add_least_squares_handler",
    "add_matching_handler",
    "add_rebasin_handlers",
    "load_checkpoint",
    "rebasin_mod",
    "recalibrate_on_clients",
]
