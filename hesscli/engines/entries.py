"""Entrywise estimates of a diagonal, summed over sources, with replicates of their joint error.

An error bar for each entry would not do: what is made of many entries (block means, quantiles,
norms) needs to know how their errors go together. So the engine keeps a few replicates of the
whole error vector: the residuals of every probe around its batch's mean, and of every batch
around the mean of all, summed with random signs (the multiplier bootstrap: Wu 1986, "Jackknife,
bootstrap and other resampling methods in regression analysis", section 7; Liu 1988). Given the
probes, a replicate has mean zero and exactly the covariance that the usual variance estimate
has, and it is made in one pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesscli import randomness, world
from hesscli.engines.diagonal import Diagonal
from hesscli.parameters import Parameters
from hesscli.state import State

MOST_REPLICATES, FEWEST_REPLICATES = 16, 4
REPLICATE_BYTES = 1 << 30
"""Bytes of replicates up to which there are as many as there may be."""
GROUP = 16
"""Estimates of a batch that are made, and centred, together; a power of two."""
_WITHIN, _BETWEEN, _ROUNDED = 0x517, 0xBE7, 0xD16
"""Separate the signs of replicates from other uses of a seed."""


def replicates_for(size: int, dtype: torch.dtype = torch.float32) -> int:
    """Replicates of a vector of so many entries, within and between batches."""
    each = max(1, 2 * dtype.itemsize * size)
    return max(FEWEST_REPLICATES, min(MOST_REPLICATES, REPLICATE_BYTES // each))


def needed_bytes(size: int, dtype: torch.dtype = torch.float32, *, exact: bool = False) -> int:
    """What so many entries of one source take: two rounds of sums, and what is read off.

    Where each batch's are exact, they have no replicates within batches.
    """
    return size * _bytes_each(replicates_for(size, dtype), dtype, exact)


def most_entries(room: int, dtype: torch.dtype = torch.float32, *, exact: bool = False) -> int:
    """For how many of them so many bytes are enough."""
    few, many = (room // _bytes_each(n, dtype, exact) for n in (FEWEST_REPLICATES, MOST_REPLICATES))
    return few if needed_bytes(few, dtype, exact=exact) <= room else many


def _bytes_each(replicates: int, dtype: torch.dtype, exact: bool) -> int:
    return 3 * (8 + (1 if exact else 2) * replicates * dtype.itemsize)


def power_of_two(most: int) -> int:
    """The largest up to a number."""
    return 1 << (most.bit_length() - 1)


def groups(start: int, stop: int, most: int = GROUP) -> Iterator[tuple[int, int]]:
    """Numbers from ``start`` to ``stop`` in groups that end where ``most`` divides.

    So runs that begin elsewhere make the same groups of the same numbers. One number alone, which
    would tell nothing of its error, goes with its neighbours.

    Args:
        start: the first.
        stop: the one after the last.
        most: in a group, a power of two; one or two more where numbers would be alone.
    """
    bounds = [start, *range((start // most + 1) * most, stop, most), stop]
    if most > 1 and len(bounds) > 2 and bounds[1] - bounds[0] == 1:
        del bounds[1]
    if most > 1 and len(bounds) > 2 and bounds[-1] - bounds[-2] == 1:
        del bounds[-2]
    return itertools.pairwise(bounds) if start < stop else iter(())


@dataclass
class _Round:
    """Sums over batches and their estimates; each batch's weight is counted once."""

    total: Tensor
    within: Tensor | None
    between: Tensor
    weights: dict[int, float]
    count: int = 0
    freedom: int = 0

    def add(self, other: _Round) -> None:
        self.total += other.total
        self.between += other.between
        if self.within is not None and other.within is not None:
            self.within += other.within
        self.weights |= other.weights
        self.count += other.count
        self.freedom += other.freedom

    def state_dict(self) -> State:
        """All of it; weights in the order in which batches came."""
        return {
            "total": self.total,
            "within": self.within,
            "between": self.between,
            "batches": list(self.weights),
            "weights": list(self.weights.values()),
            "count": self.count,
            "freedom": self.freedom,
        }

    def load_state_dict(self, state: State) -> None:
        """Be what another was."""
        self.total.copy_(state["total"])
        self.between.copy_(state["between"])
        if self.within is not None:
            self.within.copy_(state["within"])
        self.weights = dict(zip(state["batches"], state["weights"], strict=True))
        self.count, self.freedom = state["count"], state["freedom"]


@dataclass
class BatchSum:
    """A batch's estimates in a round: their sum, and replicates of its error."""

    batch: int
    weight: float
    total: Tensor
    within: Tensor | None
    freedom: int = 0


class Stream:
    """One source's estimates of the diagonal on some parameters.

    Rounds that are not complete count only where there is no other: a batch with more estimates
    than the rest would weigh more than its share. Of many ranks, each keeps what it has added
    itself until they settle: that is the time to send so many sums.

    Args:
        parameters: the entries of each row.
        number: tells the sources of one diagonal apart.
        exact: rows have no noise of their own, and any number of them add up for a batch.
        replicates: of the error.
        dtype: of the replicates.
        device: where to accumulate.
    """

    def __init__(
        self,
        parameters: Parameters,
        number: int,
        *,
        exact: bool,
        replicates: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parameters, self.number, self.exact = parameters, number, exact
        self.replicates, self.dtype, self.device = replicates, dtype, device
        self._done: _Round | None = None
        self._open: _Round | None = None
        self._own: _Round | None = None

    def add_exact(self, batch: int, weight: float, row: Tensor) -> None:
        """Add a batch's own part of the diagonal, ``(d,)``."""
        self.keep(BatchSum(batch, weight, row.double(), None))

    def of_batch(self, batch: int, weight: float) -> BatchSum:
        """An empty sum for a batch's estimates in this round, to be filled and then kept."""
        size = self.parameters.size
        return BatchSum(
            batch,
            weight,
            torch.zeros(size, dtype=torch.float64, device=self.device),
            self._replicates(),
        )

    def add(self, into: BatchSum, block: Tensor, first: int) -> None:
        """Add independent estimates ``(P, d)``, best two or more; ``first`` numbers them.

        Runs that begin elsewhere have the same of the same numbers where they add whole groups.
        """
        for start, stop in groups(first, first + len(block)):
            self._add_group(into, block[start - first : stop - first], start)

    def _add_group(self, into: BatchSum, rows: Tensor, first: int) -> None:
        assert into.within is not None
        count = len(rows)
        into.total += rows.sum(0, dtype=torch.float64)
        if count == 1:  # tells nothing of its error
            return
        signs = self._signs((_WITHIN, self.number, into.batch, first), count)
        scale = into.weight * math.sqrt(count / (count - 1))
        into.within.addmm_(signs, (rows - rows.mean(0)).to(self.dtype), alpha=scale)
        into.freedom += count - 1

    def keep(self, found: BatchSum) -> None:
        """Add what a batch has given."""
        now = self._under_way()
        now.total.add_(found.total, alpha=found.weight)
        signs = self._signs((_BETWEEN, found.batch), 1)
        now.between.addmm_(signs, found.total.to(self.dtype)[None], alpha=found.weight)
        if found.within is not None and now.within is not None:
            now.within += found.within
        now.weights[found.batch] = found.weight
        now.freedom += found.freedom

    def _under_way(self) -> _Round:
        """The round that is added to: of many ranks, this one's part of it."""
        if world.size() > 1:
            self._own = self._own or self._empty()
            return self._own
        self._open = self._open or self._empty()
        return self._open

    def settle(self) -> None:
        """Let every rank have what all have added, unless they are apart and cannot."""
        if world.size() == 1 or world.is_apart():
            return
        own, self._own = self._own, None
        added = [one for one in world.gathered(own and (own.weights, own.freedom)) if one]
        if not added:
            return
        own = own or self._empty()
        for sums in (own.total, own.within, own.between):
            if sums is not None:
                world.added_up(sums)
        own.weights = {batch: weight for each, _ in added for batch, weight in each.items()}
        own.freedom = sum(freedom for _, freedom in added)
        if self._open is None:
            self._open = own
        else:
            self._open.add(own)

    def close_round(self, count: int) -> None:
        """Every batch has had ``count`` more estimates (1 where they are exact)."""
        self.settle()
        if self._open is None:
            return
        self._open.count = count
        if self._done is None:
            self._done = self._open
        else:
            self._done.add(self._open)
        self._open = None

    def drop_round(self) -> None:
        """Forget a round that was broken off."""
        self._open = self._own = None

    def state_dict(self) -> State:
        """The sums, of complete rounds and of one that is under way."""
        self.settle()
        done, now = self._done, self._open
        return {
            "number": self.number,
            "done": None if done is None else done.state_dict(),
            "open": None if now is None else now.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Be where another of the same parameters was; signs go by its number."""
        self.number = state["number"]
        self._done, self._open = self._loaded(state["done"]), self._loaded(state["open"])

    @staticmethod
    def count_of(state: State) -> int:
        """Estimates of each batch in the complete rounds of a state."""
        return 0 if state["done"] is None else int(state["done"]["count"])

    def join(self, state: State, count: int) -> None:
        """Add another's complete rounds: of other batches, or of other estimates of the same.

        Args:
            state: the other's.
            count: estimates of each batch, once all are there.
        """
        found = self._loaded(state["done"])
        assert found is not None  # it has complete rounds
        if self._done is None:
            self.number, self._done = state["number"], found
        else:
            self._done.add(found)
        self._done.count = count

    def _loaded(self, state: State | None) -> _Round | None:
        if state is None:
            return None
        found = self._empty()
        found.load_state_dict(state)
        return found

    def snapshot(self, fraction: float, open_count: int) -> tuple[Tensor, Tensor | None, float]:
        """The diagonal ``(d,)``, replicates of its error ``(G, d)`` and their freedom, if any.

        Args:
            fraction: share of all examples that the batches seen make up.
            open_count: estimates of each batch in a round that was broken off.
        """
        now = self._done or self._open
        assert now is not None  # asked for only once there is something
        count, mass = now.count or open_count, sum(now.weights.values())
        values = now.total / (count * mass)
        noise = None if now.within is None else now.within * (math.sqrt(fraction) / (count * mass))
        batches = len(now.weights)
        freedom = float(now.freedom) if not self.exact else math.inf
        if fraction < 1 and batches == 1:
            return values, noise, 0.0  # one batch tells nothing of others
        if fraction < 1:
            signs = torch.cat([self._signs((_BETWEEN, b), 1) for b in now.weights], dim=1)
            weights = signs.new_tensor(list(now.weights.values()))
            drift = (signs @ weights)[:, None] * values.to(self.dtype)
            scale = math.sqrt((1 - fraction) * batches / (batches - 1)) / mass
            between = (now.between / count - drift) * scale
            noise = between if noise is None else noise + between
            freedom = min(freedom, batches - 1)
        return values, noise, freedom

    def _empty(self) -> _Round:
        return _Round(
            total=torch.zeros(self.parameters.size, dtype=torch.float64, device=self.device),
            within=None if self.exact else self._replicates(),
            between=self._replicates(),
            weights={},
        )

    def _replicates(self) -> Tensor:
        size = self.replicates, self.parameters.size
        return torch.zeros(*size, dtype=self.dtype, device=self.device)

    def _signs(self, words: tuple[int, ...], count: int) -> Tensor:
        """Signs ``(G, count)``: a row for each replicate."""
        size = self.replicates * count
        flat = randomness.rademacher(
            randomness.key(*words), 0, size, dtype=self.dtype, device=self.device
        )
        return flat.view(self.replicates, count)


@dataclass(frozen=True)
class Part:
    """A stream, the share of all examples that it has seen, and its estimates of each batch.

    The last counts only where a first round was broken off.
    """

    stream: Stream
    fraction: float
    count: int


class Entries:
    """A diagonal as a sum of streams.

    Args:
        parameters: whose entries.
        device: where to accumulate.
        dtype: of the replicates: that of the estimates says all that there is to say.
    """

    def __init__(
        self, parameters: Parameters, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.parameters, self.device, self.dtype = parameters, device, dtype
        self.replicates = replicates_for(parameters.size, dtype)
        self._count = 0

    def stream(self, parameters: Parameters, *, exact: bool) -> Stream:
        """A new source, on some of the parameters."""
        self._count += 1
        return Stream(
            parameters,
            self._count,
            exact=exact,
            replicates=self.replicates,
            dtype=self.dtype,
            device=self.device,
        )

    def diagonal(self, parts: Sequence[Part], shift: float) -> Diagonal:
        """The sum of some streams, and of a number that every entry has besides."""
        values = torch.full((self.parameters.size,), shift, dtype=torch.float64, device="cpu")
        noise: Tensor | None = None
        freedom = math.inf
        for part in parts:
            value, error, own = part.stream.snapshot(part.fraction, part.count)
            _embed(values[None], value[None], self.parameters, part.stream.parameters)
            if error is not None:
                if noise is None:
                    noise = torch.zeros(
                        self.replicates, len(values), dtype=self.dtype, device="cpu"
                    )
                _embed(noise, error, self.parameters, part.stream.parameters)
            freedom = min(freedom, own)
        if freedom:
            freedom = 1 / (1 / self.replicates + 1 / max(freedom, 1))
        return Diagonal(values=values, noise=noise, freedom=freedom)

    def rounded(self, found: Diagonal, error: Tensor, parameters: Parameters) -> Diagonal:
        """A noisy diagonal whose replicates have a rounding error besides.

        Args:
            found: the diagonal.
            error: the size of an entry's error, for the entries of some parameters.
            parameters: these.
        """
        assert found.noise is not None  # what is drawn at random has some
        size = torch.zeros(1, len(found.values), dtype=self.dtype, device="cpu")
        _embed(size, error[None].to(self.dtype), self.parameters, parameters)
        noise = found.noise.clone()
        for number, row in enumerate(noise):
            stream = randomness.key(_ROUNDED, number)
            signs = randomness.rademacher(stream, 0, len(row), dtype=self.dtype, device=row.device)
            row += signs * size[0]
        return replace(found, noise=noise)


def _embed(into: Tensor, rows: Tensor, whole: Parameters, part: Parameters) -> None:
    """Add rows over some parameters to rows over all of them."""
    rows = rows.to(into.device)
    places = dict(zip(whole.names, whole.places(), strict=True))
    for name, place in zip(part.names, part.places(), strict=True):
        into[:, places[name]] += rows[:, place]
