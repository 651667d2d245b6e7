"""Recipes: their fields, and how they are read."""
