"""A small convolutional classifier for 28 by 28 images of clothing."""

import torch
from torch import Tensor, nn


class FashionNet(nn.Module):
    """Three convolutions with batch norm, a spatial mean and a linear head.

    Between its parameters and its logits there is nothing but ReLUs and linear maps once batch
    norm is in evaluation mode: each parameter's path is piecewise linear in it alone.
    """

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 5, stride=2, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 3 * width, 3, stride=2, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(3 * width)
        self.head = nn.Linear(3 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map bytes as stored, (N, 28, 28) or (N, 1, 28, 28), to logits (N, classes)."""
        x = images.reshape(-1, 1, 28, 28).to(self.conv1.weight.dtype) / 255
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        x = torch.relu(self.norm3(self.conv3(x)))
        return self.head(x.mean((2, 3)))
