"""A small forecaster of the sunspot cycle."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SunspotNet(nn.Module):
    """Two layers of tanh units from the last `lags` years to the next one.

    Smooth in every parameter and small enough for its dense Hessian, so what an estimator says
    of it can be checked to rounding.
    """

    def __init__(self, lags: int = 12, widths: Sequence[int] = (18, 4)) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(lags, widths[0])
        self.hidden2 = nn.Linear(widths[0], widths[1])
        self.head = nn.Linear(widths[1], 1)
        self.double()  # as trained: rounded to single precision, a minimum is one no more

    def forward(self, lags: Tensor) -> Tensor:
        """Map standardised years (N, lags), oldest first, to the year that follows (N, 1)."""
        x = torch.tanh(self.hidden1(lags.to(self.hidden1.weight.dtype)))
        return self.head(torch.tanh(self.hidden2(x)))
