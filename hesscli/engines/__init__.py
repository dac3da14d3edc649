"""Engines: resumable estimators that see an operator only through its products."""
