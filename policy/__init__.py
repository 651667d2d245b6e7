"""Prompts and a score in, a policy out: the PPO loop."""
