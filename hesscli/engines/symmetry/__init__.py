"""Transformations of the parameters that no batch's loss notices: found, and put to the test."""
