"""The page of a run in progress, served on loopback."""
