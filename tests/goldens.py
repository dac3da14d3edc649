"""What the commands answer, recorded before a refactoring and compared after it: ``make goldens``.

``python tests/goldens.py record DIR`` runs the program on the samples and keeps of each run its
streams, exit code, documents, files' hashes, the texts of its pictures, and how often it called
autograd. ``python tests/goldens.py compare DIR DIR`` prints what differs. No recording is part of
the repository: numbers differ between processors, and between versions of torch.

Each run is a fork of this process. Its clock goes on by a microsecond a look, so that no decision
depends on the machine, and Ctrl-C is pressed at a call of autograd. ``--like DIR`` presses it at
the same calls as there. The program is whichever ``hesscli`` is first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of the threads that a pool counts on
for _name in [name for name in os.environ if re.search("COLOR|COLUMNS|TTY|GITHUB", name)]:
    del os.environ[_name]

import matplotlib.image  # noqa: E402
import torch  # noqa: E402

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
CHECKPOINTS = {"fashion": "model.pt", "text": "model.safetensors", "sunspots": "model.pt"}
MEASURED = ("trace", "diag", "ihvp", "spectrum")
COMMANDS = ("check", "init", *MEASURED, "schema")

CHEAP = {
    "trace": "--method hutchinson --probes 4",
    "diag": "--method hutchinson --probes 4",
    "ihvp": "--window 64",
    "spectrum": "--steps 8 --probes 2",
}
"""With few probes, or rows, or steps."""
OTHERWISE = [
    *((command, "json", "--out json --dir -") for command in MEASURED),
    *((command, "verbose", "-v --layer") for command in MEASURED),
    *((command, "differences", "--mode finite-difference --dir -") for command in MEASURED),
    ("trace", "missed", "--method hutchinson --probes 2 --rtol 0.1% --dir -"),
    ("trace", "fisher", "--matrix fisher --dir -"),
    ("diag", "blocks", "--block 4 --heatmap hidden2.weight --layer 'hidden*'"),
    ("ihvp", "solve", "--vector gradient --refine 1e-3"),
    ("ihvp", "verify", "--verify --rows example --window-dtype bfloat16"),
    ("spectrum", "exact", "--exact --vectors --layer hidden2"),
]
"""What else the smallest sample is asked."""
FEW = {"fashion": "--examples 500", "text": "--examples 64"}
"""Of the larger samples, but for traces, which are cheap: with all, it would take an hour."""
QUICK = {"fashion": "--examples 16 --batch-size 8", "text": "--examples 4 --batch-size 2"}
QUICKER = {
    "diag": "--rtol 90%",
    "ihvp": "--window 16 --vector gradient",
    "spectrum": "--steps 8 --probes 2",
}
INTERRUPTED_AT = 0.75
"""Of the calls of autograd that the same run makes when it is left alone."""

PRELOADED = (
    *("typer", "pydantic", "rich.console", "rich.progress", "safetensors.numpy", "scipy.special"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
    *("torch.func", "torch.fx.experimental.symbolic_shapes", "torch.utils.data"),
)
"""What takes seconds to import, in every run again."""

CLOCK = time.perf_counter
"""The true one."""


@dataclass(frozen=True)
class Run:
    """One command line; ``interrupts`` names the run that it is, until Ctrl-C is pressed."""

    name: str
    line: str
    interrupts: str | None = None

    @property
    def words(self) -> list[str]:
        """The arguments."""
        return shlex.split(self.line)


def all_runs(quick: bool) -> Iterator[Run]:
    """Every run, each after the one that it interrupts."""
    yield Run("help", "--help")
    yield Run("schema", "schema")
    yield Run("misuse-command", "trce model.pt")
    yield Run("misuse-option", "trace model.pt --probes none")
    yield Run("misuse-file", "diag missing.pt")
    yield from (Run(f"{command}-help", f"{command} --help") for command in COMMANDS)
    for sample, file in CHECKPOINTS.items():
        path = f"samples/{sample}/{file}"
        yield Run(f"{sample}-init", f"init {path} --stdout")
        few = (QUICK if quick else FEW).get(sample, "")
        yield Run(f"{sample}-check", f"check {path} --dir out {few}")
        for command in MEASURED:
            if quick and few:
                line = f"{command} {path} --dir out {few} {QUICKER.get(command, '')}"
                yield from _whole_and_interrupted(f"{sample}-{command}", line)
            else:
                line = f"{command} {path} --dir out {few if command != 'trace' else ''}"
                yield from _variants(f"{sample}-{command}", line, CHEAP[command])
    for command, name, options in OTHERWISE:
        path = f"samples/sunspots/{CHECKPOINTS['sunspots']}"
        folder = "" if "--dir" in options else "--dir out"
        yield Run(f"sunspots-{command}-{name}", f"{command} {path} {options} {folder}")


def _whole_and_interrupted(name: str, line: str) -> Iterator[Run]:
    yield Run(f"{name}-default", line)
    yield Run(f"{name}-interrupted", line, interrupts=f"{name}-default")


def _variants(name: str, line: str, cheap: str) -> Iterator[Run]:
    yield from _whole_and_interrupted(name, line)
    yield Run(f"{name}-cheap", f"{line} {cheap}")
    yield Run(f"{name}-ggn", f"{line} --matrix ggn")
    yield Run(f"{name}-layer", f"{line} --layer head")


class Autograd:
    """Counts the calls of autograd, and presses Ctrl-C at one of them."""

    def __init__(self) -> None:
        self.calls = 0
        self.interrupt_at: int | None = None

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count from now on."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.interrupt_at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call


class Recorder:
    """Runs command lines in a folder with copies of the samples.

    Args:
        folder: where recordings go, one folder a run.
        like: an earlier recording, whose interruptions are repeated.
        scratch: an empty folder for copies of the program, which may change meanwhile, and of
            the samples.
    """

    def __init__(self, folder: Path, like: Path | None, scratch: Path) -> None:
        self.folder, self.like, self.work = folder.resolve(), like, scratch / "work"
        for sample in CHECKPOINTS:
            shutil.copytree(SAMPLES / sample, self.work / "samples" / sample)
        program = find_spec("hesscli")
        assert program is not None, "no hesscli on PYTHONPATH"
        assert program.origin is not None, "hesscli is no package with an __init__.py"
        shutil.copytree(Path(program.origin).parent, scratch / "program" / "hesscli")
        sys.path.insert(0, str(scratch / "program"))
        self.autograd = Autograd()
        torch.autograd.grad = self.autograd.watched(torch.autograd.grad)
        torch.autograd.backward = self.autograd.watched(torch.autograd.backward)
        looks = count()
        time.monotonic = time.perf_counter = lambda: next(looks) * 1e-6
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(scratch / "bytecode")
        from hesscli.cli.app import main  # after the clock and autograd are replaced

        self.main = main

    def record(self, run: Run) -> None:
        """Run it, and keep what it wrote."""
        kept = self.folder / run.name
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        interrupt_at = self._interruption(run)
        sys.stdout.flush()
        sys.stderr.flush()
        if not (child := os.fork()):
            self._become(run, kept, interrupt_at)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (kept / "command").write_text(f"hesscli {shlex.join(run.words)}\n")
        (kept / "exit").write_text(f"{status}\n")
        if interrupt_at:
            (kept / "interrupted_at").write_text(f"{interrupt_at}\n")
        for name in ("stdout", "stderr"):
            written = (kept / name).read_text().replace(str(self.work), "WORK")
            (kept / name).write_text(_timeless(written, aligned=run.words[0] == "check"))
        self._keep_files(kept)

    def _interruption(self, run: Run) -> int | None:
        """The call of autograd at which Ctrl-C is pressed; None for never."""
        if run.interrupts is None:
            return None
        if self.like is not None:
            return int((self.like / run.name / "interrupted_at").read_text())
        calls = int((self.folder / run.interrupts / "autograd_calls").read_text())
        return max(1, round(INTERRUPTED_AT * calls))

    def _become(self, run: Run, kept: Path, interrupt_at: int | None) -> NoReturn:
        """Be the program, in a fork."""
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(kept / name, os.O_WRONLY | os.O_CREAT), descriptor)
        os.chdir(self.work)
        self.autograd.interrupt_at = interrupt_at
        code = -1
        try:
            code = self.main(run.words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            (kept / "autograd_calls").write_text(f"{self.autograd.calls}\n")
            os._exit(code)

    def _keep_files(self, kept: Path) -> None:
        """Documents as they are, of pictures the texts, and the hashes of all other files."""
        out, hashes = self.work / "out", list[str]()
        for path in sorted(out.rglob("*")):
            if path.suffix == ".json":
                document = json.dumps(json.loads(path.read_text()), indent=1)
                (kept / path.name).write_text(_timeless(document))
                continue
            if path.suffix == ".svg":
                texts = re.findall("<!-- (.*?) -->", path.read_text())
                (kept / f"{path.name}.texts").write_text("\n".join(texts) + "\n")
            content = path.read_bytes()
            if path.suffix == ".png":
                content = matplotlib.image.imread(path).tobytes()
            hashes.append(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
        (kept / "hashes").write_text("".join(hashes))
        shutil.rmtree(out, ignore_errors=True)


_MEASURED_FIELD = re.compile(r'^ *"(\w*seconds|peak_bytes)": [\d.e+-]+,?\n', re.MULTILINE)
_DURATION = re.compile(r"\b\d+(\.\d+)? (ms|s|min|h)\b( \d+ (s|min)\b)?")
_PEAK = re.compile(r"[\d.]+ [KMGT]iB(?= peak memory)|(?<=TIME  ) *[\d.]+ [KMGT]iB$", re.MULTILINE)


def _timeless(text: str, aligned: bool = False) -> str:
    """A text without seconds and bytes that were measured.

    Args:
        text: a stream or a document.
        aligned: durations stand in columns, as wide as the longest of them.
    """
    text = _PEAK.sub("PEAK", _DURATION.sub("TIME", _MEASURED_FIELD.sub("", text)))
    return re.sub("─+", "─", re.sub(" {2,}| +$", "  ", text, flags=re.M)) if aligned else text


def record(folder: Path, like: Path | None, pattern: str, quick: bool) -> None:
    """Record the runs whose names match a pattern."""
    for module in PRELOADED:
        import_module(module)
    with tempfile.TemporaryDirectory() as scratch:
        recorder = Recorder(folder, like, Path(scratch).resolve())
        for run in all_runs(quick):
            if fnmatch(run.name, pattern):
                began = CLOCK()
                recorder.record(run)
                print(f"{CLOCK() - began:7.1f} s  {run.name}", flush=True)


def differences(first: Path, second: Path, pattern: str) -> Iterator[str]:
    """The lines in which two recordings differ, of runs whose names match a pattern."""
    files = [path for top in (first, second) for path in top.glob(f"{pattern}/*")]
    names = {Path(path.parent.name, path.name) for path in files}
    assert names, "there is nothing to compare"
    for name in sorted(names):
        old, new = first / name, second / name
        yield from difflib.unified_diff(
            _lines(old), _lines(new), str(old), str(new), n=2, lineterm=""
        )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    """Record or compare.

    Returns:
        1 where two recordings differ.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(required=True)
    recording = actions.add_parser("record", help="run the program and keep what it answers")
    recording.add_argument("folder", type=Path, metavar="DIR")
    recording.add_argument("--quick", action="store_true", help="few examples; minutes")
    recording.add_argument("--like", type=Path, metavar="DIR", help="interrupt at the same calls")
    comparing = actions.add_parser("compare", help="print what differs")
    comparing.add_argument("folders", type=Path, nargs=2, metavar="DIR")
    for action in (recording, comparing):
        action.add_argument("--only", default="*", metavar="GLOB", help="runs with such a name")
    given = parser.parse_args(argv)
    if "folder" in given:
        record(given.folder, given.like, given.only, given.quick)
        return 0
    first, second = given.folders
    found = list(differences(first, second, given.only))
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
