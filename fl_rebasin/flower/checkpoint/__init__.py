"""Runs that write a checkpoint after each round, and resume from the newest one."""
