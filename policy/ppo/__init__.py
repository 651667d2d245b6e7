"""PPO with LoRA against a reward."""
