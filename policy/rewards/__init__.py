"""Rewards of several kinds as one reward function."""
