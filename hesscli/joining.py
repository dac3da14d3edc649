"""Ledgers of runs over parts of the same work, as one from which a run tells what they come to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from hesscli.errors import UsageError
from hesscli.ledger import (
    as_read,
    as_typed,
    differences,
    read_header,
    read_ledger,
    short,
)
from hesscli.meter import Meter
from hesscli.state import Joinable, Stateful, Timed
from hesscli.tensor_files import DamagedError

MAY_DIFFER = frozenset(
    ("--probes", "--batches", "device", "device_name", "threads", "gradient", "accuracy")
)
"""Facts that are others for another part, or on another machine."""
_ROUNDED = ("loss", "gradient_size")
"""Facts that another machine may round otherwise."""
_CURES = {
    "checkpoint": "--checkpoint FILE, with the one that was measured",
    "spec": "--spec FILE, with the one that was measured",
}

Span = tuple[int, int] | None
"""Numbers from one up to another; None where it is all of them."""


# -- One of the parts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A ledger, and what of the whole it is."""

    path: Path
    header: Mapping[str, Any]

    @classmethod
    def at(cls, place: Path) -> Part:
        """The ledger of a file, or the one that lies in a folder.

        Raises:
            UsageError: there is none, or not one alone, or it cannot be read.
        """
        path = place
        if place.is_dir():
            found = sorted(place.glob("*.ledger"))
            if len(found) != 1:
                raise UsageError(
                    f"there is not one ledger in the folder: {place}",
                    ", ".join(path.name for path in found) or "none",
                    "the file of one, as in run-a/trace.ledger"
                    if found
                    else "a folder of a run with --probes a:b or --batches a:b, and with files",
                )
            path = found[0]
        try:
            return cls(path, read_header(path))
        except DamagedError as damaged:
            hint = "a whole copy of it, or a join without it"
            raise UsageError(damaged.what, damaged.got, hint) from damaged

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it is of, by names that people know."""
        found: Mapping[str, Any] = self.header["facts"]
        return found

    @property
    def given(self) -> Mapping[str, Any]:
        """What was typed, by the names of options."""
        found: Mapping[str, Any] = self.header["begun"]["given"]
        return found

    @cached_property
    def probes(self) -> Span:
        """Numbers of its probes; None where it has none."""
        match self.given["probes"]:
            case None:
                return None
            case int(count):
                return 0, count
            case first, last:
                return first, last
        raise AssertionError(self.given)

    @cached_property
    def batches(self) -> tuple[int, int]:
        """Numbers of its batches."""
        first, last = self.given["batches"] or (0, self.facts["num_batches"])
        return first, last

    @property
    def order(self) -> tuple[Any, ...]:
        """Where it comes: by batch, then by probe."""
        return self.batches, self.probes or (), str(self.path)

    def __str__(self) -> str:
        """What of the whole it is."""
        first, last = self.batches
        whole = self.batches == (0, self.facts["num_batches"])
        told = "" if whole else f" of batches {first}:{last}"
        return (
            f"probes {self.probes[0]}:{self.probes[1]}{told}" if self.probes else told[4:] or "all"
        )


def _overlap(one: Span, other: Span) -> bool:
    return one is None or other is None or max(one[0], other[0]) < min(one[1], other[1])


# -- All of them as one ----------------------------------------------------------------------------


class JoinedLedger:
    """Parts of some work, each run by itself, as the ledger of a run over all of them.

    That run takes no steps: it reads off what they have found, in the order of batches and probes,
    whatever the order of the ledgers.

    Args:
        places: ledgers, or folders that have one each.
        say: tells people.

    Raises:
        UsageError: they are not parts of the same work, or the same part twice.
    """

    def __init__(self, places: Sequence[Path], say: Callable[[str], None]) -> None:
        parts = [Part.at(place) for place in places]
        for part in parts:
            _require_parts(part)
            _require_same(parts[0], part)
        self.parts = sorted(parts, key=lambda part: part.order)
        for one, other in itertools.combinations(self.parts, 2):
            _require_apart(one, other)
        self._stage = 0
        for told in self._said():
            say(told)

    place: None = None
    """Nothing of it is kept: the parts are."""

    # -- what was typed ------------------------------------------------------------------------

    @property
    def command(self) -> str:
        """Whose result it is."""
        return str(self.parts[0].header["begun"]["command"])

    @property
    def checkpoint(self) -> Path | None:
        """As it was typed, or where it was found then, if it is no more what is typed now."""
        begun = self.parts[0].header["begun"]
        typed, found = begun["checkpoint"], begun["found"]
        if typed is None or Path(typed).exists() or not Path(found).exists():
            return None if typed is None else Path(typed)
        return Path(found)

    @property
    def given(self) -> dict[str, Any]:
        """What else was typed, for all probes and batches."""
        spans = [part.probes for part in self.parts if part.probes]
        whole = (min(a for a, _ in spans), max(b for _, b in spans)) if spans else None
        return {**self.parts[0].given, "probes": whole, "batches": None}

    # -- what it tells a run -------------------------------------------------------------------

    def attach(self, clock: Timed, meter: Meter) -> None:
        """The time that all of them took is a part of the run's."""
        clock.earlier = sum(part.header["seconds"] for part in self.parts)
        self._meter = meter

    def recognise(self, facts: Mapping[str, Any]) -> None:
        """See that they are of what is here.

        Raises:
            UsageError: they are of something else.
        """
        now = as_read(facts)
        then = self.parts[0].facts
        if apart := [*_differing(then, now, now)]:
            name = apart[0]
            raise UsageError(
                "the ledgers are of something else than what is here",
                "; ".join(differences(apart[:3], then, now)),
                _CURES.get(name, f"{name} as it was there"),
            )

    def decided(self, name: str, decide: Callable[[], Any]) -> Any:
        """What was decided for all of them, with the largest of the errors that were measured."""
        kept = [part.header["decisions"].get(name) for part in self.parts]
        if kept[0] is None:
            return decide()
        if name != "preflight":
            return kept[0]
        errors = {key: [one[key] for one in kept] for key in _ERRORS}
        return {
            **kept[0],
            **{key: None if None in each else max(each) for key, each in errors.items()},
        }

    def begin(self, work: Stateful) -> None:
        """Let it be what all of them have come to.

        Raises:
            UsageError: one of them has not come so far.
        """
        products = gradients = 0.0
        for part in self.parts:
            saved = read_ledger(part.path)["work"]
            if self._stage >= len(saved):
                raise UsageError(
                    f"a part has not come as far as the others: {part.path}",
                    f"{len(saved)} of its stages",
                    "--resume for that part, then the join",
                )
            cast("Joinable", work).join(saved[self._stage]["state"])
            products += saved[self._stage]["counted"][0]
            gradients += saved[self._stage]["counted"][1]
        self._meter.go_back((products, gradients))
        self._stage += 1

    def step(self) -> None:
        """Nothing is kept of it."""

    end = close = delivered = step

    def cut(self, _at_budget: bool) -> None:
        """Nor of this."""

    # -- what people should know ---------------------------------------------------------------

    def _said(self) -> Iterator[str]:
        for part in self.parts:
            whole = "" if part.header["finished"] else ", cut off: what is whole of it"
            yield f"joined: {part} from {part.path} ({part.header['begun']['host']}){whole}"
        every = self.parts[0].facts["num_batches"]
        if missing := [*_gaps((0, every), [part.batches for part in self.parts])]:
            yield f"in none of them: batches {_listed(missing)} of {every}"
        for batches, group in itertools.groupby(self.parts, key=lambda part: part.batches):
            spans = [part.probes for part in group if part.probes]
            within = (min(a for a, _ in spans), max(b for _, b in spans)) if spans else (0, 0)
            if missing := [*_gaps(within, spans)]:
                told = "" if batches == (0, every) else f" of batches {batches[0]}:{batches[1]}"
                yield f"in none of them: probes {_listed(missing)}{told}"


_ERRORS = ("relative_rounding", "product_rounding")
_CHOICES = ("mode", "attention_kernel")
"""What a preflight measures, which differs from machine to machine, and what it chooses."""


def _gaps(whole: tuple[int, int], spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Numbers of the whole that are in no span."""
    reached = whole[0]
    for first, last in sorted(spans):
        if first > reached:
            yield reached, first
        reached = max(reached, last)
    if reached < whole[1]:
        yield reached, whole[1]


def _listed(spans: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{first}:{last}" for first, last in spans)


# -- What is refused -------------------------------------------------------------------------------


def _require_parts(part: Part) -> None:
    begun = part.header["begun"]
    if not begun.get("joins"):
        raise UsageError(
            f"the ledger is of no part of a sum: {part.path}",
            f"hesscli {begun.get('command', 'in Python')}, each of whose steps needs those before",
            "one run, with --resume where it was cut off",
        )


def _require_same(first: Part, part: Part) -> None:
    """Refuse another command, problem, option, version or choice than the first's."""
    then, now = _told(first), _told(part)
    apart = [*_differing(then, now, then | now)]
    if not apart:
        return
    loaded, own = first.header["loaded"], part.header["loaded"]
    typed = [name for name in loaded if loaded[name] != own[name] and name != "--device"]
    _refuse(first, part, [*typed, *apart], then | loaded, now | own)


def _told(part: Part) -> dict[str, Any]:
    """All that must be the same."""
    header = part.header
    decisions = header["decisions"]
    flight = decisions["preflight"]
    probed = [one["name"] for one in decisions.get("exactness", ()) if one["reason"] is not None]
    tolerances = {f"--{name}": part.given[name] for name in ("rtol", "atol")}
    return {
        "command": header["begun"]["command"],
        **part.facts,
        **tolerances,
        **{name: flight[name] for name in _CHOICES},
        "method": decisions.get("method"),
        "tensors with probes": ", ".join(probed),
        "probes": "none" if part.probes is None else "some",
    }


def _differing(
    then: Mapping[str, Any], now: Mapping[str, Any], among: Mapping[str, Any]
) -> Iterator[str]:
    """Facts that are others; what is rounded may be so by half of its digits."""
    allowed = math.sqrt(torch.finfo(getattr(torch, str(now.get("dtype", "float64")))).eps)
    for name in among:
        one: Any = then.get(name)
        other: Any = now.get(name)
        if one == other or name in MAY_DIFFER:
            continue
        if name not in _ROUNDED or not math.isclose(one, other, rel_tol=allowed):
            yield name


def _refuse(
    first: Part, part: Part, apart: list[str], then: Mapping[str, Any], now: Mapping[str, Any]
) -> NoReturn:
    told = [
        f"{name} {short(then.get(name))} there and {short(now.get(name))} here" for name in apart
    ]
    more = f" ({len(told)} differences)" if len(told) > 3 else ""
    name = apart[0]
    cure = as_typed(name, then.get(name)) if name.startswith("--") else f"the same {name}"
    raise UsageError(
        f"{part.path} is no part of the work that {first.path} is one of",
        "; ".join(told[:3]) + more,
        f"a run of that part with {cure}, or a join without it",
    )


def _require_apart(one: Part, other: Part) -> None:
    if not _overlap(one.batches, other.batches):
        return
    if one.batches != other.batches:
        raise UsageError(
            "ranges of batches must be the same or apart",
            f"{one} in {one.path}; {other} in {other.path}",
            "--batches 0:8 and 8:16 and the like",
        )
    if _overlap(one.probes, other.probes):
        raise UsageError(
            "two ledgers have the same part",
            f"{one} in {one.path}; {other} in {other.path}",
            f"a join without one of them, or {other.path} run again with other --probes a:b",
        )
