"""Kill the PPO stage at random moments, start it again until it ends, and compare with an undisturbed run.

``python -m benchmarks.faults --kills 100`` makes a tiny model, its comparisons and its reward model in a
scratch folder. Everything that a finished run leaves must be the same, bit for bit. The tests kill single
stages by :mod:`benchmarks.faults.killed_process`.
"""
