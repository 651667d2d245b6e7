"""Neurons that a training moved, and what their words and the model's states say of it."""
