"""Top eigenvalues and densities: ours and other libraries', time to 1% and error at equal work.

    pip install -e '.[bench]'
    python tests/benchmarks/spectrum.py [fashion text] [--batches 4] [--density]

Everyone looks for the five largest eigenvalues of the same Hessian, over the same frozen batches,
in float32 on one thread, each at the tolerance at which its own stopping rule claims 1%: hesscli
until each error bar is below 1%, PyHessian's power iteration until two iterates differ by less
than 1%, hessian-eigenthings' Lanczos with as many steps as its own flags take at 1%, scipy's eigsh
on curvlinops' operator at 1%. Times are CPU times. The truth is a run of our own whose bars are
below 1e-4, and each answer's largest relative error stands beside its time.

``--density`` compares densities instead: the Wasserstein-1 distance to the dense spectrum of small
trained networks, over the mean |λ|, after 128 products each.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from peers import Curvlinops, HessianEigenthings, PyHessianLoader, Task
from rich.console import Console
from rich.table import Table
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscli
from hesscli.heap import keep_freed_memory
from hesscli.problem.freezing import FrozenData

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
CHECKPOINTS = {"fashion": "model.pt", "text": "model.safetensors"}
COUNT, TOLERANCE, PRODUCTS = 5, 0.01, 128
SEEDS = 3

Solver = Callable[[], tuple[np.ndarray, int]]
"""The largest eigenvalues in descending order, and the products that they took."""


@dataclass
class Row:
    """A contestant, its CPU time, products over all the data, and largest relative error."""

    title: str
    seconds: float = float("nan")
    products: int = 0
    error: float = float("nan")
    failure: str = ""


def main() -> None:
    """Compare the chosen samples, or the densities of small networks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("samples", nargs="*", default=list(CHECKPOINTS), help="fashion, text")
    parser.add_argument("--batches", type=int, default=None, help="only the first so many")
    parser.add_argument("--density", action="store_true", help="compare densities instead")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_freed_memory()  # as the command does
    torch.set_num_threads(1)
    console = Console(width=110)
    if arguments.density:
        console.print(densities())
        return
    for sample in arguments.samples:
        problem = first_batches(
            hesscli.load(SAMPLES / sample / CHECKPOINTS[sample]), arguments.batches
        )
        with sdpa_kernel(SDPBackend.MATH):
            console.print(table(sample, problem, list(eigenvalues(problem, Task.of(problem)))))


def first_batches(problem: hesscli.Problem, count: int | None) -> hesscli.Problem:
    """The problem whose examples are those of a few batches."""
    if count is None:
        return problem
    batches = tuple(islice(problem.data.batches, count))
    counts = problem.data.counts[:count]
    data = FrozenData(batches, counts, sum(counts), True, "the first batches")
    return hesscli.Problem(problem.model, problem.loss, data)


# The five largest eigenvalues.


def eigenvalues(problem: hesscli.Problem, task: Task) -> Iterator[Row]:
    """Everyone on one problem, and the others on the same as a task; ours is the first."""
    precise = hesscli.spectrum(problem, rtol=1e-4, k=COUNT, probes=1, seed=99, budget=None)
    truth = np.array([one.value for one in precise.eigenvalues[:COUNT]])
    problem.prove()
    yield timed(f"hesscli {hesscli.__version__}", ours(problem), truth)
    for title, make in PEERS.items():
        try:
            yield timed(title, make(task), truth)
        except Exception as error:  # a peer may fail in any way; its row says which
            yield Row(title, failure=f"{type(error).__name__}: {error}".splitlines()[0][:60])


def timed(title: str, solver: Solver, truth: np.ndarray) -> Row:
    """One run, and how far off its answer is."""
    start = time.process_time()
    found, products = solver()
    seconds = time.process_time() - start
    return Row(title, seconds, products, float(np.abs(found[: len(truth)] / truth - 1).max()))


def ours(problem: hesscli.Problem) -> Solver:
    """Until our own bars say so, preflight included."""

    def solve() -> tuple[np.ndarray, int]:
        result = hesscli.spectrum(problem, rtol=TOLERANCE, k=COUNT, probes=1, budget=None)
        return np.array([e.value for e in result.eigenvalues[:COUNT]]), round(result.cost.products)

    return solve


def pyhessian(task: Task) -> Solver:
    """Power iteration with deflation, the library's own stopping rule."""
    peer = PyHessianLoader(task)

    def solve() -> tuple[np.ndarray, int]:
        library, calls = peer.library, 0
        multiply = type(library).dataloader_hv_product

        def counting(v: list[torch.Tensor]) -> object:
            nonlocal calls
            calls += 1
            return multiply(library, v)

        library.dataloader_hv_product = counting
        torch.manual_seed(0)
        values, _ = library.eigenvalues(maxIter=200, tol=TOLERANCE, top_n=COUNT)
        return np.sort(np.array(values))[::-1], calls

    return solve


def eigenthings(task: Task, steps: list[int] | None = None) -> Solver:
    """The library's Lanczos, which makes a given number of steps and then says what converged.

    ``steps`` are tried in turn until all have; by default they double.
    """
    from hessian_eigenthings import lanczos

    peer = HessianEigenthings(task)

    def solve() -> tuple[np.ndarray, int]:
        made = 0
        for count in steps or [2 * COUNT * 2**i for i in range(8)]:
            found = lanczos(
                peer.operator, k=COUNT, max_iter=count, tol=TOLERANCE, which="LA", seed=0
            )
            made += count
            if all(found.converged):
                break
        return np.sort(found.eigenvalues.cpu().numpy())[::-1], made

    return solve


def eigenthings_told(task: Task) -> Solver:
    """The same, told for nothing how many steps will do, to the nearest five."""
    from hessian_eigenthings import lanczos

    peer = HessianEigenthings(task)
    for steps in range(2 * COUNT, 200, 5):
        found = lanczos(peer.operator, k=COUNT, max_iter=steps, tol=TOLERANCE, which="LA", seed=0)
        if all(found.converged):
            break
    return eigenthings(task, [steps])


def eigsh_on_curvlinops(task: Task) -> Solver:
    """ARPACK's restarted Lanczos, as curvlinops' documentation does it."""
    peer = Curvlinops(task)
    size = sum(p.numel() for p in task.parameters)

    def solve() -> tuple[np.ndarray, int]:
        calls = 0

        def multiply(vector: np.ndarray) -> np.ndarray:
            nonlocal calls
            calls += 1
            row = torch.from_numpy(vector.astype(np.float32)).reshape(1, -1)
            return peer.block(row)[0].numpy()

        operator = LinearOperator((size, size), matvec=multiply, dtype=np.float32)
        start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        found = eigsh(
            operator, COUNT, which="LA", tol=TOLERANCE, v0=start, return_eigenvectors=False
        )
        return np.sort(found)[::-1], calls

    return solve


PEERS: dict[str, Callable[[Task], Solver]] = {
    "PyHessian, power iteration": pyhessian,
    "hessian-eigenthings, steps doubled": eigenthings,
    "hessian-eigenthings, told its steps": eigenthings_told,
    "scipy eigsh on curvlinops": eigsh_on_curvlinops,
}


def table(sample: str, problem: hesscli.Problem, rows: list[Row]) -> Table:
    """Times beside ours."""
    grid = Table(
        title=f"{COUNT} eigenvalues to 1%, samples/{sample}: d = {problem.parameters.size}, "
        f"{problem.num_batches} batches of {problem.data.counts[0]}, float32, 1 thread, "
        f"torch {torch.__version__}",
    )
    for heading in ("", "CPU s", "times ours", "products", "largest error", ""):
        grid.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        grid.add_row(
            row.title,
            f"{row.seconds:.1f}",
            f"{row.seconds / rows[0].seconds:.1f}",
            str(row.products),
            f"{row.error:.2%}",
            row.failure,
        )
    return grid


# Densities.


def densities() -> Table:
    """Distances of all seeds, and how many times as far PyHessian's is at the median."""
    grid = Table(
        title=f"Wasserstein-1 / mean |λ| after {PRODUCTS} products, medians and worst of {SEEDS}"
    )
    for heading in (
        "network",
        "d",
        "hesscli",
        "one start",
        f"PyHessian {version('pyhessian')}",
        "×",
    ):
        grid.add_column(heading, justify="right")
    supply_eig()
    for name, problem in networks().items():
        matrix = hesscli.Hessian(problem).to_dense().numpy()
        truth = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        columns = [
            [distance(truth, *found(problem, seed)) for seed in range(SEEDS)]
            for found in (our_density, our_single_start, pyhessians_density)
        ]
        medians = [float(np.median(column)) for column in columns]
        grid.add_row(
            name,
            str(len(truth)),
            *(f"{m:.4f} ({max(column):.4f})" for m, column in zip(medians, columns, strict=True)),
            f"{medians[2] / medians[0]:.0f}",
        )
    return grid


def networks() -> dict[str, hesscli.Problem]:
    """Small trained networks in float64, and the sunspot sample without its weight decay."""
    sunspots = hesscli.load(SAMPLES / "sunspots" / "model.pt")
    return {
        "sunspots": hesscli.Problem(sunspots.model, "mse", merged(sunspots)),
        "ReLU": small(nn.ReLU),
        "GELU": small(nn.GELU),
    }


def merged(problem: hesscli.Problem) -> FrozenData:
    """All examples in one batch."""
    columns = zip(*problem.data.batches, strict=True)
    count = problem.data.count
    return FrozenData((tuple(map(torch.cat, columns)),), (count,), count, True, "merged")


def small(activation: type[nn.Module]) -> hesscli.Problem:
    """A perceptron on shrunken Fashion-MNIST images, trained in a few seconds."""
    fashion = hesscli.load(SAMPLES / "fashion" / "model.pt", examples="first:1000")
    images, labels = (torch.cat(column) for column in zip(*fashion.data.batches, strict=True))
    x = nn.functional.avg_pool2d(images.float().reshape(-1, 1, 28, 28), 4).flatten(1).double()
    x, y = (x - x.mean()) / x.std(), labels.long()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(49, 14), activation(), nn.Linear(14, 14), activation(), nn.Linear(14, 10)
    ).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    count = len(y)
    return hesscli.Problem(
        model, "cross_entropy", FrozenData(((x, y),), (count,), count, True, "small")
    )


def our_density(problem: hesscli.Problem, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As the command has it by default."""
    return _density(hesscli.spectrum(problem, seed=seed))


def our_single_start(problem: hesscli.Problem, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All products from one start vector."""
    return _density(hesscli.spectrum(problem, seed=seed, steps=PRODUCTS, probes=1))


def _density(result: hesscli.results.SpectrumResult) -> tuple[np.ndarray, np.ndarray]:
    assert result.cost.products == PRODUCTS
    return np.array(result.density.nodes), np.array(result.density.weights)


def pyhessians_density(problem: hesscli.Problem, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One run of so many iterations, as its documentation has it."""
    library = PyHessianLoader(Task.of(problem)).library
    torch.manual_seed(seed)
    (values,), (weights,) = library.density(iter=PRODUCTS, n_v=1)
    return np.array(values), np.array(weights)


def supply_eig() -> None:
    """``torch.eig``, which PyHessian 0.1 calls and torch has no more."""

    def eig(matrix: torch.Tensor, eigenvectors: bool) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    torch.eig = eig


def distance(truth: np.ndarray, values: np.ndarray, weights: np.ndarray) -> float:
    """Wasserstein-1 over the mean size of an eigenvalue."""
    return wasserstein_distance(truth, values, None, weights) / float(np.abs(truth).mean())


if __name__ == "__main__":
    main()
