"""Circuits: which edges between components compute a number, estimated, and run on their own."""
