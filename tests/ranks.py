"""What tests let each rank of a world do: `torchrun --nproc-per-node=2 tests/ranks.py FOLDER`."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from optimizing import Make, chunks, net, weights
from program import SPEC, SUNSPOTS
from test_resume import RUNS, problem, said
from torch import Tensor
from torch.nn import functional as F

import hesscli
from hesscli import ledger as ledgers
from hesscli import tensor_files, world
from hesscli.cli.app import main
from hesscli.cli.console import interrupts
from hesscli.diagnostics.check import check
from hesscli.diagnostics.keeping import SharedLedger
from hesscli.diagnostics.window import WindowOptions
from hesscli.engines.lanczos import Lanczos
from hesscli.engines.mfac import ShardedWindow, StaticFisher, WindowedFisher
from hesscli.errors import HesscliError, UnsoundError, UsageError
from hesscli.ledger import FileLedger
from hesscli.memory import available_bytes
from hesscli.operators.retained import Retained
from hesscli.optim import MFAC, AdaHessian
from hesscli.results import Snapshot
from hesscli.shards import Columns
from hesscli.world import LostError

OPTIMIZERS: dict[str, Make] = {
    "adahessian": lambda model, **more: AdaHessian(model.parameters(), 0.02, **more),
    "now and then": lambda model, **more: AdaHessian(
        model.parameters(), 0.02, hessian_every=3, **more
    ),
    "mfac": lambda model, **more: MFAC(
        model.parameters(), 0.02, window=4, damping=0.1, momentum=0.5, **more
    ),
}
CUT = {
    "a trace in haste": ("probing", 3),
    "a trace in rounds": ("probing", 3),
    "columns and probes": ("probing", 3),
    "a deflated diagonal": ("probing", 3),
    "a spectrum": ("iterating", 3),
    "a spectrum with copies": ("iterating", 40),
    "sensitivities": ("perturbing", 3),
}
"""Runs that are cut off in the middle of their work: in which phase, and at which of its steps."""
FULL = 5, 60
"""Blocks of a ledger that the disk has no room for."""
BASIS = 24, 9001
"""Rows of a Lanczos basis, and its columns."""
BLOCKS = [*[7] * 500, 3000, *[7] * 357, 2]
"""Of a window: small ones and a large one, of which some reach over shards."""
WHOLE = (
    "a trace",
    "shared probes",
    "probes by layer",
    "an exact diagonal and its noise",
    "a spectrum of differences",
    "a solve",
    *(name for name in CUT if name != "a spectrum with copies"),
)


def whole(name: str) -> Any:
    make, measure = RUNS[name]
    return said(measure(make(), budget=None, ledger=SharedLedger(None)))


def cut(name: str, path: Path) -> list[str]:
    """The last rank has had enough between two steps of a phase; what the first is told."""
    make, measure = RUNS[name]
    (phase, at), seen, told = CUT[name], 0, list[str]()

    def observe(snapshot: Snapshot) -> bool:
        nonlocal seen
        seen += snapshot.phase == phase
        return seen == at and not world.is_first()

    file = FileLedger(path, {}, resume=False, say=told.append) if world.is_first() else None
    with written_at_each_step(), suppress(KeyboardInterrupt):
        measure(make(), budget=None, observe=observe, ledger=SharedLedger(file))
    return told


def gone_on_with(name: str, path: Path) -> Any:
    make, measure = RUNS[name]
    file = FileLedger(path, {}, resume=True, say=print) if world.is_first() else None
    return said(measure(make(), budget=None, ledger=SharedLedger(file)))


@contextmanager
def written_at_each_step() -> Iterator[None]:
    """To a disk that takes two blocks less than there are."""
    written, chunks_of = 0, tensor_files.chunks

    def full(tensor: Tensor) -> Iterator[memoryview]:
        nonlocal written
        written += 1
        if written in FULL:
            raise OSError(errno.ENOSPC, "")
        return chunks_of(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "chunks", full)
        patch.setattr(ledgers, "_OFTEN", 0.0)
        patch.setattr(FileLedger, "_wait", lambda *_: 0.0)
        yield


def basis() -> dict[str, Any]:
    """A Lanczos basis that ranks share by its columns, and what was sent for it."""
    values = torch.linspace(-1, 1, BASIS[1], dtype=torch.float64)
    values[[5, 2000, 9000]] = torch.tensor([30.0, -40.0, 50.0], dtype=torch.float64)
    apart = torch.eye(3, BASIS[1], dtype=torch.float64).split([1, 2])
    columns = Columns(BASIS[1], shared=True)
    lanczos = Lanczos(
        lambda v: v * values,
        BASIS[1],
        seed=0,
        reserve=BASIS[0],
        apart=[block[:, columns.own] for block in apart],
        shared=True,
    )
    before = world.sums()[1]
    for _ in range(BASIS[0]):
        lanczos.step()
    sent, ritz = world.sums()[1] - before, lanczos.ritz()
    whole = columns.whole(lanczos.basis)
    again = torch.cat(list(lanczos.state_dict()["rows"].since(0)))
    halves = slice(0, BASIS[1] // 2), slice(BASIS[1] // 2, BASIS[1])
    parts = [lanczos.vectors(ritz, [-1], half).square().sum() for half in halves]
    return {
        "held": lanczos.nbytes,
        "sent": sent,
        "basis": whole,
        "kept": torch.equal(again[: BASIS[0]], whole),
        "ritz": (ritz.values, ritz.residuals),
        "largest": columns.whole(lanczos.vectors(ritz, [-1]))[0],
        "halves": [columns.summed(part) for part in parts],
        "true": values[3:],
    }


def product() -> dict[str, Any]:
    """One vector's product, and what was sent for it."""
    operator = hesscli.Hessian(problem())
    operator.check()
    apply, vector = Retained(operator, 1 << 30), torch.ones(operator.parameters.size).double()
    operator.problem.prove()
    before = world.sums()
    found = [apply(vector).clone(), apply(vector), operator @ vector]
    after = world.sums()
    return {
        "product": found[0],
        "alike": all(torch.equal(found[0], each) for each in found),
        "sums": after[0] - before[0],
        "numbers": after[1] - before[1],
        "parts": apply.state_dict()["parts"],
        "products": operator.meter.products,
    }


def joined() -> dict[str, Any]:
    """Of examples that were one batch: into how many the ranks share them, and a trace."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 6), torch.nn.ReLU(),
        torch.nn.Linear(6, 3),
    )  # fmt: skip
    data = torch.randn(64, 5), torch.randint(3, (64,))
    found = hesscli.Problem(model, "cross_entropy", data, batch_size=64)
    traced = hesscli.trace(found, matrix="ggn", **whose())
    top = hesscli.spectrum(found, steps=6, probes=1, **whose())
    proof = found.prove()
    return {
        "groups": len(found.joint()),
        "proof": (proof.loss, proof.lengths),
        "ggn": (traced.trace.estimate, traced.trace.rounding_error),
        "top": (top.eigenvalues[0].value, top.eigenvalues[0].residual),
    }


def whose() -> dict[str, Any]:
    """What a run is given for its ledger: alone, nothing."""
    return {"ledger": SharedLedger(None)} if world.size() > 1 else {}


def ended_by(what: Callable[[], object]) -> dict[str, Any]:
    """What the ranks have of a trace in the midst of which something happens to the last."""
    seen = 0

    def observe(snapshot: Snapshot) -> bool:
        nonlocal seen
        seen += snapshot.phase == "probing"
        if seen == 8 and world.place() == world.size() - 1:
            what()
        return False

    with interrupts() as came:
        result = hesscli.trace(problem(), method="hutchinson", probes=512, observe=observe)
    return {"came": came, "status": result.status, "probes": result.method.num_probes}


def agreements() -> dict[str, Any]:
    """What each rank ends up with where they see different things."""
    told = []
    try:
        with world.apart():
            if not world.is_first():
                raise UnsoundError("the loss is not finite", "nan on batch 1", "clean inputs")
    except UnsoundError as error:
        told.append(str(error))
    try:
        SharedLedger(None).recognise({"threads": 1 if world.is_first() else 2, "device": "cpu"})
    except UsageError as error:
        told.append(str(error))
    return {"told": told, "bytes": available_bytes()}


def trained() -> dict[str, Tensor]:
    """Weights after some steps, each on a batch in unequal parts, one for each rank.

    What one part alone reaches moves everywhere.
    """
    found = {}
    for name, make in OPTIMIZERS.items():
        model = net()
        optimizer = make(model, replicas=dist.group.WORLD if world.size() > 1 else None)
        for number in range(6):
            parts = list(chunks(number, world.size()))
            share, images, labels = parts[world.place()]
            loss = share * world.size() * F.cross_entropy(model(images), labels)
            if world.is_first():
                loss = loss + world.size() * model.unused.square().sum()
            optimizer.accumulate(loss)
            optimizer.clip(0.5)
            optimizer.step()
        found[name] = weights(model)
    return found


def warned() -> list[str]:
    """What is said of steps by a rank alone, and by replicas, twice each."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for replicas in (None, dist.group.WORLD):
            model = net()
            optimizer = MFAC(model.parameters(), window=2, replicas=replicas)
            for _ in range(2):
                optimizer.accumulate(model.scale.square())
                optimizer.step()
    return [str(each.message) for each in told]


def sharded() -> dict[str, Any]:
    """Solves with a window that ranks share by its columns, and what was sent for them.

    A rank has gradients of its own, the last ones fewer; then all have two more, in place of the
    oldest.
    """
    torch.manual_seed(0)
    common = torch.randn(9001)
    rows, vector = torch.randn(27, 9001) + common, torch.randn(9001).double()
    window = ShardedWindow(25, 9001)
    for part in (rows[:20], rows[20:25]):
        window.exchange(part[world.place() :: world.size()])
    found: dict[str, Any] = {"rows": rows, "vector": vector, "messages": []}
    messages = [world.sums()]
    fisher = StaticFisher(window, 1e-4 * window.mean_square())
    messages.append(world.sums())
    solutions = [fisher.ihvp(vector[window.place])]
    messages.append(world.sums())
    solutions.append(fisher.member(3))
    follower = WindowedFisher(window, fisher.damping)
    found["diagonal"] = window.whole(fisher.diagonal())
    found["diagonal error"] = window.whole(fisher.diagonal_error())
    found["multiplied"] = window.whole(fisher.multiply(vector[window.place]))
    blocks = StaticFisher(window, fisher.damping, blocks=BLOCKS)
    solutions += [blocks.ihvp(vector[window.place]), blocks.member(3)]
    found["blocks' diagonal"] = window.whole(blocks.diagonal())
    found["blocks' diagonal error"] = window.whole(blocks.diagonal_error())
    found["blocks multiplied"] = window.whole(blocks.multiply(vector[window.place]))
    for row in rows[25:]:
        follower.push(row)
    solutions.append(follower.ihvp(vector[window.place]))
    numbers = [after - before for (_, before), (_, after) in pairwise(messages)]
    return found | {
        "damping": fisher.damping,
        "held": window.nbytes,
        "numbers": numbers,
        "solutions": [(window.whole(each.vector), each.error) for each in solutions],
    }


def plans() -> list[str]:
    """What a check says of windows that fit and do not, and of Lanczos vectors."""
    told = []
    for rows in (34, 10**15):
        planned = check(problem(), window=WindowOptions(size=rows)).plan
        told += [each.note for each in planned.commands if each.command in ("ihvp", "spectrum")]
    return told


def refused() -> list[str]:
    """What each rank is told of a row that is bad on the last."""
    window, told = ShardedWindow(4, 50), list[str]()
    bad = torch.full((1, 50), float("nan"))
    for rows in (torch.ones(1, 49), bad):
        try:
            window.exchange(rows if world.place() == world.size() - 1 else torch.ones(1, 50))
        except HesscliError as error:
            told.append(error.what)
    return [*told, str(window.count)]


def run(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"whole": {}, "resumed": {}}
    with world.joined():
        found["size"] = world.size()
        found |= product() | agreements() | joined() | {"trained": trained(), "warned": warned()}
        found |= {"basis": basis(), "sharded": sharded(), "refused": refused(), "plans": plans()}
        found |= ended_by(partial(signal.raise_signal, signal.SIGTERM))
        for name in WHOLE:
            found["whole"][name] = whole(name)
        found["kept"] = {name: cut(name, folder / f"{name}.ledger") for name in CUT}
        for path in sorted((folder / "alone").glob("*.ledger")):
            found["resumed"][path.stem] = gone_on_with(path.stem, path)
    options = ("--method", "hutchinson", "--probes", "4", "--out", "json")
    found["codes"] = [
        main(["trace", str(SUNSPOTS), *SPEC, *options, "--dir", str(folder / "cli")]),
        main(["trace", str(folder / "missing.pt"), "--dir", "-"]),
        main(["trace", str(folder / "model.pt"), "--dir", "-", *options]),
    ]
    return found


def told_to_end(_: Path) -> dict[str, Any]:
    """As by a scheduler: the signal is torchrun's own, which passes it on."""
    with world.joined():
        return ended_by(lambda: os.kill(os.getppid(), signal.SIGTERM))


def hung(_: Path) -> dict[str, Any]:
    """The last rank stands still."""
    try:
        with world.joined(timedelta(seconds=5)):
            return ended_by(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    except LostError as error:
        return {"lost": str(error)}


DOES = {"all": run, "told to end": told_to_end, "hung": hung}

if __name__ == "__main__":
    place = Path(sys.argv[1])
    with (place / f"{os.environ['RANK']}.pickle").open("wb") as stream:
        found = DOES[sys.argv[2] if len(sys.argv) > 2 else "all"](place)
        pickle.dump(found, stream)
    sys.exit("lost" in found)
