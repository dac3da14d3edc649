"""Gradients of single examples: squared and summed for a diagonal, or as the rows of a window."""
