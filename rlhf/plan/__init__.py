"""What a recipe needs of a machine, before anything is loaded: memory of every stage, and what would help."""
