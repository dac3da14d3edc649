"""Hutchinson's estimator: quadratic forms of random probes, and what they are worth."""
