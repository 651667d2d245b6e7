"""Intervals and tests, paired and clustered."""
