"""Generated code runs here, cut off from the machine."""
