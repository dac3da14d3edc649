"""From rows of entries to sums by layer: the columns of every table."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.parameters import Parameters


class LayerSums:
    """Sums over each layer's entries and over all, in the layers of a whole network.

    Args:
        parameters: the entries of a row, some or all of the whole's.
        whole: whose layers the columns are; default ``parameters``.
    """

    def __init__(self, parameters: Parameters, whole: Parameters | None = None) -> None:
        self._sizes = parameters.sizes
        layers = (parameters if whole is None else whole).layers
        position = {layer: i for i, layer in enumerate(layers)}
        # A tensor without entries adds nothing, wherever it is counted.
        columns = [position.get(p.layer, 0) for p in parameters]
        self._columns = torch.tensor(columns, dtype=torch.long)
        self.num_layers = len(layers)

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows ``(P, d)`` to float64 ``(P, L + 1)`` on their device, the total last."""
        parts = torch.split(rows, list(self._sizes), dim=1)
        layers = rows.new_zeros(len(rows), self.num_layers, dtype=torch.float64)
        if parts:
            sums = torch.stack([part.sum(1, dtype=torch.float64) for part in parts], dim=1)
            self._columns = self._columns.to(rows.device)  # copied once, not for each block
            layers.index_add_(1, self._columns, sums)
        return torch.cat([layers, layers.sum(1, keepdim=True)], dim=1)
