"""Comparisons in, a reward model out: `make reward`."""
