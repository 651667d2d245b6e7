"""Speed, memory and rewards beside trl, and what a kill at any moment changes.

``python -m benchmarks.reward`` compares the reward stage with ``trl.RewardTrainer``, ``python -m
benchmarks.ppo`` the PPO stage with the last ``PPOTrainer``, ``python -m benchmarks.gold`` the reward that
ours and three of trl's trainers reach; ``python -m benchmarks.faults`` kills PPO in every phase. Each is a
package: ``__main__`` runs the sides in turn, in processes of their own (``harness``), and writes the page
(``report``).
"""
