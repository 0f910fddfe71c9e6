"""Layerwise least squares, RegMean and REPAIR: a merged model that computes what the models do."""

from fl_rebasin.merging.least_squares.methods import (
    LeastSquares,
    RegMean,
    Repair,
    fit_least_squares,
)

__all__ = ["LeastSquares", "RegMean", "Repair", "fit_least_squares"]
