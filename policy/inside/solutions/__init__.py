"""Whether the ways between several solutions of one target are as good as the solutions themselves."""
