"""Frozen data: each example once, drawn uniformly, never changing, and named by a hash."""

from __future__ import annotations

import random
from collections import Counter, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from hesscli.errors import InputError, UsageError
from hesscli.problem.batches import size_of, split_batch, tensors_of
from hesscli.problem.freezing import MIN_GROUPS, FrozenData, freeze
from hesscli.problem.sources import TensorRows
from hesscli.results import Snapshot
from hesscli.vocabulary import Selection

ALL = Selection(None)


@dataclass
class Verdict:
    """Decides beforehand what a trial would find out, and notes what it was shown."""

    separable: bool = True
    wants_more: bool = True
    seen: list[int] = field(default_factory=list)

    def see(self, batch: Any, part: Any) -> None:
        self.seen.append(size_of(batch))

    def grows(self, batch: Any, own: int) -> bool:
        return True


def _freeze(
    source: Any, selection: Selection = ALL, *, whole: bool = False, **options: Any
) -> FrozenData:
    """Cut anew, or in ``whole`` batches as they came."""
    options = {"batch_size": 8, "seed": 0, "trial": Verdict(not whole), **options}
    return freeze(source, selection, **options)


def _numbers(count: int) -> Tensor:
    return torch.arange(count)[:, None]


def _kept(data: FrozenData) -> list[int]:
    """The first column of the first tensor of all kept examples."""
    return [int(row[0]) for batch in data.batches for row in next(tensors_of(batch))]


def _legacy() -> list[int]:
    state: Any = np.random.get_state()
    return [int(word) for word in state[1]]


class Augmented(Dataset[tuple[Tensor, int]]):
    """Counts its fetches, and adds noise from every global generator."""

    def __init__(self, count: int) -> None:
        self.count, self.fetched = count, Counter[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.fetched[index] += 1
        noise = 0.1 * torch.rand(3) + 0.1 * random.random() + 0.1 * np.random.random()
        return index + noise.float(), index


class Stream(IterableDataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return iter(_numbers(self.count))


# -- map-style ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_indices_are_fetched_once_and_frozen_but_a_few_twice(wrapped: bool) -> None:
    dataset = Augmented(100)
    source: Any = DataLoader(dataset, batch_size=10, shuffle=True) if wrapped else dataset
    data = _freeze(source)
    assert sorted(dataset.fetched) == list(range(100))
    assert Counter(dataset.fetched.values()) == {1: 96, 2: 4}
    assert data.changing  # by the noise that is added
    assert not _freeze(TensorDataset(_numbers(100))).changing
    assert sorted(_kept(data)) == list(range(100))
    assert all(torch.equal(x[:, 0].long(), y) for x, y in data.batches)
    assert (data.count, data.available, data.sliceable) == (100, 100, True)


def test_a_draw_fetches_only_what_it_keeps() -> None:
    dataset = Augmented(100)
    data = _freeze(dataset, Selection(30))
    assert dataset.fetched.total() == 34
    assert sorted(dataset.fetched) == sorted(_kept(data))
    assert (data.count, data.available) == (30, 100)
    assert sorted(_kept(data)) != list(range(30))
    assert sorted(_kept(_freeze(Augmented(100), Selection(30, first=True)))) == list(range(30))


def test_the_seed_decides_everything_and_global_generators_nothing() -> None:
    def frozen(seed: int) -> str:
        loader = DataLoader(Augmented(60), batch_size=7, shuffle=True)
        return _freeze(loader, Selection(40), seed=seed).sha256

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), _legacy(), torch.get_rng_state()
    first = frozen(3)
    after = random.getstate(), _legacy(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    torch.manual_seed(2)
    assert frozen(3) == first
    assert frozen(4) != first


def test_the_collate_function_is_the_loaders() -> None:
    def collate(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in items]), "y": torch.tensor([y for _, y in items])}

    data = _freeze(DataLoader(Augmented(20), batch_size=5, collate_fn=collate))
    assert all(set(batch) == {"x", "y"} for batch in data.batches)
    assert sorted(_kept(data)) == list(range(20))


def test_samplers_that_choose_examples_are_obeyed() -> None:
    dataset = TensorDataset(_numbers(50))
    subset = DataLoader(dataset, batch_size=4, sampler=SubsetRandomSampler(range(0, 50, 2)))
    data = _freeze(subset)
    assert sorted(_kept(data)) == list(range(0, 50, 2))
    assert data.available == 25
    one = WeightedRandomSampler([0.0] * 7 + [1.0] + [0.0] * 42, num_samples=9)
    assert _kept(_freeze(DataLoader(dataset, batch_size=4, sampler=one))) == [7] * 9
    # Batches made elsewhere leave the loader's own sampler at its default.
    chosen = DataLoader(dataset, batch_sampler=[[1, 3], [5]])
    assert sorted(_kept(_freeze(chosen))) == [1, 3, 5]
    shuffled = DataLoader(dataset, sampler=RandomSampler(dataset), batch_size=4, drop_last=True)
    assert sorted(_kept(_freeze(shuffled))) == list(range(50))


def test_loaders_without_batching_of_their_own_hold_batches() -> None:
    ready = [(_numbers(6), torch.zeros(6)), (_numbers(6) + 6, torch.ones(6))]

    class Batched(Dataset[Any]):
        def __len__(self) -> int:
            return len(ready)

        def __getitem__(self, index: int) -> Any:
            return ready[index]

    data = _freeze(DataLoader(Batched(), batch_size=None))
    assert sorted(_kept(data)) == list(range(12))
    assert data.available == 12
    streamed = _freeze(DataLoader(Stream(37), batch_size=5))
    assert sorted(_kept(streamed)) == list(range(37))


# -- iterables ---------------------------------------------------------------------------------


def test_an_iterable_is_read_once_and_keeps_pairs_together() -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        buffer = torch.empty(5, 1, dtype=torch.long)
        for start in range(0, 45, 5):
            buffer.copy_(_numbers(5) + start)  # as loaders do that reuse their memory
            yield buffer, buffer[:, 0] ** 2

    data = _freeze(batches(), Selection(33))
    assert data.count == 33
    assert data.available == 45
    assert len(set(_kept(data))) == 33
    assert all(torch.equal(x[:, 0] ** 2, y) for x, y in data.batches)


def test_the_reservoir_is_uniform() -> None:
    """Each of 12 examples is among the 4 kept equally often, over 1,200 seeds."""
    batches = [_numbers(12)[:5], _numbers(12)[5:]]
    counts = np.zeros(12)
    for seed in range(1200):
        counts[_kept(_freeze(batches, Selection(4), seed=seed))] += 1
    assert counts.sum() == 4800
    # Without replacement the counts vary less: by (1 − 4/12) · 12/11 of a multinomial's.
    statistic = float(((counts - 400) ** 2 / 400).sum()) / ((1 - 4 / 12) * 12 / 11)
    assert stats.chi2.sf(statistic, 11) > 1e-3
    assert stats.chi2.cdf(statistic, 11) > 1e-3


@pytest.mark.parametrize("whole", [False, True])
def test_first_stops_reading(whole: bool) -> None:
    read = 0

    def batches() -> Iterator[Tensor]:
        nonlocal read
        while True:
            read += 1
            yield _numbers(4) + 4 * (read - 1)

    data = _freeze(batches(), Selection(10, first=True), whole=whole)
    assert sorted(_kept(data)) == list(range(12 if whole else 10))
    assert data.available is None
    assert read <= 4
    ended = _freeze([_numbers(10)], Selection(10, first=True), whole=whole)
    assert ended.available == 10


def test_whole_batches_are_drawn_as_they_came() -> None:
    batches = [_numbers(4) + 4 * i for i in range(20)]
    data = _freeze(batches, Selection(10), whole=True)
    assert len(data.batches) == 3
    assert data.available == 80
    assert {tuple(b[:, 0].tolist()) for b in data.batches} <= {
        tuple(b[:, 0].tolist()) for b in batches
    }
    taken = Counter(
        int(batch[0, 0]) // 4
        for seed in range(400)
        for batch in _freeze(batches, Selection(4), whole=True, seed=seed).batches
    )
    assert stats.chisquare([taken[i] for i in range(20)]).pvalue > 1e-3


def test_later_changes_of_the_users_tensors_change_nothing() -> None:
    source = [_numbers(6)]
    for whole in (False, True):
        data = _freeze(source, whole=whole)
        source[0] += 100
        assert sorted(_kept(data)) == list(range(6))
        source[0] -= 100


def test_what_cannot_be_cut_is_kept_whole() -> None:
    batches = [
        {"x": _numbers(3), "edges": torch.zeros(2, 7)},
        {"x": _numbers(5), "edges": torch.zeros(2, 4)},
    ]
    data = _freeze(batches)
    assert not data.sliceable
    assert data.counts == (3, 5)
    assert data.available == 8


@pytest.mark.parametrize("labels", [list, np.array, tuple])
def test_labels_outside_tensors_stay_with_their_examples(labels: Any) -> None:
    """Four batches of 16 rows: cut to groups of 4, whole lists of labels would be all wrong."""
    values = [list(range(start, start + 16)) for start in range(0, 64, 16)]
    data = _freeze([(torch.tensor(v)[:, None], labels(v)) for v in values])
    for inputs, targets in data.batches:
        assert inputs[:, 0].tolist() == torch.as_tensor(targets).tolist()
    assert sorted(_kept(data)) == list(range(64))


def test_labels_outside_tensors_are_hashed() -> None:
    one, other = (_freeze([(_numbers(2), labels)]) for labels in ([0, 1], [1, 0]))
    assert one.sha256 != other.sha256


def test_named_tuples_and_lists_stay_what_they_are() -> None:
    pair = namedtuple("pair", ["image", "label"])
    data = _freeze([pair(_numbers(8), _numbers(8)[:, 0])])
    assert all(torch.equal(b.image[:, 0], b.label) for b in data.batches)
    assert isinstance(_freeze([[_numbers(8), _numbers(8)]]).batches[0], list)


def test_kept_examples_need_no_gradient() -> None:
    data = _freeze([torch.ones(4, 2, requires_grad=True)])
    assert not any(t.requires_grad for batch in data.batches for t in tensors_of(batch))


# -- groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 16, 17, 100, 1000])
@pytest.mark.parametrize("streamed", [False, True])
def test_groups_are_many_and_nearly_equal(count: int, streamed: bool) -> None:
    source: Any = [_numbers(count)] if streamed else TensorRows(_numbers(count))
    data = _freeze(source, batch_size=48)
    assert sum(data.counts) == count
    assert len(data.counts) == max(min(MIN_GROUPS, count), -(-count // 48))
    assert max(data.counts) <= 48
    assert max(data.counts) - min(data.counts) <= 1
    assert sorted(_kept(data)) == list(range(count))
    if count > 20:
        assert _kept(data) != list(range(count))


def test_mixed_examples_stay_in_the_users_batches() -> None:
    rows = TensorRows(_numbers(100))
    data = _freeze(rows, batch_size=48, whole=True)
    assert data.counts == (48, 48, 4)
    assert sorted(_kept(data)) == list(range(100))
    assert _kept(data) != list(range(100))
    listed = [_numbers(30), _numbers(50) + 30]
    assert _freeze(listed, batch_size=48, whole=True).counts == (30, 50)


def test_mixed_examples_stay_in_the_loaders_batches() -> None:
    """Neighbours where it does not shuffle; its size, unless another is asked for."""
    dataset = TensorDataset(_numbers(50))
    in_order = DataLoader(dataset, batch_size=20)
    data = _freeze(in_order, batch_size=None, whole=True)
    assert data.counts == (20, 20, 10)
    assert _kept(data) == list(range(50))
    one = _kept(_freeze(in_order, Selection(20), batch_size=None, whole=True, seed=3))
    assert one in [list(range(start, min(start + 20, 50))) for start in (0, 20, 40)]
    assert _freeze(in_order, batch_size=25, whole=True).counts == (25, 25)
    shuffled = DataLoader(dataset, batch_size=20, shuffle=True)
    assert _freeze(shuffled, batch_size=None, whole=True).counts == (20, 20, 10)
    assert sorted(_kept(_freeze(shuffled, batch_size=None, whole=True))) == list(range(50))
    dropping = DataLoader(dataset, batch_size=20, drop_last=True)
    assert _freeze(dropping, batch_size=None, whole=True).counts == (20, 20)
    assert _freeze(dropping).count == 40  # the last ten never come
    again = DataLoader(dataset, batch_size=20, drop_last=True, shuffle=True)
    assert _freeze(again).count == 50  # any of them may
    some = DataLoader(dataset, batch_size=4, sampler=RandomSampler(dataset, num_samples=16))
    assert (_freeze(some).count, _freeze(some).available) == (16, 16)


def test_trials_are_shown_the_users_batches() -> None:
    for source, shown in (
        (TensorRows(_numbers(50)), [8] * 6 + [2]),
        (DataLoader(TensorDataset(_numbers(50)), batch_size=20), [20, 20, 10]),
        ([_numbers(30), _numbers(20)], [30, 20]),
        ([_numbers(1)] * 10, [1] * 10 + [8]),  # and some together
        (DataLoader(TensorDataset(_numbers(10)), batch_size=1), [1] * 10 + [8]),
    ):
        trial = Verdict()
        _freeze(source, batch_size=None if isinstance(source, DataLoader) else 8, trial=trial)
        assert trial.seen == shown
    content = Verdict(wants_more=False)
    data = _freeze(TensorRows(_numbers(50)), trial=content)
    assert content.seen == [8]
    assert sorted(_kept(data)) == list(range(50))


def test_the_hash_names_content_order_and_seed() -> None:
    rows = TensorRows(_numbers(64))
    assert _freeze(rows).sha256 == _freeze(rows).sha256
    hashes = {_freeze(rows, seed=seed).sha256 for seed in range(20)}
    hashes |= {_freeze(rows, batch_size=2).sha256, _freeze(TensorRows(_numbers(64) + 1)).sha256}
    hashes |= {_freeze(TensorRows(_numbers(64).float())).sha256}
    assert len(hashes) == 23


def test_size_in_memory_is_counted() -> None:
    data = _freeze(TensorRows(torch.zeros(10, 3, dtype=torch.float64), torch.zeros(10)))
    assert data.nbytes == 10 * 3 * 8 + 10 * 4


def test_progress_counts_examples() -> None:
    seen: list[Snapshot] = []

    def observe(snapshot: Snapshot) -> bool:
        seen.append(snapshot)
        return False

    _freeze(TensorRows(_numbers(64)), Selection(32), observe=observe)
    assert [(s.phase, s.done, s.total) for s in seen][-1] == ("reading data", 32, 32)
    seen.clear()
    _freeze([_numbers(5)] * 3, observe=observe)
    assert [s.done for s in seen] == [5, 10, 15]


@pytest.mark.parametrize("streamed", [False, True])
def test_an_observer_can_stop_the_reading(streamed: bool) -> None:
    seen: list[float | None] = []

    def observe(snapshot: Snapshot) -> bool:
        seen.append(snapshot.done)
        return len(seen) == 2

    source: Any = [_numbers(4)] * 9 if streamed else TensorRows(_numbers(64))
    with pytest.raises(KeyboardInterrupt):
        _freeze(source, observe=observe)
    assert len(seen) == 2


# -- refusals ----------------------------------------------------------------------------------


def _refusal(source: Any, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        _freeze(source, **options)
    return caught.value


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "empty", [[], TensorRows(_numbers(0)), DataLoader(Stream(0)), Augmented(0)]
)
def test_no_data(empty: Any, whole: bool) -> None:
    assert _refusal(empty, whole=whole).what == "the data set is empty"


def test_ragged_batches_stay_whole_or_are_refused_with_both_shapes() -> None:
    ragged = [torch.zeros(20, 7), torch.zeros(20, 9)]
    assert _freeze(ragged).counts == (20, 20)  # seen in time, and not cut
    error = _refusal(ragged, selection=Selection(20))
    assert error.what == "the iterable's batches differ in kind"
    assert "(7,)" in error.got
    assert "(9,)" in error.got
    assert "padded" in error.hint


def test_batches_that_change_their_kind_are_refused() -> None:
    """Not dropped: keeping only what came after would be a biased sample, in silence."""
    batches = [(_numbers(4), _numbers(4)), (_numbers(4), torch.tensor(1.0))]
    assert _freeze(batches).counts == (4, 4)
    error = _refusal(batches, selection=Selection(4))
    assert error.what == "the iterable's batches differ in kind"
    assert "after 4 examples" in error.got


@pytest.mark.parametrize("source", [["a", "b"], [("a", "b")], [{}], [None]])
def test_batches_without_tensors(source: Any) -> None:
    assert _refusal(source).what == "a batch holds no tensor"


@pytest.mark.parametrize("source", [3, None, "data", {"train": 1}])
def test_no_data_source(source: Any) -> None:
    error = _refusal(source)
    assert error.what == "not a data source"
    assert error.got == type(source).__name__


def test_selections() -> None:
    assert Selection.parse("all") == Selection(None)
    assert Selection.parse(7) == Selection(7)
    assert Selection.parse("4096") == Selection()
    assert Selection.parse("first:12") == Selection(12, first=True)
    for wrong in ("0", "-3", "first:0", "first:", "first:all", ":5", "last:5", "", "1.5", 2.5, 0):
        with pytest.raises(UsageError) as caught:
            Selection.parse(wrong)  # type: ignore[arg-type]
        assert repr(wrong) in caught.value.got


# -- tensors of a file -------------------------------------------------------------------------


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    save_file({"x": _numbers(9), "z": 2 * _numbers(9), "y": torch.arange(9)}, path)
    rows = TensorRows.from_file(path, ["x", "z"], "y")
    assert len(rows) == 9
    x, z, y = rows[torch.tensor([4, 2])]
    assert (x[:, 0].tolist(), z[:, 0].tolist(), y.tolist()) == ([4, 2], [8, 4], [4, 2])
    assert len(TensorRows.from_file(path, ["x"], None)[0]) == 1


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    save_file({"x": _numbers(9), "y": torch.arange(8), "scale": torch.tensor(2.0)}, path)

    def refusal(where: Path, inputs: list[str], targets: str | None) -> InputError:
        with pytest.raises(InputError) as caught:
            TensorRows.from_file(where, inputs, targets)
        return caught.value

    missing = refusal(path, ["x"], "labels")
    assert missing.what == "data.safetensors has no tensor 'labels'"
    assert missing.got == "tensors scale, x, y"
    for names in (["x"], "y"), (["x"], "scale"), (["scale"], None):
        error = refusal(path, *names)
        assert error.what == "the data's row counts differ"
        assert all(name in error.got for name in names[0])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors here")
    for where in (tmp_path / "absent.safetensors", broken, tmp_path):
        error = refusal(where, ["x"], None)
        assert error.what == "the data file cannot be read"
        assert str(where) in error.got


# -- what a model gets ------------------------------------------------------------------------


def test_inputs_and_targets() -> None:
    x, z, y = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    assert split_batch((x, y)) == ((x,), y)
    assert split_batch([x, z, y]) == ((x, z), y)
    assert split_batch({"image": x, "labels": y}) == ((x,), y)
    assert split_batch({"a": x, "b": z, "targets": y}) == ({"a": x, "b": z}, y)
    for wrong in (x, (x,), {"targets": y}, {"a": x, "b": y}):
        with pytest.raises(InputError, match="a batch needs inputs and targets"):
            split_batch(wrong)
