"""Comparisons in, a score out: the reward model."""
