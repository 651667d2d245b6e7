"""Online RLHF in rounds: the stages, run again and again on comparisons of the newest policies."""
