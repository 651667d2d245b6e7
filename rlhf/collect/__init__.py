"""The `comparisons` stage: read, or sample and label, then split by prompt."""
