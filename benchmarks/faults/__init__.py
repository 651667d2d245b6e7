"""Kill the PPO stage at random moments, start it again until it ends, and compare with an undisturbed run.

``python -m benchmarks.faults --kills 100`` makes a tiny model, its comparisons and its reward model in a
scratch folder. Everything that a finished run leaves must be the same, bit for bit.

    killed_process   a stage in a process of its own, with a signal or a full disk in a chosen phase
    campaign         many kills, phase after phase, and what differs afterwards
"""
