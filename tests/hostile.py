"""Checkpoints, indexes and specs that nobody meant: thousands, each tried in a process of its own.

What cannot be meant is refused with exit 2, 3 or 4 in three lines; what still can be runs. There is
no traceback, no character that a terminal would obey, no code run, and no memory taken beyond twice
the files plus 64 MiB. ``python tests/hostile.py 5000`` tries as many; the suite tries a few.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import io
import itertools
import json
import os
import pickle
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

SPARE = 64 << 20
SECONDS = 30
BATCH = 32
"""Tried in one process, one after the other."""
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.body(x))))

def dataset():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=g), torch.randint(0, 3, (32,), generator=g)
    return torch.utils.data.TensorDataset(x, y)
"""
SPEC = """\
checkpoint = "model.pt"
[checkpoint_keys]
ignore = ["criterion.*"]
[model]
factory = "hostile_net:Net"
training = false
[data]
factory = "hostile_net:dataset"
batch_size = 16
unseen = false
[loss]
name = "cross_entropy"
weight_decay = 0.01
label_smoothing = 0.1
ignore_index = -100
class_weights = [1.0, 2.0, 1.0]
"""


@dataclass(frozen=True)
class Mutant:
    """Files that belong together.

    ``main`` is the checkpoint among them. ``verdict`` is ``free`` where either may be right,
    ``refuse`` where nothing can be meant, and ``same`` where a run must see the very weights
    that were saved.
    """

    kind: str
    files: dict[str, bytes]
    main: str = "model.pt"
    verdict: str = "free"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``grown`` is by how many bytes, ``acted`` what it did that it may not."""

    code: int | None
    out: str
    err: str
    grown: int
    acted: str


# -- what was saved ------------------------------------------------------------------------------


def weights() -> dict[str, Tensor]:
    """The state of a network whose layers are those of ``NET``."""
    g = torch.Generator().manual_seed(0)
    return {
        "body.weight": torch.randn(4, 6, generator=g),
        "body.bias": torch.randn(4, generator=g),
        "norm.weight": torch.rand(4, generator=g) + 0.5,
        "norm.bias": torch.randn(4, generator=g),
        "norm.running_mean": torch.randn(4, generator=g),
        "norm.running_var": torch.rand(4, generator=g) + 0.5,
        "norm.num_batches_tracked": torch.tensor(7),
        "head.weight": torch.randn(3, 4, generator=g),
        "head.bias": torch.randn(3, generator=g),
    }


def saved(payload: Any, *, as_zip: bool = True, checksums: bool = True) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(payload, stream, _use_new_zipfile_serialization=as_zip)
    finally:
        torch.serialization.set_crc32_options(True)
    return stream.getvalue()


def sharded(ending: str) -> dict[str, bytes]:
    """Two shards and their index."""
    state = weights()
    names = {name: f"part-{i % 2}.{ending}" for i, name in enumerate(state)}
    parts = {
        file: {name: state[name] for name in state if names[name] == file}
        for file in sorted(set(names.values()))
    }
    write = save if ending == "safetensors" else saved
    files = {file: write(part) for file, part in parts.items()}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": names}).encode()
    return files | {f"model.{ending}.index.json": index}


# -- bytes that were damaged -----------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, repeated, overwritten or mixed."""
    data, size = bytearray(content), len(content)
    place = rng.randrange(size)
    extent = min(size - place, 1 << rng.randrange(10))
    match rng.randrange(9):
        case 0 | 1 | 2:
            data[place] ^= 1 << rng.randrange(8)
        case 3:
            for _ in range(rng.randrange(1, 30)):
                data[rng.randrange(size)] = rng.randrange(256)
        case 4:
            del data[place:]
        case 5:
            del data[place : place + extent]
        case 6:
            data[place:place] = data[place : place + extent] * rng.randrange(1, 4)
        case 7:
            number = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
            word = struct.pack(rng.choice("<>") + "Q", number)[: rng.choice([2, 4, 8])]
            data[place : place + len(word)] = word
        case 8:
            data[place : place + extent] = rng.randbytes(extent)
    return bytes(data)


def torch_file(rng: random.Random) -> Mutant:
    """A damaged zip, whose checksums tell: refused, or the very weights."""
    return Mutant("zip", {"model.pt": damaged(saved(weights()), rng)}, verdict="same")


def unchecked_file(rng: random.Random) -> Mutant:
    """A damaged zip without checksums."""
    return Mutant("zip, unchecked", {"model.pt": damaged(saved(weights(), checksums=False), rng)})


def legacy_file(rng: random.Random) -> Mutant:
    """A damaged file of torch's older form."""
    return Mutant("legacy", {"model.pt": damaged(saved(weights(), as_zip=False), rng)})


def safetensors_file(rng: random.Random) -> Mutant:
    """A damaged file without checksums by design."""
    return Mutant("safetensors", {"m.st": damaged(save(weights()), rng)}, main="m.st")


def shards(rng: random.Random) -> Mutant:
    """Shards of which one, or the index, is damaged."""
    files = sharded(rng.choice(["safetensors", "bin"]))
    name = rng.choice(list(files))
    index = next(file for file in files if file.endswith(".json"))
    return Mutant("shards", files | {name: damaged(files[name], rng)}, main=index)


def repacked(rng: random.Random) -> Mutant:
    """A zip whose members were changed and then written as any tool writes them, sums and all."""
    source = zipfile.ZipFile(io.BytesIO(saved({"model": weights(), "epoch": 3})))
    victim = rng.choice([*source.namelist(), *["archive/data.pkl"] * 20])
    stream, packing = io.BytesIO(), rng.choice([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(stream, "w", packing) as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, damaged(content, rng) if name == victim and content else content)
    return Mutant("repacked zip", {"model.pt": stream.getvalue()})


# -- files that are whole, and mean harm -----------------------------------------------------------

ODD_NAMES = (
    "a\x1b]0;title\x07\x1b[2J",
    "b\r\n\x9b31m\u202e",
    "x" * 100_000,
    "",
    "..",
    "body.weight\n",
    "\x00",
    "[red]bold[/]",
    "{0}%s%n",
)


class Call:
    """Pickled, it calls a function as it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.what


def odd_tensor(rng: random.Random) -> Tensor:
    """What a file may hold in place of a weight."""
    place = torch.zeros(2, 1, dtype=torch.long)
    unchecked = torch.sparse.check_sparse_tensor_invariants(enable=False)
    with unchecked, warnings.catch_warnings(action="ignore"):
        return rng.choice(
            [
                lambda: torch.sparse_coo_tensor(place, torch.ones(1), (10**6, 10**6)),
                lambda: torch.sparse_coo_tensor(place + 10**9, torch.ones(1), (4, 6)),
                lambda: torch.zeros(1).expand(10**6, 10**6),
                lambda: torch.zeros(1).expand(4, 6),
                lambda: torch.full((4, 6), float("nan")),
                lambda: torch.full((4, 6), 1e38),
                lambda: torch.zeros(4, 6, dtype=torch.int8),
                lambda: torch.zeros(4, 6, dtype=torch.complex64),
                lambda: torch.zeros(0),
                lambda: torch.tensor(1.0),
                lambda: torch.zeros([1] * 60),
                lambda: torch.zeros(4, 6, device="meta"),
                lambda: torch.quantize_per_tensor(torch.zeros(4, 6), 0.1, 0, torch.qint8),
                lambda: torch.zeros(4, 6, dtype=torch.float8_e4m3fn),
                lambda: torch.zeros(6, 4).T,
            ]
        )()


def odd_state(rng: random.Random) -> Mutant:
    """Weights of which some are odd, by name or by kind."""
    state: dict[Any, Any] = dict(weights())
    victim = rng.choice(list(state))
    match rng.randrange(6):
        case 0:
            state[rng.choice(ODD_NAMES)] = torch.zeros(1)
        case 1:
            state[victim] = odd_tensor(rng)
        case 2:
            del state[victim]
        case 3:
            state[rng.choice(ODD_NAMES)] = state.pop(victim)
        case 4:
            state = {rng.choice(ODD_NAMES) + name: value for name, value in state.items()}
        case 5:
            state[rng.choice([3, None, (1, 2), victim])] = rng.choice([{}, [], "x", 1 << 4000])
    nest = rng.choice([lambda s: s, lambda s: {"model": s}, lambda s: {"a": s, "b": s, "ema": s}])
    try:
        content = saved(nest(state), as_zip=rng.random() < 0.7)
    except Exception:  # torch does not save everything in its older form
        content = saved(nest(state))
    return Mutant("odd state", {"model.pt": content})


def payload(rng: random.Random) -> Mutant:
    """Pickles that run a command, in every place that is read."""
    marker = "import pathlib; pathlib.Path('RAN').touch()"
    call = rng.choice(
        [
            Call(os.system, "touch RAN"),
            Call(exec, marker),
            Call(eval, "__import__('os').system('touch RAN')"),
            Call(Path.touch, Path("RAN")),
            Call(os.mkdir, "RAN"),
            Call(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
            Call(torch.load, "model.pt"),
            Call(getattr, Path, "touch"),
            Call(collections.OrderedDict, Call(os.system, "touch RAN")),
        ]
    )
    state: dict[Any, Any] = dict(weights())
    whole = rng.choice([call, {"model": state, "x": call}, state | {"body.weight": call}, [call]])
    if rng.random() < 0.2:
        return Mutant("payload", {"model.pt": pickle.dumps(whole, rng.choice([2, 4]))})
    content = saved(whole, as_zip=rng.random() < 0.7)
    return Mutant("payload", {"model.pt": content}, verdict="refuse")


def bomb(rng: random.Random) -> Mutant:
    """Small files that would take much memory or time."""

    def packed(content: bytes) -> bytes:
        source, stream = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
        return stream.getvalue()

    def shared() -> bytes:
        held: Any = weights()
        for _ in range(3):
            held = dict.fromkeys(map(str, range(300)), held)
        return saved(held)

    def itself() -> bytes:
        held: dict[str, Any] = dict(weights())
        held["self"] = held
        return saved(held)

    def deep() -> bytes:
        held: Any = weights()
        for _ in range(200):
            held = {"a": held}
        return saved(held)

    def header(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    entry = '"%s":{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}'
    index = "model.safetensors.index.json"
    contents: list[tuple[str, Callable[[], bytes]]] = [
        ("model.pt", lambda: packed(saved({"a": torch.zeros(1 << 26)}))),
        ("model.pt", shared),
        ("model.pt", itself),
        ("model.pt", deep),
        ("model.pt", lambda: saved({"a": Call(bytearray, 1 << 33)})),
        ("m.st", lambda: header("{" + ",".join(entry % (i, 0) for i in range(70_000)) + "}")),
        ("m.st", lambda: header("[" * 100_000)),
        ("m.st", lambda: header('{"a":' * 100_000)),
        ("m.st", lambda: struct.pack("<Q", 2**62) + b"{}"),
        ("m.st", lambda: header("{" + entry % ("a", f"{2**40},{2**40}") + "}")),
        ("m.st", lambda: header("{" + entry % ("a", ",".join("1" * 9999)) + "}")),
        (index, lambda: b"[" * 100_000),
        (index, lambda: b'{"weight_map":' * 50_000),
        (index, lambda: b"[" + b"[]," * 2_000_000 + b"1]"),
        (index, lambda: b'{"weight_map": {"a": ' + b"9" * 100_000 + b"}}"),
    ]
    name, make = rng.choice(contents)
    return Mutant("bomb", {name: make()}, main=name)


def index(rng: random.Random) -> Mutant:
    """An index whose shards are elsewhere, or none."""
    files = sharded(rng.choice(["safetensors", "bin"]))
    name = next(file for file in files if file.endswith(".json"))
    document = json.loads(files[name])
    places = document["weight_map"]
    victim = rng.choice(list(places))
    places[victim] = rng.choice(
        [
            *("../secret", "/etc/passwd", "/dev/zero", "\x00", "", ".", "a" * 5000, name),
            *("\x1b[2J", 3, None, [], {}, True, 1e308, "part-0.safetensors/x", "~root/x"),
        ]
    )
    if rng.random() < 0.3:
        document["weight_map"] = rng.choice(
            [[], "x", None, 3, {rng.choice(ODD_NAMES): places[victim]}]
        )
    return Mutant("index", files | {name: json.dumps(document).encode()}, main=name)


VALUES = (
    *("0", "-1", "1e400", "nan", "inf", "true", '""', "[]", "{}", "[[]]", "9" * 30, "9" * 5000),
    *("1979-05-27", "07:32:00", '"\\u001b[2J"', '"\\u202e"', "'" + "x" * 50_000 + "'", "[" * 3000),
    *('"~nosuchuser/x"', '"/dev/zero"', '"."', '"/"', '"../model.pt"', '"\\u0000"', '"a:b"'),
    *('"os:system"', '"torch:os.system"', '"builtins:exec"', '"subprocess:run"', '"torch:load"'),
    *('"hostile_net:nn.Linear"', '"hostile_net:torch"', '"hostile_net:__doc__"', '"hostile_net:"'),
    *(
        "{ a = 1 }",
        "{ command = 'touch RAN' }",
        "{ cmd = 'touch RAN', shell = true }",
        "0x_",
        "\x1b",
    ),
)
KEYS = (
    *("file", "inputs", "targets", "kwargs", "factory", "step", "name", "collate", "output"),
    *("checkpoint", "key", "strip", "ignore", "batch_size", "pos_weight", "reduction", "x\x1b"),
)


def spec(rng: random.Random) -> Mutant:
    """A spec with lines changed, added, moved and left out."""
    lines = SPEC.splitlines()
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(lines))
        match rng.randrange(5):
            case 0 | 1:
                lines[place] = f"{lines[place].split(' =')[0]} = {rng.choice(VALUES)}"
            case 2:
                lines.insert(place, f"{rng.choice(KEYS)} = {rng.choice(VALUES)}")
            case 3:
                del lines[place]
            case 4:
                lines.insert(rng.randrange(len(lines)), lines[place])
    content = "\n".join(lines).encode(errors="surrogatepass")
    if rng.random() < 0.2:
        content = damaged(content, rng)
    return Mutant("spec", {"model.pt": saved(weights()), "hesscli.toml": content})


def odd_spec(rng: random.Random) -> Mutant:
    """What is no spec at all, or one without end."""
    content = rng.choice(
        [
            *(b"", b"\xff\xfe\x00", b"a = " + b"[" * 5000, b"a." * 5000 + b"a = 1", b"\x00" * 100),
            *(b"a = 1\n" * 2, b"[" * 100_000, b"x" * (2 << 20), b"a = " + b"9" * 100_000),
            *(b"a = {b = " * 2000, b'"\x1b[2J" = 1', rng.randbytes(300), b"a = 1979-99-99"),
        ]
    )
    return Mutant(
        "odd spec", {"model.pt": saved(weights()), "hesscli.toml": content}, verdict="refuse"
    )


GOOD = Mutant("none", {"model.pt": saved(weights())})

MAKERS: tuple[Callable[[random.Random], Mutant], ...] = (
    *(torch_file, torch_file, unchecked_file, legacy_file, safetensors_file, safetensors_file),
    *(shards, repacked, repacked, odd_state, payload, bomb, index, spec, spec, odd_spec),
)


def mutants(seed: int, count: int) -> Iterator[Mutant]:
    """So many, of all kinds in turn."""
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        yield MAKERS[number % len(MAKERS)](rng)


# -- trying them -----------------------------------------------------------------------------------

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen")
FORBIDDEN += ("socket.connect", "socket.getaddrinfo", "webbrowser.open")


class Range:
    """A folder with the factories, in which mutants are tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "hostile_net.py").write_text(NET)
        (folder / "hesscli.toml").write_text(SPEC)
        import torch._dynamo  # noqa: F401 - which torch imports by itself in some runs

        import hesscli.cli.app

        for name in hesscli.__all__:
            getattr(hesscli, name)
        self.truth = (0.0, 0.0)
        unchecked = Mutant("none", {"model.pt": saved(weights(), checksums=False)})
        good, same = self.run([GOOD, unchecked])
        self.truth = _numbers(good.out)
        assert _numbers(same.out) == self.truth, "what is meant must run, or refusals prove nothing"

    def faults(self, mutants: Iterable[Mutant]) -> Iterator[tuple[Mutant, list[str]]]:
        """What is wrong with how each ends."""
        pending = iter(mutants)
        while batch := list(itertools.islice(pending, BATCH)):
            for mutant, outcome in zip(batch, self.run(batch), strict=True):
                yield mutant, self._judged(mutant, outcome)

    def run(self, batch: Sequence[Mutant]) -> list[Outcome]:
        """``hesscli trace`` of each, in a fork of this process, and in another after a crash."""
        outcomes: list[Outcome] = []
        while len(outcomes) < len(batch):
            rest = batch[len(outcomes) :]
            self._lay(rest)
            reading, writing = os.pipe()
            sys.stdout.flush()
            if not (child := os.fork()):
                os.close(reading)
                _become(self.folder, rest, writing)
            os.close(writing)
            told = list(_told(reading, len(rest)))
            os.close(reading)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            outcomes += [self._outcome(number, line) for number, line in enumerate(told)]
        return outcomes

    def _lay(self, batch: Sequence[Mutant]) -> None:
        for number, mutant in enumerate([GOOD, *batch]):
            place = self.folder / str(number)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            for name, content in mutant.files.items():
                (place / name).write_bytes(content)

    def _outcome(self, number: int, line: dict[str, Any]) -> Outcome:
        place = self.folder / str(number + 1)
        out, err = (
            (place / f".{name}").read_bytes().decode(errors="replace")
            if (place / f".{name}").exists()
            else ""
            for name in ("out", "err")
        )
        acted = line.get("acted", "")
        for folder in (self.folder, place):
            if (folder / "RAN").exists():
                acted = "a payload"
                shutil.rmtree(folder / "RAN") if (folder / "RAN").is_dir() else (
                    folder / "RAN"
                ).unlink()
        return Outcome(line.get("code"), out, err, line.get("grown", 0), acted)

    def _judged(self, mutant: Mutant, outcome: Outcome) -> list[str]:
        limit = 2 * sum(map(len, mutant.files.values())) + SPARE
        text = outcome.out + outcome.err
        told = outcome.err.splitlines()  # warnings may come first
        lines = list(itertools.dropwhile(lambda line: line.startswith("warning: "), told))
        wrong = {
            f"exit {outcome.code}": outcome.code not in (0, 2, 3, 4),
            "a traceback": "Traceback" in text or "has a bug" in text,
            "raw control characters": any(ord(c) < 32 and c != "\n" for c in text),
            f"{len(outcome.err)} characters": len(outcome.err) > 5000,
            f"grown by {outcome.grown >> 20} MiB": outcome.grown > limit,
            f"code run: {outcome.acted}": bool(outcome.acted),
            "run, though nothing can be meant": mutant.verdict == "refuse" and outcome.code == 0,
            "run with other weights": outcome.code == 0
            and mutant.verdict == "same"
            and _numbers(outcome.out) != self.truth,
            "no refusal in three lines": outcome.code in (2, 3, 4)
            and [line[:7] for line in lines[:3]] != ["error: ", "  got: ", "  try: "],
        }
        return [what for what, happened in wrong.items() if happened]


def _numbers(document: str) -> tuple[float, float]:
    found = json.loads(document)
    return found["problem"]["loss"], found["trace"]["estimate"]


def _told(reading: int, count: int) -> Iterator[dict[str, Any]]:
    """How each ended, as the child says; nothing known of one in which it crashed or hung."""
    held = b""
    while count:
        while b"\n" not in held:
            more = select.select([reading], [], [], SECONDS)[0] and os.read(reading, 1 << 16)
            if not more:
                yield {}
                return
            held += more
        line, _, held = held.partition(b"\n")
        count -= 1
        yield json.loads(line)


def _become(folder: Path, batch: Sequence[Mutant], writing: int) -> None:
    """In the child: each run as from a shell, and how much memory it took; then the end."""
    torch.set_num_threads(1)  # a fork has none of the threads that the pool counts on
    acted = list[str]()
    try:
        os.chdir(folder)
        sys.addaudithook(lambda event, _: acted.append(event) if event in FORBIDDEN else None)
        # A good one first, after which the libraries' own pages are there.
        for number, mutant in enumerate([GOOD, *batch]):
            if number == 1:
                gc.freeze()  # so that collecting what a run has left is fast
            acted.clear()
            code, grown = _tried(mutant, str(number))
            line = {"code": code, "grown": grown, "acted": " ".join(acted)}
            if number:
                os.write(writing, json.dumps(line).encode() + b"\n")
    finally:
        os._exit(0)


def _tried(mutant: Mutant, place: str) -> tuple[int, int]:
    """The exit code of one run, and by how many bytes it grew."""
    from hesscli.cli.app import main

    spec = f"{place}/hesscli.toml" if "hesscli.toml" in mutant.files else "hesscli.toml"
    words = ["trace", f"{place}/{mutant.main}", "--spec", spec, "--out", "json", "--dir", "-"]
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(f"{place}/.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before, code = _memory("VmRSS", reset=True), 99
    try:
        code = int(main(words))
    except BaseException as error:  # what a shell would see as a traceback
        print(f"Traceback: {type(error).__name__}", file=sys.stderr)
    grown = _memory("VmHWM") - before
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code, grown


def _memory(name: str, *, reset: bool = False) -> int:
    """Resident bytes now, or at most since the reset; 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def main(arguments: list[str] | None = None) -> int:
    """Try as many as asked for; 1 where one ends wrongly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kinds, failed = collections.Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        place = Range(Path(name).resolve())
        for number, (mutant, faults) in enumerate(place.faults(mutants(asked.seed, asked.count))):
            kinds[mutant.kind] += 1
            if faults:
                failed += 1
                print(f"{number}: {mutant.kind}: {'; '.join(faults)}", flush=True)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"{asked.count} tried ({told}), {failed} ended wrongly")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
