"""Files that are whole or absent, alone or as a set, and memory in files that have no name."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from hesscli.errors import UsageError
from hesscli.units import human_bytes

_PLAIN_WORDS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the disk is read-only",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than allowed here",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "it is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENOENT: "its folder does not exist",
    errno.ENAMETOOLONG: "the name is too long",
}


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Write a file so that its name only ever stands for complete contents.

    A reader, or a run that is cut off, finds either what was there before or all of the new
    file. The file gets the permissions that the user's umask gives to any new file.

    Args:
        path: the file to make or replace.
        write: called once with a binary stream, to which it writes the contents.

    Returns:
        The path, now written.

    Raises:
        UsageError: where the file cannot be written: no permission, no space, no such folder.
    """
    unfinished, _ = _write_beside(path, write)
    try:
        os.replace(unfinished, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        _remove([unfinished])
    return path


class FileSet:
    """Files of one folder that appear together: a document, and what belongs to it.

    Each file is written beside its place and made durable. :meth:`commit` then withdraws the
    document that was there, moves what belongs to it aside, puts the new files at their places,
    and the new document last. So a document at its place always has its own files beside it,
    even for readers that compare no sums:

    - killed before the commit, the earlier set stands untouched;
    - killed within it, a matter of a few renames, there is no document;
    - killed after the document is in place, the new set stands whole.

    An error or an interrupt within the commit takes every step back. What a killed process leaves
    has names that :func:`sweep` knows.

    Attributes:
        sums: the SHA-256 of each file written so far, by its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sums: dict[str, str] = {}
        self._unfinished: dict[Path, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _remove(self._unfinished.values())

    def write(self, name: str, write: Callable[[BinaryIO], None]) -> Path:
        """Write a file of the set beside its place.

        Args:
            name: of the file in the folder.
            write: called once with a binary stream, to which it writes the contents.

        Returns:
            The path that it has after the commit.

        Raises:
            UsageError: where the file cannot be written.
        """
        path = self.folder / name
        self._unfinished[path], self.sums[name] = _write_beside(path, write)
        return path

    def commit(
        self, name: str, write: Callable[[BinaryIO], None], withdrawn: Iterable[Path] = ()
    ) -> Path:
        """Write the document, and put the whole set in the place of an earlier one.

        Args:
            name: of the document in the folder.
            write: writes its contents, which name the other files and their sums.
            withdrawn: files in the folder that belong to the earlier set.

        Returns:
            The document's path.

        Raises:
            UsageError: where a file cannot be put at its place; the earlier set stands.
        """
        document = self.write(name, write)
        others = [path for path in self._unfinished if path != document]
        moves = [
            (path, _unfinished_name(path))
            for path in dict.fromkeys((document, *others, *withdrawn))
            if os.path.lexists(path)
        ]
        aside = [kept for _, kept in moves]
        moves += [(self._unfinished[path], path) for path in (*others, document)]
        _move_all(moves)
        self._unfinished.clear()
        with suppress(OSError):  # not every system can make a folder's names durable
            _synchronize(self.folder)
        _remove(aside)
        return document


def sweep(folder: Path) -> None:
    """Remove what killed processes have left unfinished in a folder.

    To be called by whoever holds the folder. A file that somebody is writing all the same, as
    ``hesscli init`` does without holding it, is left alone, and so is whatever has another name.
    """
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name) and path.is_file() and not _is_being_written(path):
            _remove([path])


def prepare_folder(path: Path) -> Path:
    """Make a folder where there is none, and see that files can be made in it.

    Args:
        path: the folder.

    Returns:
        The path, now a folder that can be written to.

    Raises:
        UsageError: where that cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # An attempt, since permission bits know nothing of read-only mounts and quotas.
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise unwritable(path, error) from error


def map_scratch(path: Path, nbytes: int) -> mmap.mmap:
    """Memory that lives in a file: all of its space is taken at once, or none.

    The file loses its name as soon as it is mapped. Its space is given back with the last user
    of the memory, however the process ends, and nobody else can change what is in it.

    Args:
        path: where to make the file; there must be none.
        nbytes: how much, above 0; all zeros at first.

    Returns:
        The shared map, to be read and written.

    Raises:
        UsageError: where the file cannot be made: no space, no permission, or it exists.
    """
    hint = f"a file on a disk with {human_bytes(nbytes)} to spare"
    try:
        stream = path.open("xb+")
    except FileExistsError as error:
        raise UsageError(f"cannot use {path}", "it exists already", "a new file") from error
    except OSError as error:
        raise unwritable(path, error, hint) from error
    with stream:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, nbytes)
            else:
                stream.truncate(nbytes)  # macOS cannot say beforehand that a disk is too small
            return mmap.mmap(stream.fileno(), nbytes)
        except OSError as error:
            raise unwritable(path, error, hint) from error
        finally:
            path.unlink()


# -- Files that are not at their places yet --------------------------------------------------------


_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.part")


def _unfinished_name(path: Path) -> Path:
    """A name of its own beside a path, because a rename is atomic within one file system only."""
    return path.with_name(f".{secrets.token_hex(8)}.part")


def _write_beside(path: Path, write: Callable[[BinaryIO], None]) -> tuple[Path, str]:
    """Write what is to stand at a path durably, beside it.

    Returns:
        Where it is, and its SHA-256.
    """
    from filelock import lock_descriptor

    unfinished = _unfinished_name(path)
    try:
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, "")
        with unfinished.open("xb+") as stream:
            with suppress(OSError):  # network folders may have no locks
                lock_descriptor(stream.fileno(), blocking=False)
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
            stream.seek(0)
            return unfinished, hashlib.file_digest(stream, "sha256").hexdigest()
    except BaseException as error:
        _remove([unfinished])
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def _is_being_written(path: Path) -> bool:
    from filelock import lock_descriptor

    try:
        with path.open("rb") as stream:
            return not lock_descriptor(stream.fileno(), blocking=False)
    except OSError:
        return False


def _move_all(moves: Iterable[tuple[Path, Path]]) -> None:
    """Rename files in this order, or leave all as they are."""
    begun: list[tuple[Path, Path]] = []
    try:
        for move in moves:
            begun.append(move)  # noted first, for an interrupt may follow the rename
            os.replace(*move)
    except BaseException as error:
        for source, target in reversed(begun):
            with suppress(OSError):
                if not os.path.lexists(source):  # else this one was not made
                    os.replace(target, source)
        if isinstance(error, OSError):
            known = next(path for path in begun[-1] if not _UNFINISHED.fullmatch(path.name))
            raise unwritable(known, error) from error
        raise


def _synchronize(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def unwritable(
    path: Path,
    error: OSError,
    hint: str = "another folder with --dir FOLDER, or --dir - to write no files",
) -> UsageError:
    """The error for a file that the system does not let be written, in plain words.

    Args:
        path: of the file.
        error: what the system says.
        hint: what to try.
    """
    reason = _PLAIN_WORDS.get(error.errno or 0) or error.strerror or str(error)
    return UsageError(what=f"cannot write {path}", got=reason, hint=hint)
