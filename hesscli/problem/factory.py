"""The user's own code: found by ``module:callable``, called, and blamed by its own frames."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from hesscli.errors import HesscliError, InputError, UnsoundError, first_line, nearest

# -- Where the user's modules are found: beside the spec, in the working folder, or installed ------


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


def code_in_use() -> dict[str, str]:
    """The SHA-256 of each file of the user's own that was imported so far, by its path.

    The user's own is what lies in the folders that are looked in, and is not installed.
    """
    found: dict[str, str] = {}
    home_of = cache(_own_folder)  # of some thousand modules, in a tenth as many folders
    for module in list(sys.modules.values()):
        file = str(getattr(module, "__file__", None) or os.devnull)  # torch has some of no file
        home = home_of(os.path.dirname(file))
        if home is None or _is_installed(path := Path(file)) or not path.is_file():
            continue
        found[str(path.relative_to(home))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _own_folder(place: str) -> Path | None:
    """Which of the folders that are looked in a folder lies in; None where it is installed."""
    path = Path(place)
    home = next((folder for folder in _homes.folders if path.is_relative_to(folder)), None)
    return None if home is None or _is_installed(path) else home


def _is_installed(path: Path) -> bool:
    return any(path.resolve().is_relative_to(root) for root in (*INSTALLED, OURS))


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
    return top_level(name) in sys.stdlib_module_names


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


# -- The user's own code: found by ``module:callable``, called, and blamed by its own frames -------


_MOST_FRAMES = 6


def load_factory(reference: str, folder: Path, where: str) -> Callable[..., Any]:
    """The callable that a spec names: the user's own or an installed package's.

    Args:
        reference: ``module:callable``; both sides may be dotted.
        folder: the spec's folder, looked in first; the working folder is the next.
        where: the key of the spec that holds the reference, such as ``[model] factory``.

    Raises:
        InputError: there is no such callable, or it is of the standard library, of which nothing
            builds a model, data or a loss.
    """
    module_name, _, attributes = reference.partition(":")
    if not all(part.isidentifier() for part in (module_name + "." + attributes).split(".")):
        hint = 'write module:callable, such as "net:Net" for the class Net in net.py'
        raise InputError(f"{where} does not name a callable", repr(reference), hint)
    if is_standard(module_name):
        raise _standard(reference, module_name, folder, where)
    found: Any = _import(module_name, folder, where)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise _no_attribute(found, attribute, reference, where)
        found = getattr(found, attribute)
        if is_standard(_origin(found)):
            raise _standard(reference, _origin(found), folder, where)
    if not callable(found):
        got = f"{reference!r} is of type {type(found).__name__}"
        raise InputError(f"{where} cannot be called", got, "name a class or a function")
    return found  # type: ignore[no-any-return]


def call_user(function: Callable[..., Any], /, *args: Any, where: str, **kwargs: Any) -> Any:
    """Call the user's function; what it raises becomes an error with the user's own frames.

    Args:
        function: what to call.
        *args: passed on to it.
        where: the key of the spec that it came from.
        **kwargs: passed on to it.
    """
    with blamed_on_user(f"{where} raised an error", _accepts(function)):
        return function(*args, **kwargs)


@contextmanager
def blamed_on_user(what: str, hint: str) -> Iterator[None]:
    """Turn whatever the user's code raises, but for Ctrl-C, into an `InputError`."""
    try:
        yield
    except (HesscliError, KeyboardInterrupt):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        hint = "a smaller --batch-size, or another --device"
        raise UnsoundError("out of memory", _one_line(error), hint, user_frames(error)) from error
    except BaseException as error:  # SystemExit and GeneratorExit are no Exceptions
        frames = user_frames(error)
        if "same device" in _one_line(error):
            hint = "new tensors where inputs are, torch.arange(n, device=x.device); or --device cpu"
        below = "; its own lines are below" if frames else ""
        raise InputError(what, _one_line(error), hint + below, frames) from error


def user_frames(error: BaseException) -> tuple[str, ...]:
    """Where the error passed through the user's own files, innermost last."""
    frames = [
        (frame.filename, frame.lineno, frame.name, frame.line)
        for frame in traceback.extract_tb(error.__traceback__)
        if _is_users(frame.filename)
    ]
    if isinstance(error, SyntaxError) and _is_users(str(error.filename)):
        frames.append((str(error.filename), error.lineno, "<module>", (error.text or "").strip()))
    return tuple(
        f"  {name}:{line} in {function}\n    {source}"
        for name, line, function, source in frames[-_MOST_FRAMES:]
    )


def is_blamed_on_user(error: BaseException) -> bool:
    """Whether hesscli called the user's code, and the error arose in that or below it."""
    places = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
    ours = [i for i, place in enumerate(places) if place.is_relative_to(OURS)]
    users = [i for i, place in enumerate(places) if _is_users(str(place))]
    return bool(ours and users) and users[-1] > ours[-1]


def _import(name: str, folder: Path, where: str) -> ModuleType:
    hint = "correct the module"
    with importing_beside(folder), blamed_on_user(f"{where}: importing {name} failed", hint):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # A module that the user's module lacks is the user's error, not a wrong reference.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                if top_level(error.name or "") in PACKAGES:
                    raise _not_installed(error, where) from error
                raise
            raise _no_module(name, folder, where) from None
    top = top_level(name)
    homes = [place for place in search_folders(folder) if top in offered(place)]
    if homes and home_of(sys.modules[top]) not in homes:
        got = f"{top} is also an installed module, {home_of(sys.modules[top])}"
        raise InputError(f"{where} names a module that is taken", got, f"rename it in {homes[0]}")
    return module


PACKAGES = {
    **{name: name for name in ("datasets", "einops", "lightning", "monai", "omegaconf", "pandas")},
    **{name: name for name in ("peft", "scipy", "timm", "torchaudio", "torchmetrics")},
    **{name: name for name in ("torchvision", "transformers")},
    "cv2": "opencv-python-headless",
    "hydra": "hydra-core",
    "PIL": "pillow",
    "pytorch_lightning": "pytorch-lightning",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "torch_geometric": "torch-geometric",
}
"""Of modules that networks are often made with; no other's is guessed, for anybody may take it."""


def how_to_install(name: str) -> str:
    """What brings a module into the environment that hesscli runs in."""
    package = PACKAGES.get(name)
    return f"pip install {package}" if package else f"install what has the module {name}"


def _not_installed(error: ModuleNotFoundError, where: str) -> InputError:
    top = top_level(error.name or "")
    what = f"{where} needs {top}, which is not installed here"
    return InputError(what, _one_line(error), how_to_install(top), user_frames(error))


def top_level(name: str) -> str:
    """The package that a dotted module is of."""
    return name.partition(".")[0]


def _origin(found: Any) -> str:
    """The module that a module, class or function is, or is of; empty for other objects."""
    if isinstance(found, ModuleType):
        return found.__name__
    if isinstance(found, type | FunctionType | BuiltinFunctionType | MethodType):
        return str(getattr(found, "__module__", None) or "")
    return ""


def _standard(reference: str, module: str, folder: Path, where: str) -> InputError:
    hint = 'write one of your own, such as "net:Net" for the class Net in net.py beside the spec'
    top = top_level(module)
    if home := next((place for place in search_folders(folder) if top in offered(place)), None):
        hint = f"rename {home / top}: a module of the standard library has that name"
    got = f"{reference!r}, in which {top} comes with Python"
    return InputError(f"{where} names nothing of yours or of an installed package", got, hint)


def _no_module(name: str, folder: Path, where: str) -> InputError:
    folders = search_folders(folder)
    known = sorted({module for place in folders for module in offered(place)})
    close = nearest(name, known)
    if top_level(name) in PACKAGES:
        hint = how_to_install(top_level(name))
    elif close:
        hint = f"did you mean {close!r}?"
    elif known:
        hint = f"one of {', '.join(known[:5])}, or move {top_level(name)}.py to one of these"
    else:
        hint = f"move {top_level(name)}.py to one of these, or correct the name before the colon"
    got = f"{name!r}; looked in {', '.join(map(str, folders))} and among installed packages"
    return InputError(f"{where} names a module that is not there", got, hint)


def _no_attribute(owner: Any, name: str, reference: str, where: str) -> InputError:
    public = [known for known in vars(owner) if not known.startswith("_")]
    close = nearest(name, public)
    place = getattr(owner, "__file__", None) or getattr(owner, "__name__", repr(owner))
    hint = f"did you mean {close!r}?" if close else f"define {name} in {place}"
    return InputError(f"{where} names nothing", f"{reference!r}: no {name!r} in {place}", hint)


def _accepts(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    try:
        signature = str(inspect.signature(function))
    except (TypeError, ValueError):
        return "correct its kwargs in the spec, or the function itself"
    return f"correct its kwargs in the spec, or the function itself: {name}{signature}"


def _one_line(error: BaseException) -> str:
    name, first = type(error).__name__, first_line(error)
    return f"{name}: {first}" if first else name


def _is_users(filename: str) -> bool:
    path = Path(filename).resolve()
    return path.is_file() and not any(path.is_relative_to(root) for root in {OURS, *INSTALLED})
