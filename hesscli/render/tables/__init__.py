"""Results as tables for a terminal, one command a file."""
