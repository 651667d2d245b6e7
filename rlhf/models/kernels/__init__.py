"""What computes in place of plain torch: oneDNN on a CPU, and what a recipe asks for by name."""
