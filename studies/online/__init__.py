"""Static against online comparisons at equal numbers (claim 13), in the gold lab."""
