"""Small networks that several test modules load weights into."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hesscli.problem.checkpoint import Checkpoint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def same_weights(read: Checkpoint, model: nn.Module) -> bool:
    expected = model.state_dict()
    return read.state.keys() == expected.keys() and all(
        torch.equal(read.state[name], value) for name, value in expected.items()
    )
