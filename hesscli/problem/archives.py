"""Zip archives that ``torch.save`` wrote: what is in them, and whether it is what was saved."""

from __future__ import annotations

import mmap
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from hesscli.errors import InputError, first_line

_CHUNK = 1 << 20
_SPARE = 64 << 20


def is_archive(path: Path) -> bool:
    """Whether a file ends as a zip archive does.

    Raises:
        InputError: it does, but the end cannot be meant.
    """
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error


def names_in(path: Path) -> list[str]:
    """Names of all members.

    Raises:
        InputError: the archive's directory cannot be read.
    """
    with _opened(path) as archive:
        return archive.namelist()


def is_unpacked(path: Path) -> bool:
    """Whether all members lie in the file as they are, so that it can be mapped."""
    with _opened(path) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def holds(path: Path, text: bytes, *, member: str) -> bool:
    """Whether a text is in an archive's members of that ending, or in a file that is no archive."""
    if not is_archive(path):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as all_:
            return all_.find(text) >= 0
    with _opened(path) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(member)]
        return any(text in _content(archive, info) for info in members)


def _content(archive: ZipFile, member: ZipInfo) -> bytes:
    """What a member holds, whether or not it has a checksum, which `verify` has looked at."""
    with archive.open(member) as stream:
        stream._expected_crc = None  # type: ignore[attr-defined]
        return stream.read()


def verify(path: Path) -> bool:
    """Check every member against its CRC-32.

    Returns:
        Whether there are any: ``torch.save`` can be told to leave them out.

    Raises:
        InputError: a member is not what was saved, or unpacks to far more than the file.
    """
    size = path.stat().st_size
    with _opened(path) as archive:
        members = archive.infolist()
        if sum(member.compress_size for member in members) > size:
            raise zipfile.BadZipFile("members lie over each other")
        unpacked = sum(member.file_size for member in members)
        if unpacked > 2 * size + _SPARE:
            got = f"{path}: {size:,} bytes that unpack to {unpacked:,}"
            hint = "write it with torch.save, which does not pack"
            raise InputError("the checkpoint is packed too tightly", got, hint)
        if not any(member.CRC for member in members):
            return False
        for member in members:
            with archive.open(member) as stream:
                while stream.read(_CHUNK):
                    pass
    return True


@contextmanager
def _opened(path: Path) -> Iterator[ZipFile]:
    try:
        with ZipFile(path) as archive:
            yield archive
    except (InputError, MemoryError):
        raise
    except Exception as error:  # zipfile has many for what is not as it should be
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    got = f"{path}: {first_line(error) or type(error).__name__}"
    return InputError("the checkpoint is damaged", got, "copy or download it again")
