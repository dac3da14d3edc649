"""Optimizers on the engines: they differentiate a live loss, and need no problem.

:class:`AdaHessian` divides by the Hessian's diagonal (Yao, Gholami, Shen, Mustafa, Keutzer &
Mahoney 2020, arXiv 2006.00719).
"""

from hesscli.optim.adahessian import AdaHessian

__all__ = ["AdaHessian"]
