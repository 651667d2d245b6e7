"""Throughput and memory of the reward stage against trl.RewardTrainer: `make bench-reward`."""
