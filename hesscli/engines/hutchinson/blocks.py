"""Blocks of a tensor's entries over which AdaHessian averages the Hessian's diagonal.

The rules, for the tensors that they apply to:

========== ============================ ==================================================
rule       tensors                      a block
========== ============================ ==================================================
kernel     rank 3 and more              one spatial kernel: all dimensions after two
row        rank 2 and more              all weights into one output unit or output channel:
                                        a matrix's row, a convolution's filter
channel    rank 2 and more              all weights that read one input unit or input channel:
                                        a matrix's column, dimension 1 of a convolution
head:N     matrices with rows that N    one of N equal groups of rows, such as an attention
           divides                      head's (3 × heads for a fused query-key-value matrix)
N          rank 2 and more              N consecutive entries of a row; the last of a row may
                                        be shorter
image      rank 2 and more              convolutions by ``kernel``, a matrix entry by entry, as
                                        in the authors' code for images
auto       all                          convolutions by ``kernel``, matrices by ``32``
========== ============================ ==================================================

A rule that does not apply to a tensor leaves it to ``auto``; vectors and scalars are always
kept entry by entry, which is called ``none``. AdaHessian (Yao et al. 2021, "AdaHessian: an
adaptive second order optimizer for machine learning") averages over spatial kernels in vision
models and over consecutive entries in language models; here those never cross a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscli.vocabulary import BlockRule

MATRIX_BLOCK = 32
"""Consecutive entries in a block of a matrix, unless said otherwise."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of one tensor: runs of ``size`` entries in each of its ``rows``.

    Attributes:
        rule: the one that applied, as it is typed.
        shape: of the tensor.
        rows: stretches that no block crosses.
        size: entries in a block, but for a shorter last one in each row.
        by_input: rows run along dimension 1 of the tensor, not 0.
    """

    rule: str
    shape: tuple[int, ...]
    rows: int
    size: int
    by_input: bool = False

    @classmethod
    def of(cls, shape: Sequence[int], rule: BlockRule) -> Blocks:
        """The blocks of a tensor of some shape."""
        shape = tuple(shape)
        numel = math.prod(shape)
        if len(shape) < 2 or numel == 0:
            return cls("none", shape, rows=1, size=1)
        outputs, inputs = shape[:2]
        match rule.kind:
            case "kernel" if len(shape) > 2:
                return cls("kernel", shape, outputs * inputs, math.prod(shape[2:]))
            case "row":
                return cls("row", shape, outputs, numel // outputs)
            case "channel":
                return cls("channel", shape, inputs, numel // inputs, by_input=True)
            case "head" if len(shape) == 2 and outputs % rule.number == 0:
                return cls(f"head:{rule.number}", shape, rule.number, numel // rule.number)
            case "image" if len(shape) == 2:
                return cls("none", shape, rows=1, size=1)
            case "entries":
                size = min(rule.number, numel // outputs)
                return cls(str(rule.number), shape, outputs, size)
        return cls.of(shape, _AUTO[len(shape) > 2])

    @property
    def per_row(self) -> int:
        """Blocks in a row of the tensor."""
        return -(-self._length // self.size)

    @property
    def count(self) -> int:
        """Number of blocks in the tensor."""
        return self.rows * self.per_row

    def sizes(self) -> Tensor:
        """Entries in each block, ``(count,)``."""
        row = torch.full((self.per_row,), self.size, device="cpu")
        row[-1:] -= self.per_row * self.size - self._length
        return row.repeat(self.rows)

    def means(self, tensor: Tensor) -> Tensor:
        """Signed block means ``(…, count)`` of tensors ``(…, *shape)``."""
        if self.size == 1:
            lead = tensor.dim() - len(self.shape)
            return tensor.reshape((*tensor.shape[:lead], self.count))
        rows = self._to_rows(tensor)
        whole = self._length // self.size
        cut = whole * self.size
        means = rows[..., :cut].reshape(*rows.shape[:-1], whole, self.size).mean(-1)
        if cut < self._length:
            means = torch.cat([means, rows[..., cut:].mean(-1, keepdim=True)], dim=-1)
        return means.flatten(-2)

    def average(self, tensor: Tensor) -> Tensor:
        """Tensors ``(…, *shape)`` with each entry replaced by its block's signed mean."""
        return tensor if self.size == 1 else self.spread(self.means(tensor))

    def spread(self, means: Tensor) -> Tensor:
        """Tensors ``(…, *shape)`` with each entry that of its block in ``(…, count)``."""
        if self.size == 1:
            return means.reshape((*means.shape[:-1], *self.shape))
        means = means.view(*means.shape[:-1], self.rows, self.per_row, 1)
        rows = means.expand(*means.shape[:-1], self.size).flatten(-2)
        return self._from_rows(rows[..., : self._length])

    @property
    def _length(self) -> int:
        return math.prod(self.shape) // self.rows

    def _to_rows(self, tensor: Tensor) -> Tensor:
        lead = tensor.dim() - len(self.shape)
        if self.by_input:
            tensor = tensor.movedim(lead + 1, lead)
        return tensor.reshape(*tensor.shape[:lead], self.rows, self._length)

    def _from_rows(self, rows: Tensor) -> Tensor:
        lead = rows.shape[:-2]
        if not self.by_input:
            return rows.reshape(*lead, *self.shape)
        outputs, inputs, *rest = self.shape
        return rows.reshape(*lead, inputs, outputs, *rest).movedim(len(lead), len(lead) + 1)


_AUTO = {True: BlockRule("kernel"), False: BlockRule("entries", MATRIX_BLOCK)}
