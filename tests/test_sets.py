"""A run's files are one set: whole and its own, whenever a run dies, fails or meets another."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import select
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import faults
import pytest
from faults import (
    SET,
    count_steps,
    finish,
    forked,
    largest_file,
    names,
    save,
    saved_as,
    seed_in,
    start,
    steps,
)

import hesscli
from hesscli.errors import ExitCode, InputError
from hesscli.locks import LOCK_NAME
from hesscli.results.saved import belonging, read
from hesscli.storage import FileSet, sweep

# -- Sets that are cut off -------------------------------------------------------------------------


def test_killed_at_any_step_the_set_is_the_old_or_the_new_or_none(tmp_path: Path) -> None:
    found = []
    for step in range(1, count_steps(tmp_path) + 1):
        folder = tmp_path / str(step)
        save(folder, 1)

        def die(folder: Path = folder, step: int = step) -> None:
            with steps(step):
                save(folder, 2)

        assert forked(die) == -signal.SIGKILL
        found.append(seed_in(folder))
        assert save(folder, 3).error is None
        assert seed_in(folder) == 3
        assert names(folder) == SET  # no litter, no lock
    # The old set first, the new one last, and none only between the renames: three are withdrawn
    # and three come.
    assert found == sorted(found, key=lambda seed: {1: 0, None: 1, 2: 2}[seed])
    assert found.count(None) <= 6
    assert {found[0], found[-1]} == {1, 2}


def test_killed_at_moments_of_chance_no_set_is_mixed(tmp_path: Path) -> None:
    """A process that writes one set after the other."""
    dice = random.Random(0)
    for _ in range(10):
        told, tell = os.pipe()

        def write(tell: int = tell) -> None:
            for seed in itertools.count(1):
                assert save(tmp_path, seed).error is None
                os.write(tell, b"x")

        child = start(write)
        os.close(tell)
        written = sum(len(os.read(told, 1)) for _ in range(dice.randint(1, 3)))
        select.select([], [], [], dice.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert finish(child) == -signal.SIGKILL
        os.close(told)
        seed = seed_in(tmp_path)
        assert seed is None or seed >= written
    assert save(tmp_path, 0).error is None
    assert names(tmp_path) == SET


@pytest.mark.parametrize("strike", [faults.fill_the_disk, faults.lose_the_disk, faults.interrupt])
def test_failed_at_any_step_the_old_set_stands(
    tmp_path: Path, strike: Callable[[], NoReturn]
) -> None:
    for step in range(1, count_steps(tmp_path / "count") + 1):
        folder = tmp_path / str(step)
        save(folder, 1)
        failed = interrupted = False
        with steps(step, strike):
            try:
                delivered = save(folder, 2)
                failed = delivered.error is not None
                assert json.loads(delivered.stdout)["method"]["seed"] == 2
            except KeyboardInterrupt:
                interrupted = True
        if failed:
            assert delivered.error is not None
            assert delivered.error.exit_code is ExitCode.USAGE
            what, got, hint = str(delivered.error).splitlines()
            assert any(name in what for name in SET)
            assert "the disk is" in got
            assert "--dir" in hint
        assert seed_in(folder) in ((1, 2) if interrupted else (1,) if failed else (2,))
        assert save(folder, 3).error is None
        assert seed_in(folder) == 3
        assert names(folder) == SET


def test_a_first_set_that_fails_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path / "like", 1)
    with steps() as counted:
        save(tmp_path / "count", 1)
    for step in range(1, counted.taken + 1):
        folder = tmp_path / str(step)
        with steps(step, faults.fill_the_disk):
            failed = save(folder, 1).error is not None
        left = names(folder) - {LOCK_NAME}
        assert left == (set() if failed else SET)


@pytest.mark.parametrize("too_large", ["diag.safetensors", "diag.json"])
def test_a_system_that_takes_no_such_file(tmp_path: Path, too_large: str) -> None:
    count = 5000 if too_large == "diag.safetensors" else 50  # else the document is the largest
    save(tmp_path, 1, count)
    with largest_file((tmp_path / too_large).stat().st_size - 1):
        delivered = save(tmp_path, 2, count)
    assert delivered.error is not None
    assert too_large in delivered.error.what
    assert json.loads(delivered.stdout)["method"]["seed"] == 2
    assert seed_in(tmp_path) == 1
    assert names(tmp_path) == SET


def _obey_permissions() -> None:
    """Give up what lets root write where nobody may (capabilities(7))."""
    version, process = 0x20080522, 0
    header, none = (ctypes.c_uint32 * 2)(version, process), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


@pytest.mark.skipif(
    os.geteuid() == 0 and sys.platform != "linux", reason="root is stopped by no permission"
)
def test_a_folder_that_becomes_read_only(tmp_path: Path) -> None:
    """After the start of the run, which tries it."""

    def as_a_user(work: Callable[[], int | None]) -> int | None:
        if os.geteuid() == 0:
            _obey_permissions()
        return work()

    def lock_up() -> None:
        assert saved_as(tmp_path, 1) == 0
        real = faults.deliver

        def deliver(*args: object) -> None:
            tmp_path.chmod(0o555)
            real(*args)  # type: ignore[arg-type]

        faults.deliver = deliver
        delivered = save(tmp_path, 2)
        assert delivered.error is not None
        assert delivered.error.got == "permission denied"
        assert json.loads(delivered.stdout)["method"]["seed"] == 2
        assert seed_in(tmp_path) == 1

    assert forked(lambda: as_a_user(lock_up)) == 0
    tmp_path.chmod(0o755)
    assert forked(lambda: as_a_user(lambda: saved_as(tmp_path, 3))) == 0
    assert seed_in(tmp_path) == 3
    assert names(tmp_path) == SET


@pytest.mark.parametrize("name", ["diag_stderr.safetensors", "diag.json"])
def test_a_folder_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "kept").mkdir(parents=True)
    delivered = save(tmp_path, 1)
    assert delivered.error is not None
    assert name in delivered.error.what
    assert "it is a folder" in delivered.error.got
    assert names(tmp_path) == {name}
    assert names(tmp_path / name) == {"kept"}


# -- Two at once -----------------------------------------------------------------------------------


def test_two_at_once_never_mix(tmp_path: Path) -> None:
    """Both begin when both are there; one may be refused, and whoever reads finds one of them."""
    for number in range(8):
        gate, opened = os.pipe()

        def run(seed: int, gate: int = gate, opened: int = opened) -> int:
            os.close(opened)
            os.read(gate, 1)  # ends when the other end is closed
            return saved_as(tmp_path, seed)

        pair = [start(lambda seed=seed: run(seed)) for seed in (2 * number, 2 * number + 1)]
        os.close(gate)
        os.close(opened)
        codes = [finish(child) for child in pair]
        assert set(codes) <= {ExitCode.OK, ExitCode.USAGE}
        assert ExitCode.OK in codes
        finished = {2 * number + place for place, code in enumerate(codes) if code == ExitCode.OK}
        assert seed_in(tmp_path) in finished
        assert names(tmp_path) == SET


def test_who_reads_while_others_write_finds_whole_sets(tmp_path: Path) -> None:
    save(tmp_path, 0)

    def write() -> int:
        return max(saved_as(tmp_path, seed) for seed in range(1, 40))

    child, seen, refused = start(write), set(), set()
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        try:
            saved = read(tmp_path / "diag.json")
        except InputError as error:  # within a commit there is no document
            refused.add(error.what)
            continue
        (seed,) = {saved.document["method"]["seed"]} | {
            int(value) for arrays in saved.arrays.values() for value in arrays["w"]
        }
        seen.add(seed)
    assert finish(child) == 0
    assert seen
    assert refused <= {"document not found"}
    assert seed_in(tmp_path) == 39


# -- What is swept, and what is left alone ---------------------------------------------------------


def test_only_litter_is_swept(tmp_path: Path) -> None:
    kept = {".part", ".0123456789abcdef.part~", "0123456789abcdef.part", ".config.part", "a.json"}
    for name in (*kept, ".0123456789abcdef.part"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert names(tmp_path) == kept


def test_what_a_living_process_is_writing_is_not_swept(tmp_path: Path) -> None:
    with FileSet(tmp_path) as files:

        def write(stream: object) -> None:
            sweep(tmp_path)
            assert len(names(tmp_path)) == 1

        files.write("a.txt", write)
    assert names(tmp_path) == set()


def test_what_an_earlier_set_has_more_goes_with_it(tmp_path: Path) -> None:
    """If it still is what that set's document says; nothing else is touched."""
    (tmp_path / "notes.txt").write_text("mine")
    document = {"schema_version": 1, "files": {"json": "a.json"}, "sha256": {}}
    with FileSet(tmp_path) as files:
        for name in ("same", "extra", "edited"):
            path = files.write(name, lambda stream: stream.write(b"first"))
            document["files"][name] = str(path)
            document["sha256"][name] = files.sums[name]
        files.commit("a.json", lambda stream: stream.write(json.dumps(document).encode()))
    assert names(tmp_path) == {"a.json", "same", "extra", "edited", "notes.txt"}
    (tmp_path / "edited").write_text("by hand")
    assert [path.name for path in belonging(tmp_path / "a.json")] == ["same", "extra"]
    with FileSet(tmp_path) as files:
        files.write("same", lambda stream: stream.write(b"second"))
        files.commit("a.json", lambda stream: stream.write(b"{}"), belonging(tmp_path / "a.json"))
    assert names(tmp_path) == {"a.json", "same", "edited", "notes.txt"}
    assert (tmp_path / "same").read_bytes() == b"second"


# -- Reading sets back -----------------------------------------------------------------------------


def test_a_folder_may_be_moved(tmp_path: Path) -> None:
    save(tmp_path / "a", 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert seed_in(tmp_path / "b") == 5


def spoil(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize("name", ["diag.safetensors", "diag_stderr.safetensors"])
@pytest.mark.parametrize(
    ("damage", "told"), [(spoil, "another SHA-256"), (Path.unlink, "cannot be read")]
)
def test_a_set_that_does_not_match_is_refused_by_name(
    tmp_path: Path, name: str, damage: Callable[[Path], None], told: str
) -> None:
    save(tmp_path, 1)
    damage(tmp_path / name)
    with pytest.raises(InputError) as caught:
        read(tmp_path / "diag.json")
    what, got, hint = str(caught.value).splitlines()
    assert "diag.json" in what
    assert f" {name} " in got
    assert told in got
    assert f"--dir {tmp_path}" in hint


def test_a_file_of_which_no_sum_is_known_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    document = json.loads((tmp_path / "diag.json").read_text())
    del document["sha256"]["tensors"]
    (tmp_path / "diag.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"no SHA-256 of diag\.safetensors"):
        read(tmp_path / "diag.json")


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd"])
def test_files_are_looked_for_beside_the_document_alone(tmp_path: Path, path: str) -> None:
    save(tmp_path / "a", 1)
    shutil.copy(tmp_path / "a" / "diag.safetensors", tmp_path / "secret.safetensors")
    document = json.loads((tmp_path / "a" / "diag.json").read_text())
    document["files"]["tensors"] = path
    (tmp_path / "a" / "diag.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "a" / "diag.json")


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        (b"", "Expecting value"),
        (b'{"schema_version": "\xff"}', "decode"),
        (b"[1]", "no schema_version"),
        (b"{}", "no schema_version"),
        (b'{"schema_version": 2, "hesscli_version": "9.1"}', "schema_version 2"),
        (b'{"schema_version": 1, "files": [], "sha256": 3}', "files"),
        (b'{"schema_version": 1, "files": {"png": 3}, "sha256": {"png": 3}}', "files"),
    ],
)
def test_what_is_no_document(tmp_path: Path, contents: bytes, told: str) -> None:
    (tmp_path / "a.json").write_bytes(contents)
    with pytest.raises(InputError) as caught:
        read(tmp_path / "a.json")
    assert told in caught.value.got
    assert belonging(tmp_path / "a.json") == []


def test_documents_that_are_not_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(InputError, match="document not found") as caught:
        read(tmp_path / "daig.json")
    assert "diag.json" in caught.value.hint
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path)


def test_a_document_alone_is_a_set(tmp_path: Path) -> None:
    save(tmp_path, 1)
    document = json.loads((tmp_path / "diag.json").read_text()) | {"files": {}, "sha256": {}}
    (tmp_path / "printed.json").write_text(json.dumps(document))
    assert hesscli.read(tmp_path / "printed.json").arrays == {}
    assert hesscli.read(str(tmp_path / "printed.json")).document == document
