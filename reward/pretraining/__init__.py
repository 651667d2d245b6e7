"""Preference-model pre-training: `make pmp`."""
