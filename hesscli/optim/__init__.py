"""Optimizers on the engines: they differentiate a live loss, and need no problem.

:class:`AdaHessian` divides by the Hessian's diagonal (Yao, Gholami, Shen, Mustafa, Keutzer &
Mahoney 2020, arXiv 2006.00719). :class:`MFAC` multiplies by the inverse Fisher matrix of a window
of gradients (Frantar, Kurtic & Alistarh 2021, arXiv 2107.03356). :class:`UpdateLog` keeps the
steps of these and of others.
"""

from hesscli.optim.adahessian import AdaHessian
from hesscli.optim.mfac import MFAC
from hesscli.optim.updates import UpdateLog

__all__ = ["MFAC", "AdaHessian", "UpdateLog"]
