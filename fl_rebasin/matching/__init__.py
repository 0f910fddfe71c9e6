"""Which permutation brings models together: of two models, or of N."""
