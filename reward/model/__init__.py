"""A base with a scalar head: encoding, forward passes, ensembles, the saved format."""
