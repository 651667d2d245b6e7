"""Direct preference optimization on the comparisons of the run, through trl's trainer."""
