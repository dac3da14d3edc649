"""The ring of rows: what is in it, in memory or in a file, and what it refuses."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mfac_truth import distance, rows_of

from hesscli.engines.mfac import GradientWindow, Gram
from hesscli.engines.mfac.gram import inner_rounding
from hesscli.errors import ExitCode, UnsoundError, UsageError
from hesscli.memory import available_bytes
from hesscli.sums import rounding_of_sum

ROWS = rows_of("normal", 23, 60).float()
GIB = 2**30


@pytest.mark.parametrize("step", [1, 2, 5, 8, 23])
@pytest.mark.parametrize("in_file", [False, True])
def test_the_oldest_row_goes_first(tmp_path: Path, step: int, in_file: bool) -> None:
    """Row i is in slot i mod 8, whether it came alone or with others."""
    with GradientWindow(8, 60, path=tmp_path / "w" if in_file else None) as window:
        for start in range(0, len(ROWS), step):
            window.extend(ROWS[start : start + step])
            pushed = min(start + step, len(ROWS))
            kept = range(max(0, pushed - 8), pushed)
            assert window.count == len(kept)
            for i in kept:
                assert torch.equal(window.rows[i % 8], ROWS[i])
            assert window.mean_square() == pytest.approx(
                float(ROWS[list(kept)].double().square().sum(1).mean()), rel=1e-14
            )


def test_push_says_where() -> None:
    window = GradientWindow(3, 60)
    assert [window.push(row) for row in ROWS[:8]] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert torch.equal(window.tile(5, 9), ROWS[[6, 7, 5], 5:9])
    assert window.nbytes == 3 * 60 * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite(bad: float) -> None:
    """Nothing of a block with such a row is kept."""
    window = GradientWindow(4, 60)
    window.extend(ROWS[:6])
    before = window.rows.clone(), window.mean_square(), window.pushes
    poisoned = ROWS[6:9].clone()
    poisoned[1, 59] = bad
    for attempt in (lambda: window.push(poisoned[1]), lambda: window.extend(poisoned)):
        with pytest.raises(UnsoundError, match="a gradient is not finite") as caught:
            attempt()
        assert caught.value.exit_code is ExitCode.UNSOUND
    assert "row 7" in caught.value.got
    assert torch.equal(window.rows, before[0])
    assert (window.mean_square(), window.pushes) == before[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_long_row_is_squared_to_its_last_entry(dtype: torch.dtype) -> None:
    """Sums of small whole numbers are exact in float64, in whatever order."""
    length = 300_007
    rows = (torch.arange(3 * length) % 13 - 6).view(3, length)
    window = GradientWindow(3, length, dtype=dtype)
    window.extend(rows.to(dtype))
    expected = float(rows.square().sum(1).double().mean())
    # The root of a part's squares is rounded, and squared again.
    assert window.mean_square() == pytest.approx(expected, rel=1e-14)
    poisoned = rows.to(dtype)
    poisoned[2, -1] = math.nan
    with pytest.raises(UnsoundError, match="not finite"):
        window.extend(poisoned)


def test_a_row_whose_length_is_beyond_its_dtype_is_finite() -> None:
    window = GradientWindow(1, 60)
    window.push(torch.full((60,), 1e38))
    assert window.mean_square() == pytest.approx(60 * float(torch.tensor(1e38)) ** 2, rel=1e-14)


def test_a_row_that_its_dtype_cannot_hold() -> None:
    with pytest.raises(UnsoundError, match="not finite"):
        GradientWindow(4, 1).push(torch.tensor([1e39], dtype=torch.float64))


def test_what_cannot_be() -> None:
    for rows, columns in ((0, 5), (-1, 5), (5, 0)):
        with pytest.raises(UsageError, match="room for a row"):
            GradientWindow(rows, columns)
    with pytest.raises(UsageError, match="no dtype"):
        GradientWindow(4, 4, dtype=torch.int64)
    window = GradientWindow(4, 60)
    for row in (torch.zeros(59), torch.zeros(61), torch.zeros(()), torch.zeros(1, 60)):
        with pytest.raises(UsageError, match="wrong length"):
            window.push(row)
    with pytest.raises(UsageError, match="the window is empty"):
        window.mean_square()


def test_more_than_there_is_memory_for() -> None:
    """Refused before any is taken, with flags that would fit."""
    columns, room = 10**6, available_bytes()
    rows = room // (3 * columns)  # too many in float32, but not in bfloat16
    with pytest.raises(UsageError, match="larger than the memory") as caught:
        GradientWindow(rows, columns)
    assert caught.value.exit_code is ExitCode.USAGE
    flags = caught.value.hint.split()
    assert flags[0] == "--window"
    assert 0.8 * room < 4 * columns * int(flags[1].rstrip(",")) < 0.95 * room
    others = "--window-dtype bfloat16, --window-file FILE or 2 ranks with as much memory each"
    assert others in caught.value.hint
    with pytest.raises(UsageError) as caught:
        GradientWindow(4, room)
    assert caught.value.hint == "--window-file FILE or 18 ranks with as much memory each"


def test_available_bytes() -> None:
    assert 0 < available_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_bytes("cpu") == pytest.approx(available_bytes(torch.device("cpu")), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_file_is_like_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = rows_of("normal", 11, 5000)
    path = tmp_path / "window"
    with GradientWindow(8, 5000, dtype=dtype, path=path) as stored:
        plain = GradientWindow(8, 5000, dtype=dtype)
        for window in (stored, plain):
            window.extend(rows)
        assert torch.equal(stored.rows, plain.rows)
        x = rows_of("normal", 2, 5000, seed=1)
        longest, double = float(plain.rows.double().norm(dim=1).max()), torch.float64
        sums = float((x[:, :8].abs() @ plain.rows.double().abs()).max())
        for of, bound in (
            (lambda w: Gram(w).matrix, Gram(plain).rounding * longest**2),
            (lambda w: w.project(x), inner_rounding(5000, double) * longest * float(x.norm())),
            (lambda w: w.combine(x[:, :8]), rounding_of_sum(8, double) * sums),
        ):
            torch.testing.assert_close(of(stored), of(plain), rtol=0, atol=2 * bound)
        kept = stored.rows
    assert list(tmp_path.iterdir()) == []
    assert stored.count == 0
    assert torch.equal(kept, plain.rows)  # a view outlives its window


def test_a_file_that_is_there_already(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_bytes(b"kept")
    with pytest.raises(UsageError, match="cannot use"):
        GradientWindow(4, 4, path=path)
    assert path.read_bytes() == b"kept"


PROGRAM = """
import sys
from pathlib import Path
import torch
from hesscli.engines.mfac import GradientWindow, StaticFisher
torch.set_num_threads(1)

def mebibytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024

torch.ones(64, 64) @ torch.ones(64, 64)
before = mebibytes("VmRSS")
rows, columns = 256, 2**19
row = torch.randn(columns, generator=torch.Generator().manual_seed(0))
with GradientWindow(rows, columns, path=Path(sys.argv[1])) as window:
    for i in range(rows):
        window.push(row.roll(1000 * i))
    fisher = StaticFisher(window, 1.0)
    fisher.ihvp(torch.ones(columns))
    print(window.nbytes / 2**20, mebibytes("VmHWM") - before)
"""


def test_a_window_larger_than_its_share_of_memory(tmp_path: Path) -> None:
    """512 MiB of rows in at most 200 MiB more than what torch takes by itself."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "window")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    size, taken = map(float, run.stdout.split())
    assert size == 512
    assert 0 < taken < 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_gram(dtype: torch.dtype, exact: bool) -> None:
    """In any number of tiles, and after a row was replaced.

    Entries are multiples of 2^-8 below 8, so that float64 holds every sum in whatever order. A
    float32 sum of n terms is off by n 2^-24 of ‖g_i‖‖g_j‖ at most, here of a tile's 4,096.
    """
    window = GradientWindow(300, 9000, dtype=dtype)
    window.extend((256 * rows_of("normal", 310, 9000)).round() / 256)
    gram = Gram(window, exact=exact)
    for _ in range(2):
        rows = window.rows.double()
        lengths = torch.linalg.vector_norm(rows, dim=1)
        bound = 0.0 if exact else gram.rounding
        assert bound < 4100 * 2.0**-24
        errors = (gram.matrix - rows @ rows.T).abs()
        assert (errors <= bound * lengths[:, None] * lengths).all()
        assert torch.equal(gram.matrix, gram.matrix.T)
        gram.replace(window.push(torch.arange(9000.0) % 64 / 64))  # all terms of one sign


def test_shards_add_up() -> None:
    """Each has some columns of the same rows, and a bad entry is refused by all."""
    rows = rows_of("normal", 13, 1000)
    whole = GradientWindow(8, 1000, dtype=torch.float64)
    parts = [slice(0, 300), slice(300, 301), slice(301, 1000)]
    shards = [GradientWindow(8, 1000, dtype=torch.float64, shard=part) for part in parts]
    for window in (whole, *shards):
        window.extend(rows)
    assert [shard.size for shard in shards] == [300, 1, 699]
    assert torch.equal(torch.cat([shard.rows for shard in shards], dim=1), whole.rows)
    assert distance(sum(Gram(shard).matrix for shard in shards), Gram(whole).matrix) < 1e-14
    assert sum(s.mean_square() for s in shards) == pytest.approx(whole.mean_square(), rel=1e-14)
    poisoned = rows[0].clone()
    poisoned[300] = math.nan
    for shard in shards:
        with pytest.raises(UnsoundError):
            shard.push(poisoned)
