"""Run folders: stages, checkpoints, manifests."""
