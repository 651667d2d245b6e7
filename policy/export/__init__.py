"""A trained policy as a plain causal language model."""
