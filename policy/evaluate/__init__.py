"""Held-out prompts, before against after, paired; best of n beside them."""
