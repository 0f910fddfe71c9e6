"""Runs that write a checkpoint after each round and can resume from the newest one."""

from fl_rebasin.flower.checkpoint.checkpointed import Checkpointed
from fl_rebasin.flower.checkpoint.files import Checkpoint, load_checkpoint

__all__ = ["Checkpoint", "Checkpointed", "load_checkpoint"]
