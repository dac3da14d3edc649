"""Results as pictures: pure functions from a result to a figure."""
