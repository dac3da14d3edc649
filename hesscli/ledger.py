"""A run's ledger: the file from which it goes on after it was cut off, by whatever it was.

``trace.ledger`` is a safetensors file. Its metadata hold, as JSON, what the run is of, what it has
decided and where it is; its tensors are the sums and tables. It is replaced as a whole, so that
there is always one that can be read, and it has the hash of all its own bytes. Rows that stay as
they are once they are there, as the vectors of a Lanczos basis do, are written once each: to files
``trace.ledger.1``, ``trace.ledger.2`` and so on, whose hashes the ledger has.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from hesscli.errors import HesscliError, UsageError
from hesscli.meter import Meter
from hesscli.state import Parted, Rows, Stateful, Timed, joined
from hesscli.storage import write_atomically
from hesscli.tensor_files import Blocks, DamagedError, read_tensors, write_tensors

FORMAT = 4
"""Changes where a ledger can no longer be read by what wrote those before."""

_OFTEN = 0.5
"""Seconds between two writes, at least."""
_SHARE, _SHARE_OF_ROWS = 1 / 150, 1 / 10
"""Of the time, that writing may take; rows are written but once each."""
_SHARE_AT_END, _LITTLE = 1 / 100, 0.02
"""Of the run's time, or in seconds, that what is kept of a finished run may take to write."""
_RATE = 1e8
"""Bytes that are written in a second, until it is known."""
_TELLING = 1 << 24
"""Bytes from whose time a rate can be told."""
_QUICK = 3.0
"""Seconds that a run which is told to end may still write for; one that its budget ends may for a
tenth of its time, since by then it has written such a state before, in less."""


@dataclass
class _Kept:
    """Work that is under way or has ended, and what it had been counted when it did."""

    work: Stateful
    counted: tuple[float, float] | None = None


@dataclass(frozen=True)
class _RowFile:
    name: str
    rows: int
    sha256: str


class FileLedger:
    """A run that is kept in a file.

    Args:
        path: of the file.
        facts: what the run is of, by names that people know.
        loaded: options whose effects are in the facts, as they were typed: what differs in its
            effects is named by them.
        begun: how, for who has nothing but the ledger.
        part: whether it is of a part of some work, and stays until it is joined with the others.
        resume: go on from what the file has, if there is one.
        say: tells people.
        check: sees that the folder is still this run's, and raises where it is not.

    Attributes:
        whole: makes blocks of the rows of a place from some number on. Who shares a run among
            processes that have a part of each row sets it.

    Raises:
        UsageError: a ledger of another run to go on from; or one that is not finished where none
            was to be gone on from, or that cannot be read where one was.
    """

    def __init__(
        self,
        path: Path,
        facts: Mapping[str, Any],
        *,
        resume: bool,
        say: Callable[[str], None],
        loaded: Mapping[str, Any] | None = None,
        begun: Mapping[str, Any] | None = None,
        part: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self._say, self._check = path, say, check
        self._facts: dict[str, Any] = {}
        self._loaded, self._begun, self._part = as_read(loaded or {}), as_read(begun or {}), part
        self._decisions: dict[str, Any] = {}
        self._work: list[_Kept] = []
        self._files: dict[str, list[_RowFile]] = {}
        self._saved: dict[str, Any] = {}
        self._over = self._failed = self._at_budget = False
        self.whole: Callable[[str, Rows, int], Iterator[Tensor]] = whole_rows
        self._ended = self._due = time.monotonic()
        self._rate, self._last = _RATE, 0.0
        self._next = 1 + max((int(file.suffix[1:]) for file in self._row_files()), default=0)
        if resume and not path.exists():
            say(f"there is no {path} to go on from: begun anew")
        elif resume:
            self._saved = read_ledger(path)
            files = self._saved["rows"].items()
            self._files = {place: [_RowFile(*file) for file in each] for place, each in files}
            self._decisions = self._saved["decisions"]
        elif path.exists():
            self._refuse_unfinished()
        self.recognise(facts)

    @property
    def place(self) -> Path | None:
        """Where the run is kept by now, if it is."""
        return self.path if self.path.exists() else None

    # -- what a run tells ----------------------------------------------------------------------

    def attach(self, clock: Timed, meter: Meter) -> None:
        """Keep what these say as well; the clock goes on from what was kept."""
        self._clock, self._meter = clock, meter
        clock.earlier = self._saved.get("seconds", 0.0)

    def recognise(self, facts: Mapping[str, Any]) -> None:
        """Take note of what the run is of.

        Raises:
            UsageError: what was kept is of another.
        """
        now = as_read(facts)
        assert all(self._facts.get(name, now[name]) == now[name] for name in now), "one name each"
        self._facts |= now
        if self._saved:
            then = self._saved["facts"]
            if apart := [name for name in now if now[name] != then.get(name)]:
                self._refuse_another(apart, then, now)

    def decided(self, name: str, decide: Callable[[], Any]) -> Any:
        """What was decided before; or it is decided now, as plain values, and kept."""
        if name not in self._decisions:
            self._decisions[name] = decide()
        return self._decisions[name]

    def begin(self, work: Stateful) -> None:
        """Keep this work too, and let it go on from what was kept."""
        saved = self.saved(len(self._work))
        self._work.append(_Kept(work))
        if saved is not None:
            self._meter.go_back(tuple(saved["counted"]))
            work.load_state_dict(saved["state"])
        else:
            self._meter.keep()
        self._ended = time.monotonic()
        self._due = self._ended + _OFTEN

    def saved(self, number: int) -> dict[str, Any] | None:
        """The work of a number as it was kept, with what it had been counted, if it was."""
        kept: list[dict[str, Any]] = self._saved.get("work", [])
        return kept[number] if number < len(kept) else None

    def has_decided(self, name: str) -> bool:
        """Whether something of this name was decided before."""
        return name in self._decisions

    def step(self) -> None:
        """Write what there is, if it is due."""
        if self.is_due():
            self.write()

    def is_due(self) -> bool:
        """Whether the time that writing takes is a small part of the time it has been."""
        if (now := time.monotonic()) < self._due:
            return False
        self._due = self._ended + self._wait(self._parted())
        return now >= self._due

    def write(self) -> None:
        """Write what there is."""
        self._write(self._parted())

    def cut(self, at_budget: bool) -> None:
        """The work ends here, with more to do: write what there is.

        Args:
            at_budget: as its user has said that it should, so that a new run may replace it.
        """
        self._at_budget = at_budget
        parted = self._parted()
        seconds = self._expected(parted) + self._unwritten(parted)
        if at_budget and _QUICK < seconds <= _SHARE_OF_ROWS * self._clock.seconds:
            self._say(f"the budget is over; its ledger takes about {seconds:.0f} s to write")
            self._write(parted)
        elif seconds <= _QUICK:
            self._write(parted)

    def end(self) -> None:
        """The work has come to its own end."""
        self._meter.keep()
        self._work[-1].counted = self._meter.kept

    def close(self) -> None:
        """The run's work is over; write that, where more can be asked of it."""
        self._over = all(kept.counted is not None for kept in self._work)
        if self._over and (self._part or all(kept.work.lasting for kept in self._work)):
            parted = self._parted()
            little = max(_LITTLE, _SHARE_AT_END * self._clock.seconds)
            if self._part or self._expected(parted) <= little:
                self._write(parted)
                self._work.clear()

    def delivered(self) -> None:
        """The result is where it belongs: what nobody can go on from is not needed any more.

        Raises:
            UsageError: it is a part that nobody can join, since it could not be kept.
        """
        if self._part and self._failed:
            raise UsageError(
                "a part is of use with its ledger alone, which could not be kept",
                str(self.path),
                "free some space, or another --dir, then the same command again",
            )
        if self._over and self._work:
            self._work.clear()
            self.path.unlink(missing_ok=True)
            self._sweep(set())

    # -- how it is written ---------------------------------------------------------------------

    def _parted(self) -> Parted:
        """All there is to write."""
        return Parted.of(
            {
                "format": FORMAT,
                "finished": self._over,
                "at_budget": self._at_budget,
                "part": self._part,
                "facts": self._facts,
                "loaded": self._loaded,
                "begun": self._begun,
                "decisions": self._decisions,
                "seconds": self._clock.seconds,
                "work": [
                    {"counted": kept.counted or self._meter.kept, "state": kept.work.state_dict()}
                    for kept in self._work
                ],
            }
        )

    def _expected(self, parted: Parted) -> float:
        """Seconds that it takes to write all but rows."""
        return max(parted.nbytes / self._rate, self._last)

    def _wait(self, parted: Parted) -> float:
        """Seconds that should pass before so much is written again."""
        sums, rows = self._expected(parted), self._unwritten(parted)
        return max(_OFTEN, sums / _SHARE, rows / _SHARE_OF_ROWS)

    def _unwritten(self, parted: Parted) -> float:
        """Seconds that it takes to write the rows that are in no file yet."""
        new = (self._new(place, rows).nbytes for place, rows in parted.rows.items())
        return sum(new) / self._rate

    def _new(self, place: str, rows: Rows) -> Blocks:
        """Rows that are in no file yet."""
        first = sum(file.rows for file in self._files.get(place, ()))
        shape = len(rows) - first, *rows.shape[1:]
        return Blocks(rows.dtype, shape, self.whole(place, rows, first))

    def _write(self, parted: Parted) -> None:
        """Rows first, then what names them; a disk that is full does not end the run."""
        began = time.monotonic()
        try:
            self._check()
            for place in parted.rows:
                self._write_rows(place, self._new(place, parted.rows[place]))
            began = time.monotonic()
            self._files = {place: self._files[place] for place in parted.rows}
            rows = {
                place: [[file.name, file.rows, file.sha256] for file in files]
                for place, files in self._files.items()
            }
            told = json.dumps(parted.plain | {"rows": rows})
            arrays = {place: Blocks.of(array) for place, array in parted.arrays.items()}
            self._put(self.path, arrays, told)
            self._sweep({file.name for files in self._files.values() for file in files})
            self._failed = False
        except HesscliError as error:
            if not self._failed:
                self._say(f"the run goes on, but is not kept: {error.what}, {error.got}")
            self._failed = True
        self._ended = time.monotonic()
        self._due = self._ended + _OFTEN
        self._last = self._ended - began
        if self._last and parted.nbytes > _TELLING:
            self._rate = parted.nbytes / self._last

    def _write_rows(self, place: str, new: Blocks) -> None:
        files, count = self._files.setdefault(place, []), new.shape[0]
        if not count:
            return
        path = self.path.with_name(f"{self.path.name}.{self._next}")
        self._next += 1
        digest = self._put(path, {"rows": new})
        files.append(_RowFile(path.name, count, digest))

    def _put(self, path: Path, tensors: Mapping[str, Blocks], told: str = "") -> str:
        digests = list[str]()
        write_atomically(path, lambda stream: digests.append(write_tensors(stream, tensors, told)))
        return digests[0]

    def _row_files(self) -> Iterator[Path]:
        """Those that there are, of this run or one before."""
        if self.path.parent.is_dir():
            pattern = re.compile(re.escape(self.path.name) + r"\.\d+")
            for file in self.path.parent.iterdir():
                if pattern.fullmatch(file.name):
                    yield file

    def _sweep(self, named: set[str]) -> None:
        """Remove files of rows that the ledger does not name."""
        for file in self._row_files():
            if file.name not in named:
                file.unlink(missing_ok=True)

    # -- what is refused -----------------------------------------------------------------------

    def _refuse_unfinished(self) -> None:
        try:
            saved = read_header(self.path)
        except DamagedError as damaged:
            self._say(f"a ledger that cannot be read is replaced: {self.path}, {damaged.got}")
            return
        if saved["part"] and (saved["finished"] or saved["at_budget"]):
            raise UsageError(
                f"a part of a result is kept in {self.path}",
                f"it would be lost, before `hesscli join` has it; {saved['seconds']:.0f} s of work",
                f"another --dir for another part, --resume to see this one's, or rm {self.path}",
            )
        if saved["at_budget"]:
            self._say(
                f"the ledger of a run that ended at its budget is replaced: {self.path}; "
                "--resume would have gone on with it"
            )
        elif not saved["finished"]:
            raise UsageError(
                f"a run that was not finished is kept in {self.path}",
                f"{saved['seconds']:.0f} s of work",
                f"--resume to go on with it, another --dir, or rm {self.path}",
            )

    def _refuse_another(
        self, apart: list[str], then: Mapping[str, Any], now: Mapping[str, Any]
    ) -> NoReturn:
        loaded = self._saved["loaded"]
        if typed := [name for name in self._loaded if self._loaded[name] != loaded.get(name)]:
            then, now = {**then, **loaded}, {**now, **self._loaded}
            apart = [*typed, *apart]
        told = differences(apart, then, now)
        more = f" ({len(told)} differences)" if len(told) > 3 else ""
        first = apart[0]
        cure = "what it was begun with"
        if first.startswith("--"):
            cure = as_typed(first, then.get(first))
        elif first == "threads":
            cure = f"OMP_NUM_THREADS={then[first]}"
        raise UsageError(
            f"the ledger is of another run: {self.path}",
            "; ".join(told[:3]) + more,
            f"{cure}, or for a run of its own another --dir or rm {self.path}",
        )


def whole_rows(_place: str, rows: Rows, first: int) -> Iterator[Tensor]:
    """Rows that are all here, from a number on."""
    yield from rows.since(first)


def as_read(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read again."""
    found: dict[str, Any] = json.loads(json.dumps(dict(facts), default=str))
    return found


def differences(names: Iterable[str], then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How facts have changed, one by one, in words."""
    return [f"{name} was {short(then.get(name))} and is {short(now[name])}" for name in names]


def as_typed(name: str, value: Any) -> str:
    """How an option is typed that has a value or several, or a switch that is on or off."""
    if value is None or value is False or value == []:
        return f"no {name}"
    if isinstance(value, list):
        return " ".join(f"{name} {one!r}" for one in value)
    return name if value is True else f"{name} {value}"


def short(value: Any) -> str:
    """A hash by its first letters."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def read_header(path: Path) -> dict[str, Any]:
    """What a ledger has but for arrays.

    Raises:
        DamagedError: it is not what was written.
        UsageError: it is of another format.
    """
    return _of_this_format(path, read_tensors(path, told_alone=True)[1])


def _of_this_format(path: Path, told: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(told)
    if found["format"] != FORMAT:
        raise UsageError(
            f"the ledger has another format: {path}",
            f"{found['format']}, written by hesscli {found['facts'].get('hesscli')}",
            f"the hesscli that wrote it, or rm {path}",
        )
    return found


def read_ledger(path: Path) -> dict[str, Any]:
    """What a ledger has, with the state of its work as it was given.

    Raises:
        DamagedError: it, or a file of rows, is not what was written.
        UsageError: it is of another format.
    """
    arrays, told = read_tensors(path)
    found = _of_this_format(path, told)
    rows = {}
    for place, files in found["rows"].items():
        parts = [read_tensors(path.with_name(name), sha256) for name, _, sha256 in files]
        rows[place] = Rows(*(tensors["rows"] for tensors, _ in parts))
    found["work"] = joined(found["work"], arrays, rows)
    return found
