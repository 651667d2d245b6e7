"""A policy that learns from people, at equal samples, judged by a reward model it has not met.

``python -m studies.people --recipe RECIPE`` splits the recipe's training comparisons in halves (Bai 2022,
arXiv 2204.05862, section 4.2), trains a reward model on each, trains policies against the one, and judges
them by the other.

    plan      the units of a study
    units     what each does: the stages' own command lines, in runs of their own
    trl_arms  trl's RLOO and GRPO trainers against our saved reward model
    report    the table over seeds; study.md
"""
