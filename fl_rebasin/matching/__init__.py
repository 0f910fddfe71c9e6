"""Matching: find permutations that align one model to another, or N models to each other."""
