"""A joint head: the last layer fitted to the features and labels of all clients."""

from fl_rebasin.merging.joint_head.step import JointHead, fit_joint_head

__all__ = ["JointHead", "fit_joint_head"]
