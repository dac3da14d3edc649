"""Other libraries' Hessian products behind one call, ``block(V)``, on the same problem as ours.

A peer gets its own copy of the model, the same frozen batches as ``(inputs, targets)`` and the
same mean loss as a torch criterion. It is called as its documentation says, over all batches.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice

import torch
from torch import Tensor, nn

from hesscli import Problem


@dataclass(frozen=True)
class Task:
    """A model, a criterion of outputs ``(N, K)`` and targets, and equal batches.

    Labels are ``(N,)``.
    """

    model: nn.Module
    criterion: nn.CrossEntropyLoss | nn.MSELoss
    batches: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, problem: Problem, count: int | None = None) -> Task:
        """The same loss as a torch criterion; tokens become examples of their own.

        ``count`` keeps the first batches only. Weight decay, which no criterion has, is left out.

        Raises:
            ValueError: another loss, or batches of unequal weight, which some peers count equally.
        """
        if problem.loss.name not in ("cross_entropy", "language_model", "mse"):
            raise ValueError(f"no criterion for {problem.loss.name}")
        weighted = list(islice(problem.batches(), count))
        if max(b.weight for b in weighted) > (1 + 1e-9) * min(b.weight for b in weighted):
            raise ValueError("batches of unequal weight")
        pairs = [batch.data for batch in weighted]
        model = copy.deepcopy(problem.model)
        if problem.loss.name == "mse":
            return cls(model, nn.MSELoss(), pairs)
        pairs = [(inputs, targets.long().flatten()) for inputs, targets in pairs]
        flat = model if problem.loss.name == "cross_entropy" else OneRowAToken(model)
        return cls(flat, nn.CrossEntropyLoss(), pairs)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The columns of the matrix, in the order of the flat vector."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean loss of a batch."""
        inputs, targets = batch
        value: Tensor = self.criterion(self.model(inputs), targets)
        return value


class OneRowAToken(nn.Module):
    """A language model whose outputs ``(N, T, V)`` are given as ``(N·T, V)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits.flatten(0, 1)


class Peer(ABC):
    """A library's way to multiply the Hessian over all batches with a block of vectors."""

    distribution: str
    call: str

    def __init__(self, task: Task) -> None:
        self.task = copy.deepcopy(task)

    @classmethod
    def title(cls) -> str:
        """Name, version and which of its calls this is."""
        return f"{cls.distribution} {version(cls.distribution)}, {cls.call}"

    @abstractmethod
    def block(self, vectors: Tensor) -> Tensor:
        """Products with rows: ``(k, d)`` to ``(k, d)``."""

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat vector in the parameters' shapes."""
        parameters = self.task.parameters
        pieces = torch.split(vector, [p.numel() for p in parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


class PyHessianLoader(Peer):
    """PyHessian over a loader: forward, gradient and product anew for each probe and batch."""

    distribution, call = "pyhessian", "loader"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from pyhessian import hessian

        self.library = hessian(
            self.task.model, self.task.criterion, dataloader=self.task.batches, cuda=False
        )

    def block(self, vectors: Tensor) -> Tensor:
        rows = [self.library.dataloader_hv_product(self.split(v))[1] for v in vectors]
        return torch.stack([flatten(row) for row in rows])


class PyHessianBatches(Peer):
    """PyHessian on one batch after another, so that a batch's gradient serves all probes.

    The library offers it for a single batch; the loop over batches is the user's own.
    """

    distribution, call = "pyhessian", "batch by batch"

    def block(self, vectors: Tensor) -> Tensor:
        from pyhessian import hessian
        from pyhessian.utils import hessian_vector_product

        total = torch.zeros_like(vectors)
        for batch in self.task.batches:
            self.task.model.zero_grad()
            term = hessian(self.task.model, self.task.criterion, data=batch, cuda=False)
            for row, v in zip(total, vectors, strict=True):
                row += flatten(hessian_vector_product(term.gradsH, term.params, self.split(v)))
        self.task.model.zero_grad()  # gradients hold their graph
        return total / len(self.task.batches)


class Curvlinops(Peer):
    """curvlinops: the whole block in one vmap of forward mode over ``jacrev``."""

    distribution, call = "curvlinops-for-pytorch", "H @ V"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from curvlinops import HessianLinearOperator

        self.operator = HessianLinearOperator(
            self.task.model,
            self.task.criterion,
            self.task.parameters,
            self.task.batches,
            check_deterministic=False,
            num_data=sum(len(inputs) for inputs, _ in self.task.batches),
        )

    def block(self, vectors: Tensor) -> Tensor:
        product: Tensor = self.operator @ vectors.T
        return product.T


class HessianEigenthings(Peer):
    """hessian-eigenthings: one vector at a time."""

    distribution, call = "hessian-eigenthings", "H @ v"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from hessian_eigenthings import HessianOperator, supervised_loss

        loss: Callable[..., Tensor] = supervised_loss(self.task.criterion)
        self.operator = HessianOperator(self.task.model, self.task.batches, loss)

    def block(self, vectors: Tensor) -> Tensor:
        return torch.stack([self.operator @ v for v in vectors])


PEERS: tuple[type[Peer], ...] = (
    PyHessianLoader,
    PyHessianBatches,
    Curvlinops,
    HessianEigenthings,
)


def flatten(parts: list[Tensor]) -> Tensor:
    """One vector from the parts' entries."""
    return torch.cat([part.reshape(-1) for part in parts])
