"""Reproducible studies: published claims tried on small models, with the project's own losses."""
