"""What a step of the optimizers costs, whether peers take the same one, and how it fares.

    pip install --no-deps pytorch_optimizer==4.1.0 ista-daslab-optimizers==1.1.15
    python tests/benchmarks/optimizers.py [cost] [agreement] [scaled] [--give-back]

Without the peers, their rows say so. Costs are CPU times on one thread beside those of an SGD step,
turn by turn, and the median of the turns' ratios is shown. Freed memory stays with the process, as
it does under ``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_``; with ``--give-back`` the C
library does as it does by default. The tables are Markdown, kept in optimizers.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesscli.errors import UnsoundError
from hesscli.heap import keep_freed_memory
from hesscli.optim import MFAC, AdaHessian
from hesscli.randomness import key, rademacher

ROOT = Path(__file__).resolve().parents[2]
TURNS = 15
Step = Callable[[Tensor], object]


# -- Peers -----------------------------------------------------------------------------------------


def peer_adahessian() -> Any:
    """pytorch_optimizer's; None where it is not installed."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return None
    import pytorch_optimizer

    return pytorch_optimizer.AdaHessian


def peer_mfac() -> ModuleType | None:
    """The file of ista-daslab's dense M-FAC, whose package itself wants CUDA and wandb."""
    package = importlib.util.find_spec("ista_daslab_optimizers")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0], "dense_mfac", "dense_core_mfac.py")
    spec = importlib.util.spec_from_file_location("dense_core_mfac", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unpivoted_lu(matrix: Tensor, pivot: bool = False) -> tuple[Tensor, Tensor]:
    """``torch.lu(..., pivot=False)`` of a positive matrix, which torch has on CUDA alone."""
    lower = torch.linalg.cholesky(matrix)
    scales = lower.diagonal()
    return (lower / scales).tril(-1) + scales[:, None] * lower.T, torch.arange(len(matrix))


class PeerMFAC(torch.optim.Optimizer):
    """A step as their DenseMFAC takes it, without its logs."""

    def __init__(self, params: Any, lr: float, window: int, damping: float) -> None:
        super().__init__(params, {"lr": lr})
        module = peer_mfac()
        assert module is not None
        size = sum(p.numel() for p in self.param_groups[0]["params"])
        rows = torch.zeros(window, size)
        self.core = module.DenseCoreMFAC(rows, torch.device("cpu"), [torch.device("cpu")], damping)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        tensors = self.param_groups[0]["params"]
        g = torch.cat([p.grad.reshape(-1) for p in tensors])
        update = self.core.integrate_gradient_and_precondition(g, g)
        parts = torch.split(update, [p.numel() for p in tensors])
        for p, part in zip(tensors, parts, strict=True):
            p.sub_(part.view(p.shape), alpha=self.param_groups[0]["lr"])


def one_by_one(functions: list[Callable[..., Any]], inputs: list[Any]) -> list[Any]:
    """``parallel_apply``, which wants an accelerator."""
    return [function(each) for function, each in zip(functions, inputs, strict=True)]


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """What ista-daslab's file wants of a GPU, by other means."""
    with (
        torch_function(torch, "lu", unpivoted_lu),
        torch_function(nn.parallel, "parallel_apply", one_by_one),
    ):
        yield


@contextmanager
def torch_function(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Another function in the place of one of torch's."""
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


# -- What a step costs -----------------------------------------------------------------------------


def sample(name: str) -> tuple[nn.Module, list[Callable[[nn.Module], Tensor]]]:
    """A sample's untrained network, and losses of its batches."""
    spec = importlib.util.spec_from_file_location("net", ROOT / "samples" / name / "net.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    if name == "fashion":
        model, size, file = module.FashionNet(16), 125, "fashion"
        inputs, targets = "images", "labels"
    else:
        model, size, file = module.CharTransformer(64, 2, 4, 64), 32, "devil"
        inputs, targets = "tokens", "next_tokens"
    data = load_file(ROOT / "samples" / name / f"{file}.safetensors")
    batches = zip(data[inputs].split(size), data[targets].long().split(size), strict=True)

    def loss(x: Tensor, y: Tensor, net: nn.Module) -> Tensor:
        return F.cross_entropy(net(x).flatten(0, -2), y.flatten())

    return model, [partial(loss, x, y) for x, y in itertools.islice(batches, 16)]


def contestants(model: nn.Module) -> Iterator[tuple[str, int, float | None, Any]]:
    """Titles, steps in a turn, limits in SGD steps, and functions of a model that make a step."""
    slow, fast = 1e-3, 1e-2

    def ours(make: Callable[..., Any], **more: Any) -> Callable[[nn.Module], Step]:
        return lambda net: make(net.parameters(), **more).step

    def theirs(
        make: Callable[..., Any], create_graph: bool, **more: Any
    ) -> Callable[[nn.Module], Step]:
        def on(net: nn.Module) -> Step:
            optimizer = make(net.parameters(), **more)

            def step(loss: Tensor) -> None:
                optimizer.zero_grad()
                loss.backward(create_graph=create_graph)
                optimizer.step()

            return step

        return on

    limits = {"FashionNet": 1.35, "CharTransformer": 1.15}
    yield "SGD with momentum", 2, None, theirs(torch.optim.SGD, False, lr=fast, momentum=0.9)
    yield "AdamW", 2, None, theirs(torch.optim.AdamW, False, lr=slow)
    limit = 3 * limits[type(model).__name__]
    yield "**AdaHessian**", 1, limit, ours(AdaHessian, lr=fast)
    yield "**AdaHessian**, every 10 steps", 10, 1.35, ours(AdaHessian, lr=fast, hessian_every=10)
    yield "**M-FAC**, m = 128", 2, 1.6, ours(MFAC, lr=slow, window=128)
    if (peer := peer_adahessian()) is None:
        print("pytorch_optimizer is not installed")
    else:
        yield "AdaHessian of pytorch_optimizer", 1, None, theirs(peer, True, lr=fast, eps=1e-4)

        def now_and_then(net: nn.Module) -> Step:
            optimizer, count = (
                peer(net.parameters(), lr=fast, eps=1e-4, update_period=10),
                itertools.count(),
            )

            def step(loss: Tensor) -> None:
                optimizer.zero_grad()
                loss.backward(create_graph=next(count) % 10 == 0)
                optimizer.step()

            return step

        yield "the same, every 10 steps", 10, None, now_and_then
    if peer_mfac() is None:
        print("ista-daslab-optimizers is not installed")
    else:
        yield (
            "M-FAC of ista-daslab",
            2,
            None,
            theirs(PeerMFAC, False, lr=slow, window=128, damping=1e-5),
        )


def cost() -> None:
    """Turn by turn, each beside the SGD steps of its turn."""
    for name in ("fashion", "text"):
        model, losses = sample(name)
        state = model.state_dict()
        found: dict[str, list[float]] = {}
        steps, limits = {}, {}
        turns = itertools.count()
        with sdpa_kernel(SDPBackend.MATH), on_the_cpu():
            for title, count, limit, make in contestants(model):
                net, _ = sample(name)
                net.load_state_dict(state)
                steps[title], limits[title] = (net, count, make(net.train())), limit
                for _ in range(140 if "M-FAC" in title else 10):  # windows are full then
                    steps[title][2](losses[next(turns) % len(losses)](net))
            for _ in range(TURNS):
                spent = {}
                for title, (net, count, step) in steps.items():
                    start = time.process_time()
                    for _ in range(count):
                        step(losses[next(turns) % len(losses)](net))
                    spent[title] = (time.process_time() - start) / count
                unit = spent["SGD with momentum"]
                for title, seconds in spent.items():
                    found.setdefault(title, []).append(seconds / unit)
                found.setdefault("unit", []).append(unit)
        size = sum(p.numel() for p in model.parameters())
        print(f"\n{name}: {size:,} parameters; an SGD step takes "
              f"{1e3 * statistics.median(found.pop('unit')):.0f} ms\n")  # fmt: skip
        print("| a step of | SGD steps | quartiles | limit |\n|---|---|---|---|")
        for title, ratios in found.items():
            low, middle, high = statistics.quantiles(ratios, n=4)
            told = "" if limits[title] is None else f"{limits[title]:.2f}"
            print(f"| {title} | {middle:.2f} | {low:.2f}–{high:.2f} | {told} |")


# -- Whether peers take the same step --------------------------------------------------------------


def small_net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(75, 4))
    return nn.Sequential(*layers).double()


def small_loss(net: nn.Module, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 1, 7, 7, generator=generator, dtype=torch.float64)
    return F.cross_entropy(net(x), torch.randint(4, (16,), generator=generator))


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


def agreement() -> None:
    """100 steps in float64 beside pytorch_optimizer's; M-FAC's products beside dense ones."""
    if (peer := peer_adahessian()) is None:
        print("pytorch_optimizer is not installed")
    else:
        print(
            "\n| AdaHessian in float64, 100 steps | largest difference of a weight "
            "| and change |\n|---|---|---|"
        )
        rest = {"hessian_power": 0.7, "weight_decay": 0.01}
        now_and_then = {"hessian_every": 10, "eps": 0.0}, {"update_period": 10, "eps": 0.0}
        told = "every 10 steps, ours with learning rates times √((1 − β₂ᵗ) / (1 − β₂ᵘ))"
        for title, ours, theirs, by_steps in (
            ("every step, power 0.7, decay 0.01, entry by entry", rest, rest, False),
            ("every step, blocks in ours", {"blocks": "auto"}, {}, False),
            ("every 10 steps, entry by entry", *now_and_then, False),
            (told, *now_and_then, True),
        ):
            worst, change = beside(peer, {"blocks": "1"} | ours, theirs, by_steps)
            print(f"| {title} | {worst:.1e} | {change:.1e} |")
    module = peer_mfac()
    if module is None:
        print("ista-daslab-optimizers is not installed")
        return
    with on_the_cpu():
        mfac_products(module)


def beside(
    peer: Any, ours: dict[str, Any], theirs: dict[str, Any], by_steps: bool
) -> tuple[float, float]:
    """Both with the same signs, which pytorch_optimizer draws by ``randint_like``."""
    lr, one, other = 0.001, small_net(), small_net()
    first = AdaHessian(one.parameters(), lr, **{"eps": 1e-4} | ours)
    second = peer(other.parameters(), lr=lr, **{"eps": 1e-4} | theirs)
    sizes = [p.numel() for p in one.parameters()]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    offsets = dict(zip(map(id, other.parameters()), starts, strict=True))
    step = 0

    def drawn(p: Tensor, low: int, high: int) -> Tensor:
        kind = {"dtype": torch.float64, "device": p.device}
        signs = rademacher(key(0, step, 0), offsets[id(p)], p.numel(), **kind)
        return (signs.view(p.shape) + 1) / 2

    worst = 0.0
    with torch_function(torch, "randint_like", drawn):
        for step in range(100):  # which drawn() reads
            if by_steps:
                every = first.hessian_every
                updates = step + 1 if step < every else every + step // every
                ratio = (1 - 0.999 ** (step + 1)) / (1 - 0.999**updates)
                first.param_groups[0]["lr"] = lr * math.sqrt(ratio)
            first.step(small_loss(one, step))
            second.zero_grad()
            period = theirs.get("update_period", 1)
            second.update_period = 1 if step < period else period  # as ours begins
            fresh = step % second.update_period == 0
            small_loss(other, step).backward(create_graph=fresh)
            second.step()
            worst = max(worst, float((flat(one) - flat(other)).abs().max()))
    return worst, float((flat(one) - flat(small_net())).abs().max())


def mfac_products(module: ModuleType) -> None:
    """Relative errors of (F̂ + λI)⁻¹ g over three turns of the window, against dense ones."""
    size, window = 300, 32
    print(
        f"\n| M-FAC, d = {size}, m = {window}, worst of a turn | type "
        "| filling: ours | ista-daslab | full: ours | ista-daslab |\n|---|---|---|---|---|---|"
    )
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(torch.randn(size, generator=generator, dtype=torch.float64))
    common = torch.randn(size, generator=generator, dtype=torch.float64)
    rows = scales * (0.3 * common + torch.randn(96, size, generator=generator, dtype=torch.float64))
    rows = rows.float().double() / 30
    for relative, dtype in itertools.product((1e-1, 1e-3, 1e-5), (torch.float64, torch.float32)):
        damping = relative * float(rows.square().mean())
        x = nn.Parameter(torch.zeros(size, dtype=dtype))
        ours = MFAC([x], 1.0, window=window, damping=damping)
        theirs = module.DenseCoreMFAC(
            torch.zeros(window, size, dtype=dtype), x.device, [x.device], damping
        )
        errors: list[tuple[float, float]] = []
        for number, row in enumerate(rows, 1):
            g = row.to(dtype)
            x.grad, x.data = g.clone(), torch.zeros_like(x.data)
            ours.step()
            update = theirs.integrate_gradient_and_precondition(g, g)
            kept = rows[max(0, number - window) : number]
            dense = kept.T @ kept / len(kept) + damping * torch.eye(size, dtype=torch.float64)
            true = torch.linalg.solve(dense, row)
            pair = (-x.detach().double(), update.double())
            errors.append(tuple(float((y - true).norm() / true.norm()) for y in pair))
        parts = errors[: window - 1], errors[window:]
        told = [f"{max(e[i] for e in part):.1e}" for part in parts for i in (0, 1)]
        print(f"| damping {relative:g} tr F̂/d | {str(dtype)[6:]} | {' | '.join(told)} |")


# -- Badly scaled problems -------------------------------------------------------------------------


Problem = Callable[[int], tuple[Tensor, Callable[[Tensor], Tensor]]]
GRID = [10.0 ** (k / 2) for k in range(-6, 5)]
BUDGET = 1200
SEEDS = 3


def quadratic(rotated: bool, seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.logspace(-4, 4, 50, dtype=torch.float64)
    start = torch.randn(50, generator=generator, dtype=torch.float64)
    if not rotated:
        return start, lambda x: values @ x.square() / 2
    Q = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64))[0]
    H = Q @ (values[:, None] * Q.T)
    return start, lambda x: x @ (H @ x) / 2


def logistic(seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 2, 20, dtype=torch.float64)
    X = torch.randn(200, 20, generator=generator, dtype=torch.float64)
    truth = torch.randn(20, generator=generator, dtype=torch.float64)
    labels = torch.rand(200, generator=generator, dtype=torch.float64) < (X @ truth).sigmoid()
    X, labels = X * scales, labels.double()
    return (
        torch.zeros(20, dtype=torch.float64),
        lambda w: (
            F.binary_cross_entropy_with_logits(X @ w, labels) + 1e-4 * (scales * w).square().mean()
        ),
    )


def rosenbrock(size: int, seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(size // 2)
    start += 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(seed)).double() * seed

    def loss(x: Tensor) -> Tensor:
        return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()

    return start, loss


def least(problem: Problem, seed: int) -> float:
    """The minimum, by Newton's method with halved steps."""
    x, loss = problem(seed)
    for _ in range(200):
        x = x.detach().requires_grad_()
        value = loss(x)
        (g,) = torch.autograd.grad(value, x)
        H = torch.autograd.functional.hessian(loss, x.detach())
        size = max(0.0, -float(torch.linalg.eigvalsh(H)[0])) * 1.1 + 1e-14
        step = torch.linalg.solve(H + size * torch.eye(len(x), dtype=x.dtype), g)
        rate = 1.0
        while rate > 1e-10 and float(loss(x.detach() - rate * step)) > float(value.detach()):
            rate /= 2
        x = x.detach() - rate * step
    return float(loss(x))


def gap(problem: Problem, make: Callable[..., Any], lr: float, seed: int, price: float) -> float:
    """What is left of the loss above its minimum, after a budget of gradients."""
    start, loss = problem(seed)
    x = nn.Parameter(start.clone())
    optimizer = make([x], lr)
    steps = int(BUDGET / price)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / steps)
    for _ in range(steps):
        if isinstance(optimizer, AdaHessian):
            try:
                optimizer.step(loss(x))
            except UnsoundError:  # a rate that leads away, as others' NaN says in the end
                return math.inf
        else:
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
        schedule.step()
    after, before = float(loss(x.detach())), float(loss(start))
    bottom = MINIMA[problem, seed]
    return (after - bottom) / (before - bottom) if math.isfinite(after) else math.inf


MINIMA: dict[tuple[Problem, int], float] = {}


def scaled() -> None:
    """Each at the best of the same grid of learning rates, which fall to 0."""
    problems: dict[str, Problem] = {
        "quadratic, condition 1e8, along the axes": partial(quadratic, False),
        "quadratic, condition 1e8, rotated": partial(quadratic, True),
        "logistic regression, features over 1e4": logistic,
        "Rosenbrock, 2": partial(rosenbrock, 2),
        "Rosenbrock, 10": partial(rosenbrock, 10),
    }
    # What a step takes, in gradients.
    optimizers: dict[str, tuple[Callable[..., Any], float]] = {
        "Adam": (partial(torch.optim.Adam, eps=1e-12), 1),
        "AdaHessian": (partial(AdaHessian, eps=1e-12), 3),
        # The first ten have products too, which are 18 gradients more.
        "every 10 steps": (
            partial(AdaHessian, eps=1e-12, hessian_every=10),
            1.2 * BUDGET / (BUDGET - 18),
        ),
        "with as many steps as Adam": (partial(AdaHessian, eps=1e-12), 1),
    }
    print(f"\n| loss left, of what there was, after {BUDGET} gradients |", end="")
    print(" |".join(f" {name}" for name in optimizers), "|")
    print("|---" * (1 + len(optimizers)) + "|")
    for title, problem in problems.items():
        for seed in range(SEEDS):  # all others have 0
            MINIMA[problem, seed] = least(problem, seed) if problem is logistic else 0.0
        cells = []
        for make, price in optimizers.values():
            found = {
                lr: statistics.median(gap(problem, make, lr, seed, price) for seed in range(SEEDS))
                for lr in GRID
            }
            best = min(found, key=found.__getitem__)
            cells.append(f" {found[best]:.1e} ({best:.2g})")
        print(f"| {title} |{' |'.join(cells)} |", flush=True)


PARTS = {"cost": cost, "agreement": agreement, "scaled": scaled}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--give-back", action="store_true", help="freed memory to the system")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    if not arguments.give_back:
        keep_freed_memory()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {sys.platform}")
    for part in arguments.parts or list(PARTS):
        PARTS[part]()


if __name__ == "__main__":
    main()
