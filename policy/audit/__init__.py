"""A second reward model looks at what PPO does: its scores beside the reward, and the best policy by them."""
