"""One question a file: from a Problem to a frozen result."""
