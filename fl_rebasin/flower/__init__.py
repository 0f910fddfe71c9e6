"""Flower: the strategy for a ServerApp, the handlers and the mod for a ClientApp."""

from fl_rebasin.flower.align import ActivationMatching, StraightThrough, WeightMatching
from fl_rebasin.flower.checkpoint import Checkpoint, Checkpointed, load_checkpoint
from fl_rebasin.flower.guard import Guard
from fl_rebasin.flower.handlers import add_rebasin_handlers
from fl_rebasin.flower.limits import Limits
from fl_rebasin.flower.mod import rebasin_mod
from fl_rebasin.flower.strategy import ReBasinStrategy
from fl_rebasin.flower.wrapper import WrappedStrategy
from fl_rebasin.merging.batchnorm import BatchNorm
from fl_rebasin.merging.heads import ClassAwareHead
from fl_rebasin.merging.joint_head import JointHead
from fl_rebasin.merging.least_squares import LeastSquares, RegMean, Repair

__all__ = [
    "ActivationMatching",
    "BatchNorm",
    "Checkpoint",
    "Checkpointed",
    "ClassAwareHead",
    "Guard",
    "JointHead",
    "LeastSquares",
    "Limits",
    "ReBasinStrategy",
    "RegMean",
    "Repair",
    "StraightThrough",
    "WeightMatching",
    "WrappedStrategy",
    "add_rebasin_handlers",
    "load_checkpoint",
    "rebasin_mod",
]
