"""Evaluations of language models, item by item, so that two models can be paired.

Every task has ``read(files)``, pure functions for its metrics, and ``run(lm, items, ...)`` which gives an
:class:`~rlhf.evals.outcome.Outcome`. :mod:`rlhf.evals.registry` knows them by name.
"""
