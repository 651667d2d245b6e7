"""Several models on the same items: outcomes, paired differences, the page and its plot."""
