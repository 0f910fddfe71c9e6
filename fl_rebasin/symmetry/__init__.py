"""What may be permuted in a model: derived from one traced run, and proved before it is used."""
