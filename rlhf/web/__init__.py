"""A small web server for pages on this machine: on loopback, behind a random token."""
