"""Readers of published preference sets, by what a row holds: a verdict, grades, a suite's item, an export."""

from rlhf.data.readers.public import arguments, ethics, exports, graded, pairs, suites, summaries

PUBLIC = (
    *suites.READERS,
    *exports.READERS,
    *arguments.READERS,
    *ethics.READERS,
    *graded.READERS,
    *summaries.READERS,
    *pairs.READERS,
)
"""In the order of recognition: the least particular fields come last."""
