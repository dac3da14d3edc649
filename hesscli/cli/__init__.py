"""The command line: one thin file a command; heavy imports sit inside functions."""
