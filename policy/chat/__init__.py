"""Talking to models in a terminal, beside each other, and saving which answer is better."""
