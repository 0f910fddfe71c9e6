"""N models into one: the aligned average, and the steps that finish it with data."""
