"""The diagonal of the Gauss-Newton matrix by per-example squared vector-Jacobian products."""

from __future__ import annotations

from hesscli.engines.per_example.engine import ExactDiagonal

__all__ = ["ExactDiagonal"]
