"""The symmetry of a model: what may be permuted, derived from traced runs and then checked."""
