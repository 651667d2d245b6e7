"""Comparisons, prompts and demonstrations: reading, checking, splitting."""
