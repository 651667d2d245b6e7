"""Preference-modelling claims of the papers, tried on a ladder of small transformers trained from scratch.

``python -m studies.preference`` trains everything on a CPU and writes study.json, study.md and the plots.

    data     a grammar whose sentences have a known quality; pairs, corpora and ranked sets drawn from it
    model    the models: N = 196,608 L^3 non-embedding weights, L layers of width 128 L
    losses   language modelling, imitation, preference modelling; and scores
    measure  calibration of scores; credits of pairs
    units    what each kind of unit does: one trained model and its evaluation
    plan     which units a study consists of, with every number that decides its cost
    tables   credits, paired differences and tables over seeds
    claims   from unit results to intervals and verdicts
    report   the texts of study.md; plots
"""
