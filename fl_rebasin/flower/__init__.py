"""The part that speaks Flower: strategies for a ServerApp, handlers for a ClientApp."""

from fl_rebasin.flower.batchnorm import (
    BatchNormRecalibration,
    add_batchnorm_handler,
    recalibrate_on_clients,
)
from fl_rebasin.flower.strategy import ReBasinStrategy
from fl_rebasin.flower.wrapper import WrappedStrategy

__all__ = [
    "BatchNormRecalibration",
    "ReBasinStrategy",
    "WrappedStrategy",
    "add_batchnorm_handler",
    "recalibrate_on_clients",
]
