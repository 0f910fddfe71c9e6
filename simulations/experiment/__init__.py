"""Code shared by the simulation scripts: data sets, client splits, models, training, reports."""
