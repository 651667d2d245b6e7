"""``PPOConfig`` and ``PPOTrainer`` with the arguments of trl 1.12, the last release that had them."""

from policy.trl_compat.config import PPOConfig
from policy.trl_compat.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
