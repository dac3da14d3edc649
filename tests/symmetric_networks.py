"""Small networks with known symmetries, in float64, and problems of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscli
from hesscli.diagnostics.symmetry_places import found_in
from hesscli.engines.symmetry.families import tangents
from hesscli.problem.problem import Problem
from hesscli.results import SymmetryResult

WIDTH, HEADS, GROUPS, RANK, TOKENS, LENGTH = 12, 4, 2, 4, 14, 5


class Attention(nn.Module):
    """Causal attention: keys and values by groups of heads, rotary planes, norms of both."""

    def __init__(
        self,
        *,
        groups: int,
        rotary: Callable[[Tensor], Tensor] | None = None,
        normed: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.groups, self.rotary = groups, rotary
        self.query = nn.Linear(WIDTH, HEADS * RANK, bias=bias)
        self.key = nn.Linear(WIDTH, groups * RANK, bias=bias)
        self.value = nn.Linear(WIDTH, groups * RANK, bias=bias)
        self.out = nn.Linear(HEADS * RANK, WIDTH, bias=bias)
        self.norms = nn.ModuleList(nn.RMSNorm(RANK, eps=1e-5) for _ in range(2 * normed))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (-1, RANK)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if self.norms:
            query, key = self.norms[0](query), self.norms[1](key)
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        key, value = (part.repeat_interleave(HEADS // self.groups, 1) for part in (key, value))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(seen.transpose(1, 2).flatten(-2))


def _angles(x: Tensor) -> Tensor:
    speeds = torch.arange(RANK // 2, dtype=x.dtype).add(1).reciprocal()
    return torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * speeds


def halves(x: Tensor) -> Tensor:
    """Rotary positions, the first half of a head's channels with the second."""
    angles = _angles(x).repeat(1, 2)
    one, other = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-other, one], -1) * angles.sin()


def neighbours(x: Tensor) -> Tensor:
    """Each channel with the next."""
    angles = _angles(x)
    one, other = x[..., ::2], x[..., 1::2]
    turned = one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()
    return torch.stack(turned, -1).flatten(-2)


def complex_numbers(x: Tensor) -> Tensor:
    """The same by products of complex numbers."""
    angles = _angles(x)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


ROTARY = (halves, neighbours, complex_numbers)


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 9, bias=False), nn.Linear(WIDTH, 9, bias=False)
        self.down = nn.Linear(9, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Perceptron(nn.Module):
    """GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Decoder(nn.Module):
    """A language model of one pre-norm block."""

    def __init__(
        self,
        norm: Callable[[], nn.Module],
        attention: nn.Module,
        perceptron: nn.Module,
        *,
        positions: bool = False,
        tied: bool = False,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH, padding_idx=padding)
        self.positions = nn.Embedding(LENGTH, WIDTH) if positions else None
        self.norm1, self.attention = norm(), attention
        self.norm2, self.perceptron = norm(), perceptron
        self.norm, self.head = norm(), nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1]))
        x = x + self.attention(self.norm1(x))
        x = x + self.perceptron(self.norm2(x))
        return self.head(self.norm(x))


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def rms_norm() -> nn.Module:
    return nn.RMSNorm(WIDTH, eps=1e-5)


def gpt_like(**options: object) -> Decoder:
    options = {"positions": True, **options}
    return Decoder(layer_norm, Attention(groups=HEADS), Perceptron(), **options)  # type: ignore[arg-type]


def llama_like(
    *, normed: bool = False, rotary: Callable[[Tensor], Tensor] = halves, **options: object
) -> Decoder:
    attention = Attention(groups=GROUPS, rotary=rotary, normed=normed)
    return Decoder(rms_norm, attention, Gated(), **options)  # type: ignore[arg-type]


class Pictures(nn.Module):
    """Convolutions with batch norm between them and their activations."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.activation = nn.ReLU() if activation is None else activation
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.activation(self.norm1(self.conv1(x))), 2)
        x = self.activation(self.norm2(self.conv2(x)))
        return self.head(x.flatten(1))


class Squared(nn.Module):
    """ReLU²."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights of no special value, norms and statistics included."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                vectors = tensor.dim() < 2
                tensor.copy_(1 + 0.3 * noise if vectors else noise / tensor[0].numel() ** 0.5)
    return model


def problem_of(model: nn.Module, *, batches: int = 3, seed: int = 0) -> Problem:
    """A problem of a model: tokens, pictures or rows, by what it takes."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        if isinstance(model, Decoder):
            tokens = torch.randint(0, TOKENS, (4, LENGTH + 1), generator=generator)
            made.append((tokens[:, :-1], tokens[:, 1:]))
            continue
        shape = (6, 2, 8, 8) if isinstance(model, Pictures) else (6, 5)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        made.append((x, torch.randint(0, 3, (6,), generator=generator)))
    loss = "language_model" if isinstance(model, Decoder) else "cross_entropy"
    return hesscli.Problem(model, loss, made)


def require_complete(decoder: nn.Module, result: SymmetryResult) -> None:
    """All that holds leaves the outputs alone, on many rows of tokens, and nothing else does."""
    problem = problem_of(spread(decoder))
    parameters = problem.parameters
    theta = parameters.flatten([tensor.detach() for tensor in parameters.tensors])
    x = torch.randint(0, TOKENS, (32, LENGTH), generator=torch.Generator().manual_seed(1))

    def outputs(theta: Tensor) -> Tensor:
        named = dict(zip(parameters.names, parameters.split(theta), strict=True))
        logits = torch.func.functional_call(problem.model, named, (x,))
        return (logits - logits.mean(-1, keepdim=True)).flatten()

    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.func.jacrev(outputs)(theta)
    held = [
        torch.stack(tangents(family, theta))
        for family, report in zip(found_in(problem), result.families, strict=True)
        if report.status == "holds"
    ]
    directions = torch.cat(held)
    assert len(directions) == result.flat.directions
    changes = (directions / directions.norm(dim=1, keepdim=True)) @ jacobian.T
    assert changes.norm(dim=1).max() < 1e-12 * jacobian.norm()
    # Between rounding, of so many rows, and the least of what is not flat, 1e-10 of the largest.
    rounding = len(jacobian) * torch.finfo(torch.float64).eps
    rank = int(torch.linalg.matrix_rank(jacobian, rtol=rounding))
    assert result.flat.independent == len(theta) - rank
