"""This project beside its peers: the same work, in turn, on one machine.

``python -m benchmarks.reward`` compares the reward stage with ``trl.RewardTrainer``.

    harness        child processes in turn, medians, the machine, the result files
    hh_shaped      comparisons with the lengths of Anthropic HH, out of a seed
    reward_rows    which comparisons, as token ids; pairs for trl
    reward_sides   what one child does: prepare the rows, train ours, train theirs
    reward         the cases, the ratios and the report
"""
