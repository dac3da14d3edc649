"""One writer a folder: whoever comes second is told who the first is."""

from __future__ import annotations

import math
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hesscli.errors import UsageError
from hesscli.storage import unwritable

if TYPE_CHECKING:
    from filelock import SoftFileLease

LOCK_NAME = "hesscli.lock"
LEASE_SECONDS = 60.0
"""So long a run on another host may give no sign of life; a living one gives three."""
_UNSIGNED_SECONDS = 2.0  # a lock that names nobody was left by a run killed while making it
_LONGEST_COMMAND = 400  # the library reads no more than 1024 bytes of a lock


class Hold:
    """A folder that this process alone writes to."""

    def __init__(self, folder: Path, lease: SoftFileLease) -> None:
        self.folder, self._lease = folder, lease

    def check(self) -> None:
        """See that nobody has taken the folder over, as when this machine slept for long.

        Raises:
            UsageError: another run has, and its files are not to be touched.
        """
        if not self._lease.is_lock_held_by_us:
            raise UsageError(
                f"another run has taken {self.folder} over",
                f"its {LOCK_NAME} is no longer of this run",
                "the same command with a folder of its own, by --dir FOLDER",
            )


@contextmanager
def hold(folder: Path, note: Callable[[str], None]) -> Iterator[Hold]:
    """Be the only run that writes to a folder.

    The lock is the file ``hesscli.lock`` in it. It names the process and its host, since when it
    runs, and its command, and is removed when the run ends. One that a killed run has left is
    taken over: at once where that ran on this host; else where nothing is heard of it in
    :data:`LEASE_SECONDS`, which are waited for.

    Args:
        folder: an existing folder.
        note: told what is waited for.

    Yields:
        The hold.

    Raises:
        UsageError: another run writes there, or there can be no lock.
    """
    lease = _take(folder / LOCK_NAME, note)
    try:
        yield Hold(folder, lease)
    finally:
        with suppress(OSError):
            lease.release()


def _take(path: Path, note: Callable[[str], None]) -> SoftFileLease:
    """Make the lock, and sign it."""
    from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

    lease = SoftFileLease(path, lease_duration=LEASE_SECONDS, thread_local=False)
    contest = _Contest(path, lease, note)
    try:
        lease.acquire(2 * LEASE_SECONDS, cancel_check=contest.is_lost)
        with path.open("a", encoding="ascii") as lock:  # its readers pass over further lines
            lock.write(f"since={datetime.now().astimezone().isoformat(' ', 'seconds')}\n")
            lock.write(f"command={_command()}\nprocesses={_processes()}\n")
    except (Timeout, LeaseSettingsMismatch):
        raise contest.refusal() from None
    except OSError as error:
        with suppress(OSError):
            lease.release()
        raise unwritable(path, error) from error
    return lease


class _Contest:
    """Looks at who holds a lock, between attempts to take it."""

    def __init__(self, path: Path, lease: SoftFileLease, note: Callable[[str], None]) -> None:
        self._path, self._lease, self._note = path, lease, note
        self._told: dict[str, str] = {}
        self._unsigned: float | None = None
        self._waiting = False

    def is_lost(self) -> bool:
        """Whether the holder lives. One that has died on this host has lost the lock by now."""
        owner = self._lease.owner
        if owner is None:
            self._discard_unsigned()
            return False
        self._unsigned = None
        self._told = _told(self._path) or self._told  # it may be gone by now
        here = self._told.get("processes") == _processes()
        if here or _silence(self._path) < LEASE_SECONDS:
            return True
        if not self._waiting:
            self._waiting = True
            self._note(
                f"waiting up to {LEASE_SECONDS:.0f} s for a sign of life from process {owner.pid} "
                f"on {_bare(owner.hostname)}, which had {self._path.parent}"
            )
        return False

    def _discard_unsigned(self) -> None:
        if not self._path.exists():
            self._unsigned = None
        elif self._unsigned is None:
            self._unsigned = time.monotonic()
        elif time.monotonic() - self._unsigned > _UNSIGNED_SECONDS:
            self._lease.force_break()

    def refusal(self) -> UsageError:
        """Who holds the lock, as far as it says."""
        told = self._told or _told(self._path)
        command, pid, since = (told.get(key, "unknown") for key in ("command", "pid", "since"))
        host = _bare(told.get("host", "unknown"))
        return UsageError(
            f"another run writes to {self._path.parent}",
            f"{command} (process {pid} on {host} since {since})",
            f"again when it has ended, or a folder of its own by --dir FOLDER; "
            f"if there is no such run, remove {self._path}",
        )


def _silence(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the folder that both are in."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as now:
            return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    except OSError:  # it may be gone
        return math.inf


def _told(path: Path) -> dict[str, str]:
    """What a lock says: the lines of the library, and those that were added."""
    text = ""
    with suppress(OSError):
        text = path.read_text(encoding="ascii", errors="replace")
    return {key: value for key, _, value in (line.partition("=") for line in text.splitlines())}


def _bare(hostname: str) -> str:
    """A host's name without what the library adds for a container's processes."""
    return hostname.partition("?")[0]


def _processes() -> str:
    """Names the host, or the container on it, of whose processes a number is one."""
    namespace = 0
    with suppress(OSError):  # only Linux has them
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"{socket.gethostname()}/{namespace}".encode("unicode_escape").decode()


def _command() -> str:
    """What was typed, in one line of bearable length."""
    words = shlex.join(["hesscli", *sys.argv[1:]])
    return words.encode("unicode_escape").decode()[:_LONGEST_COMMAND]
