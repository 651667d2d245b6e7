"""The gold score that PPO reaches, against trl's PPOTrainer at equal samples."""
