"""Which parts of a trained model carry what it learned, and what a reward model reads."""
