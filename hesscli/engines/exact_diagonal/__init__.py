"""The diagonal of the Gauss-Newton matrix by per-example squared vector-Jacobian products."""

from hesscli.engines.exact_diagonal.engine import ExactDiagonal

__all__ = ["ExactDiagonal"]
