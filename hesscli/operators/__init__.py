"""Curvature matrices as operators: Hessian, Gauss-Newton, Fisher."""
