"""Preference-modelling claims of the papers, tried on a ladder of small transformers trained from scratch.

``python -m studies.preference`` trains everything on a CPU and writes study.json, study.md and the plots.

    data     a grammar whose sentences have a known quality; pairs, corpora and ranked sets drawn from it
    ladder   the models: N = 196,608 L^3 non-embedding weights, L layers of width 128 L
    train    the loops: language modelling, imitation, preference modelling; and what is measured
    units    one trained model and its evaluation = one unit of work, and what each of them does
    plan     which units a study consists of, with every number that decides its cost
    work     the work folder: one small JSON a unit, keyed by its configuration; resumable by construction
    claims   from unit results to intervals and verdicts
    report   study.json, study.md and the plots
"""
