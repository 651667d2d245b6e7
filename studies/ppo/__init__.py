"""What optimization does to a learned reward, where the gold score is known.

``python -m studies.ppo`` trains small language models from nothing, reward models on noisy labels of a gold
score, and policies against them with the project's own PPO; it writes study.json, study.md and the plots.

    models     a rung, its comparisons, and reward models on rungs of two sizes
    policies   a policy against a reward model, step by step; best of n
    units      a rung, its pairs, a reward model, a policy or best of n = one unit of work
    plan       which units, with every number that decides their result
    fits       curves over sqrt(KL) and their fits
    curves     the trajectories of an arm, paired by seed
    laws       claims 7 to 10: along the way
    comparisons  claims 17, 18, 22, 23: one arm beside another
    claims     all of them, and what it would take to decide the others
    report     study.md
    plots      the plots
"""
