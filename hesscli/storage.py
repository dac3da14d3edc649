"""Files that are either whole or absent, and memory in files that have no name."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

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
    # Beside the target, because a rename is atomic within one file system only.
    unfinished = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with unfinished.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return path


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
