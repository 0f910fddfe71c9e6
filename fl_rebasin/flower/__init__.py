"""The part that speaks Flower: strategies for a ServerApp, handlers for a ClientApp."""

from fl_rebasin.flower.batchnorm import (
    BatchNormRecalibration,
    add_batchnorm_handler,
    recalibrate_on_clients,
)
from fl_rebasin.flower.strategy import ReBasinStrategy

__all__ = [
    "BatchNormRecalibration",
    "ReBasinStrategy",
    "add_batchnorm_handler",
    "recalibrate_on_clients",
]
