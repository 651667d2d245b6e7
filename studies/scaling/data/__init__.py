"""Texts, items and the small world of the scaling study."""
