"""Where the user's modules are found: beside the spec, in the working folder, or installed."""

from __future__ import annotations

import importlib
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from types import ModuleType

OURS = Path(__file__).resolve().parents[1]
_SCHEME = ("stdlib", "platstdlib", "purelib", "platlib")
INSTALLED = {
    Path(place).resolve()
    for place in (*map(sysconfig.get_path, _SCHEME), site.getusersitepackages())
}


class _Homes:
    """Finds top-level modules in the folders that are set, whatever comes first on sys.path."""

    def __init__(self) -> None:
        self.folders: tuple[Path, ...] = ()
        self._added: list[str] = []
        self._homes: dict[str, Path] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the import system asks; see `importlib.abc.MetaPathFinder`."""
        home = self._homes.get(name)
        return None if home is None else PathFinder.find_spec(name, [str(home)], target)

    def set(self, folders: tuple[Path, ...]) -> None:
        """Look in these folders from here on; what others brought is dropped."""
        sys.path[:] = [entry for entry in sys.path if entry not in self._added]
        installed = [entry for entry in sys.path if entry and Path(entry) not in folders]
        homes = {name: folder for folder in reversed(folders) for name in offered(folder)}
        kept = {name for name in homes if not _belongs_to_us(name, installed)}
        for name in kept | self._homes.keys():
            _forget_unless_from(homes.get(name), name)
        self._homes = {name: homes[name] for name in kept}
        # Last, for what the user's code brings into being or asks the folders for.
        self._added = [str(folder) for folder in folders if str(folder) not in sys.path]
        sys.path.extend(self._added)
        self.folders = folders


_homes = _Homes()


@contextmanager
def importing_beside(folder: Path) -> Iterator[None]:
    """Find the modules of the folder, and then of the working folder, from here on.

    They go before installed ones, as they do where a script beside them runs, but never before
    the standard library or a library that hesscli itself is made of. It stays so after the
    block, for user code also imports while it runs; one folder at a time, for two specs may each
    have a net.py.
    """
    if _homes not in sys.meta_path:
        sys.meta_path.insert(0, _homes)
    folders = search_folders(folder)
    if folders != _homes.folders:
        _homes.set(folders)
    importlib.invalidate_caches()
    yield


def search_folders(folder: Path) -> tuple[Path, ...]:
    """The folders that are looked in before installed modules, in order."""
    return tuple(dict.fromkeys((folder.resolve(), Path.cwd())))


def offered(folder: Path) -> set[str]:
    """Names of the modules and packages that lie in a folder."""
    modules = {path.stem for path in folder.glob("*.py")}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return {name for name in modules | packages if name.isidentifier()}


def home_of(module: ModuleType) -> Path | None:
    """The folder on the import path that a top-level module was found in."""
    if not (file := getattr(module, "__file__", None)):
        return None
    path = Path(file).resolve()
    return path.parent.parent if path.name == "__init__.py" else path.parent


def is_standard(name: str) -> bool:
    """Whether a module, dotted or not, is of the standard library."""
    return name.partition(".")[0] in sys.stdlib_module_names


def _belongs_to_us(name: str, installed: Sequence[str]) -> bool:
    """Whether an installed module must not be hidden by a user's of the same name."""
    if is_standard(name) or name == OURS.name:
        return True
    found = PathFinder.find_spec(name, installed)
    return found is not None and found.origin is not None and name in _requirements()


@cache
def _requirements() -> frozenset[str]:
    """Top-level modules of what hesscli needs, and of what that needs in turn."""
    pending, needed = [OURS.name], set()
    while pending:
        name = pending.pop()
        if name in needed:
            continue
        needed.add(name)
        try:
            lines = requires(name) or ()
        except PackageNotFoundError:  # of another platform
            continue
        plain = (line for line in lines if "extra ==" not in line)
        pending += [_normal(match[0]) for line in plain if (match := re.match(r"[\w.-]+", line))]
    return frozenset(
        module
        for module, owners in packages_distributions().items()
        if any(_normal(owner) in needed for owner in owners)
    )


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _forget_unless_from(folder: Path | None, name: str) -> None:
    """Drop a loaded module of another folder; installed ones and hesscli's own stay."""
    home = home_of(sys.modules[name]) if name in sys.modules else None
    if home is None or home in {folder, OURS.parent} or name == "__main__":
        return
    if any(home.is_relative_to(root) for root in INSTALLED):
        return
    for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[loaded]
