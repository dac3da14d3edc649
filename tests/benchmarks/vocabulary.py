"""Memory and time of a product with the Hessian of a language model of many classes.

``python tests/benchmarks/vocabulary.py [SEQUENCES]``: GPT-2's vocabulary of 50,257 on ten million
parameters, sequences of 128 tokens, all in one batch. Each way of making a product runs in a
process of its own; what it took at most is told in units of the logits, beyond what it began with.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

VOCABULARY, WIDTH, TOKENS = 50_257, 192, 128
WAYS = ("hessian", "ggn", "double backward", "hessian-eigenthings")


class Tiny(nn.Module):
    """One block of a transformer between tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.block = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(tokens))))


def most() -> int:
    """Bytes that were resident at most since they were last forgotten."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if "VmHWM" in line))


def product(way: str, sequences: int) -> None:
    """One product of that way, in this process, twice: the second has its code at hand."""
    model = Tiny().eval()
    tokens = torch.randint(VOCABULARY, (sequences, TOKENS + 1))
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()
    parameters = list(model.parameters())
    vector = torch.randn(sum(p.numel() for p in parameters))
    if way in ("hessian", "ggn"):
        make = _ours(way, model, x, y, vector)
    elif way == "double backward":

        def make() -> Tensor:
            loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            slopes = torch.autograd.grad(loss, parameters, create_graph=True)
            flat = torch.cat([slope.flatten() for slope in slopes])
            return torch.cat([h.flatten() for h in torch.autograd.grad(flat @ vector, parameters)])

    else:
        make = _eigenthings(model, x, y, vector)
    logits = sequences * TOKENS * VOCABULARY * 4
    Path("/proc/self/clear_refs").write_text("5")
    before, began = most(), time.perf_counter()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        found = make()
    seconds, held = time.perf_counter() - began, most() - before
    print(
        f"{way:20} {held / logits:5.2f} times the logits, {seconds:6.1f} s, "
        f"|product| {found.norm():.6g}"
    )


def _ours(way, model, x, y, vector):  # type: ignore[no-untyped-def]
    from hesscli.operators.gauss_newton import GaussNewton
    from hesscli.operators.hessian import Hessian
    from hesscli.problem.freezing import FrozenData
    from hesscli.problem.problem import Problem

    few = FrozenData(((x[:1], y[:1]),), (1,), 1, True, "x")
    problem = Problem(model, "language_model", few)  # which runs the model on little
    batch = problem.batch_of((x, y), 0, 1.0)
    operator = {"hessian": Hessian, "ggn": GaussNewton}[way](problem, mode="double-backward")

    def make() -> Tensor:
        with problem.forward_context():
            return operator.live(batch)(vector[None])[0]

    return make


def _eigenthings(model, x, y, vector):  # type: ignore[no-untyped-def]
    from hessian_eigenthings import HessianOperator, supervised_loss

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    operator = HessianOperator(model, [(x, y)], supervised_loss(loss))
    return lambda: operator @ vector


def main() -> None:
    if len(sys.argv) == 3:
        product(sys.argv[1], int(sys.argv[2]))
        return
    sequences = sys.argv[1] if len(sys.argv) > 1 else "64"
    size = sum(p.numel() for p in Tiny().parameters())
    print(f"{size:,} parameters, {sequences} sequences of {TOKENS}, one thread", flush=True)
    for way in WAYS:
        subprocess.run([sys.executable, __file__, way, sequences], check=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
