"""The world of a run: this process alone, or the ranks that torchrun has started.

Every rank is a plain replica: it has loaded the same model and the same examples, and takes the
same decisions in the same order. What they deal out are batches. So a run is of two kinds of
stretches. *Together* all ranks do the same, and meet in collectives; *apart* each is busy with
batches of its own, and what one of them raises, all raise at the stretch's end. Tables by batch
are gathered, so that they are the same to the last bit in any world; vectors are added up, whose
order of additions a world has its own of. Of many long vectors each rank has its columns.

Everything that ranks may see differently is settled by one of them, or by all: the time, signals,
memory that is free. A rank that is alone imports no ``torch.distributed`` and pays nothing.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from hesscli.errors import HesscliError, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long ranks wait for one that says nothing. One whose process ends is missed at once."""
_ROLL_CALL, _ASKED = 3.0, 0.1
"""Seconds in which those who are left make themselves known, so that a missing one can be named,
and between two looks for them."""
_LAUNCHED = "TORCHELASTIC_RUN_ID"
"""What torchrun sets in the environment of all that it starts."""


class LostError(HesscliError):
    """A rank has ended, or says nothing any more."""


@dataclass
class _World:
    """Who there is; ``sums`` counts what was made of all ranks' parts, ``numbers`` its entries."""

    rank: int = 0
    size: int = 1
    apart: bool = False
    signalled: bool = False
    sums: int = 0
    numbers: int = 0


_ALONE = _World()
_here = _ALONE
_store: Any = None
_joins = 0


# -- Who there is ----------------------------------------------------------------------------------


def size() -> int:
    """How many ranks there are."""
    return _here.size


def place() -> int:
    """Which of them this is, from 0 on."""
    return _here.rank


def is_first() -> bool:
    """Whether this is rank 0, the one that speaks and writes."""
    return _here.rank == 0


def is_apart() -> bool:
    """Whether ranks are busy with batches of their own, and cannot meet."""
    return _here.apart


def neighbours() -> int:
    """Ranks on this machine, which share its memory."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else 1


def sums() -> tuple[int, int]:
    """How many tensors were made of all ranks' parts so far, and their entries in all."""
    return _here.sums, _here.numbers


def launched() -> int:
    """How many ranks torchrun has started, this process among them; 1 where it has not."""
    return int(os.environ.get("WORLD_SIZE", 1)) if _LAUNCHED in os.environ else 1


def is_launched() -> bool:
    """Whether torchrun has started this process, and others beside it."""
    return launched() > 1


def gain(batches: int, ranks: int | None = None) -> float:
    """How many times as fast so many ranks are with so many batches, none of which is cut.

    Args:
        batches: of equal size.
        ranks: default those that torchrun has started.
    """
    return batches / -(-batches // (launched() if ranks is None else ranks))


def is_silent() -> bool:
    """Whether another rank speaks for this process."""
    return is_launched() and os.environ.get("RANK") != "0"


@contextmanager
def joined(patience: timedelta = PATIENCE) -> Iterator[None]:
    """Be one of the ranks that torchrun has started, if it has; on a GPU of its own.

    Args:
        patience: how long a rank that says nothing is waited for.
    """
    global _here, _store, _joins
    if not is_launched():
        yield
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    with _missing():
        found, rank, count = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
        _joins += 1
        _store = dist.PrefixStore(f"hesscli/{_joins}", found)  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, store=_store, rank=rank, world_size=count, timeout=patience
        )
    _here = _World(rank=rank, size=count)
    try:
        yield
    finally:
        _here = _ALONE
        with suppress(RuntimeError):  # of others that have ended
            dist.destroy_process_group()


# -- Together: what all ranks call at once, and in the same order ----------------------------------


def gathered(value: T) -> list[T]:
    """What every rank has, by rank."""
    if _here.size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * _here.size
    with _missing():
        dist.all_gather_object(found, value)
    return found


def decided(value: T) -> T:
    """What rank 0 has."""
    if _here.size == 1:
        return value
    import torch.distributed as dist

    told = [value if _here.rank == 0 else None]
    with _missing():
        dist.broadcast_object_list(told, src=0)
    return told[0]  # type: ignore[return-value]


def added_up(vector: Tensor) -> Tensor:
    """The sum of every rank's tensor, in its place: the one collective that a product takes."""
    if _here.size == 1:
        return vector
    import torch.distributed as dist

    with _missing():
        dist.all_reduce(vector)
    _count(vector)
    return vector


def summed(sums: Tensor) -> Tensor:
    """The sum of every rank's few numbers, added rank by rank: the same on all to the last bit."""
    if _here.size == 1 or not sums.numel():
        return sums
    import torch.distributed as dist

    every = sums.new_empty(_here.size, *sums.shape)
    with _missing():
        dist.all_gather(list(every), sums)
    _count(every)
    return every.sum(0)


def places(columns: int) -> list[slice]:
    """Which of so many columns each rank has: as many as the others, or one more."""
    cuts = [columns * rank // _here.size for rank in range(_here.size + 1)]
    return [slice(*cut) for cut in pairwise(cuts)]


def completed(tensor: Tensor, places: Sequence[slice]) -> Tensor:
    """With the entries that each rank has of it, all others' in their place.

    Args:
        tensor: of which this rank has its own entries along the first dimension.
        places: of every rank's, by rank.
    """
    if _here.size == 1:
        return tensor
    import torch.distributed as dist

    with _missing():
        for rank, place in enumerate(places):
            if place.start < place.stop:
                dist.broadcast(tensor[place], src=rank)
    _count(tensor)
    return tensor


def _count(found: Tensor) -> None:
    _here.sums += 1
    _here.numbers += found.numel()


def exchanged(row: Tensor, widths: Sequence[int], senders: Sequence[bool]) -> Tensor:
    """Of every sender's row the entries that are this rank's, by rank.

    Args:
        row: of one's own, on the CPU or a GPU; empty where this rank sends none.
        widths: entries of a row that each rank has.
        senders: which ranks send one.
    """
    import torch.distributed as dist

    own, none = widths[_here.rank], [0] * _here.size
    found = row.new_empty(sum(senders) * own)
    taken = [own * sends for sends in senders]
    given = list(widths) if senders[_here.rank] else none
    with _missing():
        dist.all_to_all_single(found, row, taken, given)
    return found.view(-1, own)


def least(number: int) -> int:
    """The least of every rank's number; apart from the others, this one's."""
    return number if _here.size == 1 or _here.apart else -int(_most(-float(number))[0])


def any_of(flag: bool) -> bool:
    """Whether any rank's is set."""
    return flag if _here.size == 1 else bool(_most(float(flag))[0])


def at_the_clock(wants_no_more: bool, seconds: float) -> tuple[bool, float]:
    """Whether any rank wants no more, or has had a signal, and the time by rank 0's clock.

    A signal is heeded once.
    """
    stop = wants_no_more or _here.signalled
    _here.signalled = False
    if _here.size == 1 or _here.apart:
        return stop, seconds
    any_stops, now = _most(stop, seconds if is_first() else 0.0)
    return bool(any_stops), now


def _most(*numbers: float) -> list[float]:
    """The largest of every rank's numbers, one by one."""
    import torch
    import torch.distributed as dist

    told = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    with _missing():
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
    found: list[float] = told.tolist()
    return found


# -- Apart: what each rank does with batches of its own --------------------------------------------


def share(items: Sequence[T]) -> Sequence[T]:
    """What falls to this rank: every so many-th."""
    return items if _here.size == 1 else items[_here.rank :: _here.size]


def turns(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many at a time as there are ranks; the last turn may leave some without one."""
    for start in range(0, len(items), _here.size):
        yield items[start : start + _here.size]


def own(turn: Sequence[T]) -> T | None:
    """Of one turn, what falls to this rank, if anything does."""
    return turn[_here.rank] if _here.rank < len(turn) else None


@contextmanager
def apart() -> Iterator[None]:
    """A stretch in which each rank is busy by itself; what one raises, all raise at its end."""
    if _here.size == 1 or _here.apart:
        yield
        return
    error: BaseException | None = None
    _here.apart = True
    try:
        yield
    except BaseException as raised:
        error = raised
    finally:
        _here.apart = False
    _settle(error)


def abreast(steps: Generator[None, None, T] | None) -> Generator[None, None, T | None]:
    """Take steps of one's own while others take theirs, as many as the longest of all has.

    Args:
        steps: this rank's, if it has any.

    Returns:
        What they come to.
    """
    if _here.size == 1:
        return None if steps is None else (yield from steps)
    found: T | None = None
    while True:
        error: BaseException | None = None
        _here.apart = True
        try:
            if steps is not None:
                next(steps)
        except StopIteration as end:
            found, steps = end.value, None
        except BaseException as raised:
            error = raised
        finally:
            _here.apart = False
        if not _settle(error, steps is not None):
            return found
        yield


def _settle(error: BaseException | None, goes_on: bool = False) -> bool:
    """Whether any rank goes on; the first rank's error, where there is one, is everybody's."""
    failed, more = _most(error is not None, goes_on)
    if failed:
        errors = gathered(_portable(error))
        first = next(i for i, each in enumerate(errors) if each is not None)
        raise error if error is not None and first == _here.rank else errors[first]  # type: ignore[misc]
    return bool(more)


def _portable(error: BaseException | None) -> BaseException | None:
    """An error that others can be told of."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of any kind: errors may be a library's or the user's
        if isinstance(error, HesscliError):
            plain = HesscliError(error.what, error.got, error.hint, error.frames)
            plain.exit_code = error.exit_code
            return plain
        return RuntimeError(f"{type(error).__name__}: {first_line(error)}")
    return error


# -- Signals, and ranks that are lost --------------------------------------------------------------


def takes_note() -> bool:
    """Take note of a signal to end, which all ranks heed when they look at the clock together.

    Returns:
        Whether that is so; a rank that is alone ends where it is.
    """
    _here.signalled = _here.size > 1
    return _here.signalled


def is_signalled() -> bool:
    """Whether this rank has had a signal to end."""
    return _here.signalled


def may_speak() -> bool:
    """Whether this process is to say what has gone wrong, which one is to say once.

    It is rank 0, or else, where that does not, the first of the others to ask.
    """
    if _store is None:
        return not is_silent()
    with suppress(RuntimeError):  # the store may have ended with torchrun
        if is_silent() and _comes("spoken"):
            return False
        return int(_store.add("spoken", 1)) == 1
    return not is_silent()


@contextmanager
def _missing() -> Iterator[None]:
    """Say in plain words what a collective that fails means."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(first_line(error)) from error


def _comes(key: str) -> bool:
    """Whether a rank makes this known within the time of a roll call."""
    end = time.monotonic() + _ROLL_CALL
    while not (found := bool(_store.check([key]))) and time.monotonic() < end:
        time.sleep(_ASKED)
    return found


def _lost(why: str) -> LostError:
    """Who does not answer a roll call."""
    missing: list[int] = []
    with suppress(RuntimeError, AttributeError):  # there may be no store yet, or no more
        _store.set(f"here/{_here.rank}", "")
        missing += [rank for rank in range(_here.size) if not _comes(f"here/{rank}")]
    ranks = ", ".join(map(str, missing))
    return LostError(
        f"rank {ranks} of {_here.size} has ended or answers no more"
        if missing
        else "a rank has ended or answers no more",
        why,
        "what it said itself, above; then the same command with --resume, or on fewer ranks",
    )
