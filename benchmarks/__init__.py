"""This project beside its peers: the same work, in turn, on one machine.

``python -m benchmarks.reward`` compares the reward stage with ``trl.RewardTrainer``,
``python -m benchmarks.ppo`` the PPO stage with the last ``PPOTrainer``.

    harness        child processes in turn, medians, the machine, the result files
    hh_shaped      comparisons with the lengths of Anthropic HH, out of a seed
    reward_rows    which comparisons, as token ids; pairs for trl
    reward_sides   what one child does: prepare the rows, train ours, train theirs
    reward         the cases, the ratios and the report
    peer           a peer's release in a folder of its own
    ppo_task       what both sides do alike, and how a run is timed
    ppo_sides      what one child does
    ppo_ours       our loop on one base with three adapters
    ppo_theirs     PPOTrainer of trl 1.12.0
    ppo_work       operations that the matrix products of a step need
    ppo            the cases, the ratios, the scaling
    ppo_page       the results as a page
"""
