"""Seconds and memory of a PPO step against trl's last PPOTrainer: `make bench-ppo`."""
