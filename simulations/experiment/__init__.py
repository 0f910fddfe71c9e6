"""What the simulation scripts share: data sets, client splits, models."""
