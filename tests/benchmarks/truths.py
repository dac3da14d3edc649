"""What the trace, the layers' traces and the diagonal are, by routes that use nothing but torch.

sunspots: the dense Hessian in float64. fashion: each weight's path to the logits is piecewise
linear, so the diagonal is that of Jᵀ(diag p − ppᵀ)J, from explicit Jacobians in float64. text: the
Gauss-Newton part from the scores of drawn labels and the rest from random signs, many of each and
with standard errors; single entries of the diagonal from products with unit vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peers import Task, flatten
from pool import Pool, Rows
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy, one_hot

CHUNK = 50
"""Images whose Jacobians are held at once."""
DRAWS, PASSES, ENTRIES = 24, 100, 500
"""Labels drawn for each token, random signs for each batch, and unit vectors, on text."""
BLOCK = 25
SEED = 7


@dataclass(frozen=True)
class Truth:
    """True values, and how far they may be off.

    Attributes:
        layers: traces.
        whole: all of the diagonal, as well as it is known.
        diagonal: at ``entries`` of the flat vector.
        shares: how many entries each of these stands for.
        errors: standard errors of ``layers``, and of their sum in the last place.
    """

    layers: Tensor
    whole: Tensor
    entries: Tensor
    diagonal: Tensor
    shares: Tensor
    errors: Tensor
    how: str

    @classmethod
    def complete(cls, diagonal: Tensor, layer: Tensor, how: str) -> Truth:
        """From a whole diagonal without error."""
        everything = torch.arange(len(diagonal))
        layers = by_layer(diagonal, layer)
        nothing = torch.zeros(len(layers) + 1, dtype=torch.float64)
        ones = torch.ones_like(diagonal)
        return cls(layers, diagonal, everything, diagonal, ones, nothing, how)

    @property
    def trace(self) -> float:
        return float(self.layers.sum())

    @property
    def square(self) -> float:
        """‖diag H‖²."""
        return float(self.shares @ self.diagonal.square())

    def diagonal_error(self, estimate: Tensor) -> float:
        """‖estimate − diag H‖ / ‖diag H‖."""
        return math.sqrt(self.shares @ (estimate[self.entries] - self.diagonal).square()) / (
            math.sqrt(self.square)
        )

    def trace_error(self, estimate: float) -> float:
        """Relative."""
        return abs(estimate / self.trace - 1)

    def layers_error(self, estimate: Tensor) -> float:
        """Relative, median over the layers."""
        return float((estimate / self.layers - 1).abs().quantile(0.5))


def by_layer(entries: Tensor, layer: Tensor) -> Tensor:
    """Sums over layers of the last axis."""
    sums = entries.new_zeros(*entries.shape[:-1], int(layer.max()) + 1, dtype=torch.float64)
    return sums.index_add_(-1, layer, entries.double())


def dense(pool: Pool) -> Truth:
    """From every entry of the matrix."""
    return Truth.complete(pool.kept["matrix"].diag(), pool.layer, "dense float64 Hessian")


def piecewise_linear(task: Task, layer: Tensor, rows: Rows) -> Truth:
    """Of a classifier whose outputs are piecewise linear in each weight."""
    if "diagonal" not in rows:
        rows.append(diagonal=jacobian_diagonal(task))
    return Truth.complete(rows["diagonal"], layer, "explicit float64 Jacobians of the logits")


def jacobian_diagonal(task: Task) -> Tensor:
    """Diagonal of the mean of Jᵀ(diag p − ppᵀ)J."""
    model = task.model.double()
    theta = {name: t.detach() for name, t in model.named_parameters()}

    def logits(theta: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, theta, (example[None],))[0]

    total = torch.zeros(sum(t.numel() for t in theta.values()), dtype=torch.float64)
    for inputs, _ in task.batches:
        for part in inputs.split(CHUNK):
            p = vmap(logits, (None, 0))(theta, part).softmax(-1)
            jacobians = vmap(jacrev(logits), (None, 0))(theta, part).values()
            j = torch.cat([jacobian.flatten(2) for jacobian in jacobians], 2)
            mean = torch.einsum("nk,nkd->nd", p, j)
            total += torch.einsum("nk,nkd->d", p, j.square()) - mean.square().sum(0)
    model.float()
    return total / sum(len(inputs) for inputs, _ in task.batches)


# -- a model that bends ------------------------------------------------------------------------


def sampled(task: Task, layer: Tensor, rows: Rows) -> Truth:
    """Of a language model."""
    gauss_newton, rest = rows["gauss_newton"], rows["rest"]
    whole = gauss_newton.double().mean(0) + rest.double().mean(0)
    entries, odds = chosen(gauss_newton)
    return Truth(
        layers=by_layer(whole, layer),
        whole=whole,
        entries=entries,
        diagonal=rows["entries"],
        shares=1 / (ENTRIES * odds),
        errors=(squared_error(gauss_newton, layer) + squared_error(rest, layer)).sqrt(),
        how=f"{DRAWS} labels a token, {PASSES} random signs a batch, {ENTRIES} unit vectors",
    )


def squared_error(estimates: Tensor, layer: Tensor) -> Tensor:
    """Of the mean over rows, for each layer and for their sum."""
    sums = by_layer(estimates, layer)
    return torch.cat([sums, sums.sum(1, keepdim=True)], 1).var(0) / len(estimates)


def chosen(gauss_newton: Tensor) -> tuple[Tensor, Tensor]:
    """Entries to be known, and the odds of each; half evenly, half by the size of diag G."""
    guess = gauss_newton.double().mean(0)
    odds = 0.5 / len(guess) + 0.5 * guess / guess.sum()
    drawn = torch.Generator().manual_seed(SEED)
    entries = odds.multinomial(ENTRIES, replacement=True, generator=drawn)
    return entries, odds[entries]


def fill(task: Task, rows: Rows) -> Iterator[str]:
    """Make what :func:`sampled` needs and ``rows`` lack, telling of each block."""
    while (done := rows.count("gauss_newton")) < DRAWS:
        torch.manual_seed(SEED + 1000 + done)
        rows.append(gauss_newton=scores(task)[None])
        yield f"{done + 1} of {DRAWS} label draws"
    while (done := rows.count("rest")) < PASSES:
        torch.manual_seed(SEED + 2000 + done)
        rows.append(rest=torch.stack(list(rest_diagonals(task))).sum(0))
        yield f"{done + BLOCK} of {PASSES} passes for the rest"
    entries, _ = chosen(rows["gauss_newton"])
    while (done := rows.count("entries")) < ENTRIES:
        rows.append(entries=diagonal_at(task, entries[done : done + BLOCK]))
        yield f"{done + BLOCK} of {ENTRIES} unit vectors"


def scores(task: Task) -> Tensor:
    """diag G from one label drawn for each token: the sum of squared sequence gradients."""
    theta = {name: t.detach() for name, t in task.model.named_parameters()}

    def loss(theta: dict[str, Tensor], sequence: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(task.model, theta, (sequence[None],))
        return cross_entropy(logits, labels, reduction="sum")

    total, tokens = torch.zeros(sum(t.numel() for t in theta.values())), 0
    for inputs, targets in task.batches:
        with torch.no_grad():
            labels = torch.distributions.Categorical(logits=task.model(inputs)).sample()
        slopes = vmap(grad(loss), (None, 0, 0))(theta, inputs, labels.view(len(inputs), -1))
        total += torch.cat([slope.square().sum(0).flatten() for slope in slopes.values()])
        tokens += len(targets)
    return total / tokens


def rest_diagonals(task: Task) -> Iterator[Tensor]:
    """Each batch's share of diag(H − G), from as many random signs of its own as a block has."""
    for batch in task.batches:

        def bend(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            logits = task.model(batch[0])
            slope = logits.softmax(1) - one_hot(batch[1], logits.shape[1])
            return (slope.detach() * logits).sum() / len(logits)

        signs = torch.randint(0, 2, (BLOCK, sum(p.numel() for p in task.parameters))) * 2.0 - 1
        yield signs * multiply(task, bend, signs) / len(task.batches)


def diagonal_at(task: Task, entries: Tensor) -> Tensor:
    """eᵀHe for unit vectors e."""
    units = torch.zeros(len(entries), sum(p.numel() for p in task.parameters))
    units[torch.arange(len(entries)), entries] = 1
    total = torch.zeros(len(entries), dtype=torch.float64)
    for batch in task.batches:
        product = multiply(task, lambda batch=batch: task.loss(batch), units)  # type: ignore[misc]
        total += product.gather(1, entries[:, None])[:, 0]
    return total / len(task.batches)


def multiply(task: Task, value: Callable[[], Tensor], rows: Tensor) -> Tensor:
    """Products of the Hessian of a scalar, by differentiating its gradient."""

    def differentiate(scalar: Tensor, **options: bool) -> Tensor:
        parts = torch.autograd.grad(scalar, task.parameters, materialize_grads=True, **options)
        return flatten(list(parts))

    slope = differentiate(value(), create_graph=True)
    return torch.stack([differentiate(slope @ row, retain_graph=True) for row in rows])
