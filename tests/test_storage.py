"""Files are whole or absent, and a folder that cannot be used is said in three lines."""

from __future__ import annotations

import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from faults import largest_file

from hesscli.errors import ExitCode, UsageError
from hesscli.storage import map_scratch, prepare_folder, write_atomically

NOBODY = 65534


def hello(stream: BinaryIO) -> None:
    stream.write(b"hello")


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder that others own and only they may write to; root steps down to see it so."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if was_root:
            os.seteuid(0)
        shutil.rmtree(folder)


@pytest.fixture
def small_files() -> Iterator[int]:
    """Files may hold no more than so many bytes, as on a disk that fills up."""
    with largest_file(4096):
        yield 4096


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(b"something longer from before")
    assert write_atomically(path, hello) == path
    assert path.read_bytes() == b"hello"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        path = write_atomically(tmp_path / "file", hello)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("before", [None, b"before"])
def test_nothing_half_written(
    tmp_path: Path, error: type[BaseException], before: bytes | None
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def fail(stream: BinaryIO) -> None:
        stream.write(b"half")
        stream.flush()
        raise error

    with pytest.raises(error):
        write_atomically(path, fail)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([before] if before else [])


def test_disk_runs_out_of_space(tmp_path: Path, small_files: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def too_long(stream: BinaryIO) -> None:
        stream.write(bytes(small_files + 1))

    with pytest.raises(UsageError) as caught:
        write_atomically(path, too_long)
    assert "larger than allowed" in caught.value.got
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_target_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "trace.json").mkdir()
    with pytest.raises(UsageError) as caught:
        write_atomically(tmp_path / "trace.json", hello)
    assert "it is a folder" in caught.value.got
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]


def test_target_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        write_atomically(tmp_path / "absent" / "file", hello)
    assert "does not exist" in caught.value.got


def test_no_permission(closed_folder: Path) -> None:
    for attempt in (
        lambda: write_atomically(closed_folder / "file", hello),
        lambda: prepare_folder(closed_folder),
        lambda: prepare_folder(closed_folder / "new"),
        lambda: map_scratch(closed_folder / "scratch", 4096),
    ):
        with pytest.raises(UsageError) as caught:
            attempt()
        assert caught.value.got == "permission denied"


def test_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert prepare_folder(folder) == folder
    assert prepare_folder(folder) == folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_folder_that_is_a_file(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(UsageError) as caught:
        prepare_folder(tmp_path / "file" / inside)
    assert "not a folder" in caught.value.got
    assert caught.value.exit_code is ExitCode.USAGE
    what, _, hint = str(caught.value).splitlines()
    assert str(tmp_path / "file") in what
    assert "--dir" in hint
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_memory_in_a_file(tmp_path: Path) -> None:
    """It holds what is written, takes its space at once, and has no name."""
    memory = map_scratch(tmp_path / "scratch", 1 << 16)
    assert list(tmp_path.iterdir()) == []
    assert memory[:] == bytes(1 << 16)
    memory[100:105] = b"hello"
    memory.madvise(mmap.MADV_DONTNEED)
    assert memory[99:106] == b"\0hello\0"


def test_memory_in_a_file_on_a_full_disk(tmp_path: Path, small_files: int) -> None:
    with pytest.raises(UsageError) as caught:
        map_scratch(tmp_path / "scratch", small_files + 1)
    assert "larger than allowed" in caught.value.got
    assert "KiB to spare" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_memory_in_a_file_that_cannot_be(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"kept")
    for path, reason in (
        (kept, "it exists already"),
        (tmp_path / "absent" / "scratch", "does not exist"),
    ):
        with pytest.raises(UsageError) as caught:
            map_scratch(path, 4096)
        assert reason in caught.value.got
    assert kept.read_bytes() == b"kept"
