"""One writer a folder: the second is told who the first is; what the dead have left is taken."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from faults import finish, forked, largest_file, start
from program import SUNSPOTS, hesscli_warm, three_lines

from hesscli import locks
from hesscli.errors import ExitCode, UsageError
from hesscli.locks import LOCK_NAME, hold


def silent(text: str) -> None:
    raise AssertionError(text)


@contextmanager
def another(folder: Path, *words: str) -> Iterator[int]:
    """Another process that holds a folder; its id."""
    ready, tell = os.pipe()
    wait, let_go = os.pipe()

    def work() -> None:
        os.close(let_go)
        sys.argv[1:] = words
        with hold(folder, silent):
            os.write(tell, b"x")
            os.read(wait, 1)  # until the other end is closed

    child = start(work)
    os.close(wait)
    try:
        assert os.read(ready, 1)
        yield child
    finally:
        os.close(let_go)
        finish(child)
        os.close(ready)
        os.close(tell)


def killed_holder(folder: Path) -> None:
    """Leave what a killed run leaves."""

    def work() -> None:
        with hold(folder, silent):
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(work) == -signal.SIGKILL
    assert (folder / LOCK_NAME).exists()


def elsewhere(folder: Path) -> Path:
    """Make the lock that is there another host's."""
    path = folder / LOCK_NAME
    path.write_text(re.sub("(host|processes)=.*", r"\1=elsewhere", path.read_text()))
    return path


def refused(folder: Path, note: Callable[[str], None] = silent) -> UsageError:
    with pytest.raises(UsageError) as caught, hold(folder, note):
        pass
    return caught.value


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_it_is_there_for_as_long_as_it_is_held(
    tmp_path: Path, error: type[BaseException] | None
) -> None:
    with suppress(error or ()), hold(tmp_path, silent) as held:
        assert held.folder == tmp_path
        held.check()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
        if error:
            raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("age", [0, 10_000])
def test_the_second_is_told_who_the_first_is(tmp_path: Path, age: int) -> None:
    """On one host a process that was stopped for long holds what it has."""
    before = time.strftime("%Y-%m-%d")
    with another(tmp_path, "trace", "my model.pt", "--probes", "64") as child:
        lock = tmp_path / LOCK_NAME
        os.utime(lock, (time.time() - age,) * 2)
        contents = lock.read_bytes()
        error = refused(tmp_path)
        assert error.exit_code is ExitCode.USAGE
        what, got, hint = str(error).splitlines()
        assert str(tmp_path) in what
        assert (
            f"hesscli trace 'my model.pt' --probes 64 (process {child} on {os.uname().nodename}"
            in got
        )
        assert any(day in got for day in (before, time.strftime("%Y-%m-%d")))
        assert "--dir" in hint
        assert lock.read_bytes() == contents
    with hold(tmp_path, silent):
        pass


@pytest.mark.parametrize("words", [("trace", "x" * 5000), ("é\n\x1b[1m" * 900,), ("a\npid=1",)])
def test_whatever_was_typed_the_lock_holds(tmp_path: Path, words: tuple[str, ...]) -> None:
    with another(tmp_path, *words) as child:
        assert (tmp_path / LOCK_NAME).stat().st_size <= 1024
        got = refused(tmp_path).got
        assert got.startswith("hesscli ")
        assert f"process {child} " in got


def test_what_a_killed_run_of_this_host_left_is_taken_at_once(tmp_path: Path) -> None:
    killed_holder(tmp_path)
    with hold(tmp_path, silent) as held:
        held.check()
        assert f"pid={os.getpid()}\n" in (tmp_path / LOCK_NAME).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_another_host_that_lives(tmp_path: Path) -> None:
    killed_holder(tmp_path)
    elsewhere(tmp_path)
    assert " on elsewhere since " in refused(tmp_path).got


def test_a_run_on_another_host_that_is_heard_of_again(tmp_path: Path) -> None:
    killed_holder(tmp_path)
    lock = elsewhere(tmp_path)
    os.utime(lock, (0, 0))
    said: list[str] = []

    def note(text: str) -> None:
        said.append(text)
        os.utime(lock)

    assert " on elsewhere since " in refused(tmp_path, note).got
    (text,) = said
    assert "60 s" in text
    assert "elsewhere" in text


def test_a_run_on_another_host_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is heard of it for a time, here a short one."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.25)
    killed_holder(tmp_path)
    os.utime(elsewhere(tmp_path), (0, 0))
    said: list[str] = []
    with hold(tmp_path, said.append) as held:
        held.check()
    assert len(said) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("contents", ["", "pid=", "filelock/2\npid=12\n"])
def test_a_lock_that_names_nobody(
    tmp_path: Path, contents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run was killed between making and signing it."""
    monkeypatch.setattr(locks, "_UNSIGNED_SECONDS", 0.1)
    (tmp_path / LOCK_NAME).write_text(contents)
    with hold(tmp_path, silent) as held:
        held.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loss", [Path.unlink, lambda path: elsewhere(path.parent)])
def test_a_folder_that_was_taken_over_is_not_written_to(
    tmp_path: Path, loss: Callable[[Path], object]
) -> None:
    with hold(tmp_path, silent) as held:
        loss(tmp_path / LOCK_NAME)
        with pytest.raises(UsageError, match="another run has taken"):
            held.check()


def test_a_disk_too_full_for_a_lock(tmp_path: Path) -> None:
    """It is told before the long work."""
    with largest_file(20):
        error = refused(tmp_path)
    assert LOCK_NAME in error.what
    assert "larger than allowed" in error.got
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).mkdir()
    error = refused(tmp_path)
    assert LOCK_NAME in error.what
    assert "it is a folder" in error.got


def test_the_program_refuses_before_the_long_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with another(tmp_path / "out", "diag") as child:
        run = hesscli_warm("trace", SUNSPOTS, "--dir", "out", "-v", cwd=tmp_path)
        assert (run.returncode, run.stdout) == (ExitCode.USAGE, "")
        assert "probing" not in run.stderr
        _, got, _ = three_lines("\n".join(run.stderr.splitlines()[-3:]))
        assert f"hesscli diag (process {child} " in got
        beside = hesscli_warm("trace", SUNSPOTS, "--probes", 2, "--dir", "-", cwd=tmp_path)
        assert beside.returncode == 0, beside.stderr
