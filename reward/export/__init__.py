"""A trained reward model as a plain sequence classifier."""
