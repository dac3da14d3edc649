"""The user's own code: found by ``module:callable``, called, and blamed by its own frames."""

from __future__ import annotations

import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hesscli.errors import HesscliError, InputError, UnsoundError
from hesscli.problem.nearest import nearest

_MOST_FRAMES = 6
_OURS = Path(__file__).resolve().parents[1]
_INSTALLED = {
    Path(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib", "purelib", "platlib")
}

# The folder whose modules go before installed ones; one at a time, for two specs may each
# have a net.py.
_current: Path | None = None


def load_factory(reference: str, folder: Path, where: str) -> Callable[..., Any]:
    """The callable that a spec names.

    Args:
        reference: ``module:callable``; both sides may be dotted.
        folder: the spec's folder, looked in before installed modules.
        where: the key of the spec that holds the reference, such as ``[model] factory``.
    """
    module_name, _, attributes = reference.partition(":")
    if not all(part.isidentifier() for part in (module_name + "." + attributes).split(".")):
        hint = 'write module:callable, such as "net:Net" for the class Net in net.py'
        raise InputError(f"{where} does not name a callable", repr(reference), hint)
    found: Any = _import(module_name, folder.resolve(), where)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise _no_attribute(found, attribute, reference, where)
        found = getattr(found, attribute)
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
    """Turn whatever the user's code raises, `SystemExit` included, into an `InputError`."""
    try:
        yield
    except HesscliError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        hint = "try a smaller batch_size or another --device"
        raise UnsoundError("out of memory", _one_line(error), hint, user_frames(error)) from error
    except (Exception, SystemExit) as error:
        raise InputError(what, _one_line(error), hint, user_frames(error)) from error


def user_frames(error: BaseException) -> tuple[str, ...]:
    """Where the error passed through the user's own files, innermost last."""
    frames = [
        (frame.filename, frame.lineno, frame.name, frame.line)
        for frame in traceback.extract_tb(error.__traceback__)
        if _is_users(frame.filename)
    ]
    if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
        frames.append((error.filename, error.lineno, "<module>", (error.text or "").strip()))
    return tuple(
        f"  {name}:{line} in {function}\n    {source}"
        for name, line, function, source in frames[-_MOST_FRAMES:]
    )


@contextmanager
def importing_beside(folder: Path) -> Iterator[None]:
    """Import from the folder first, from here on; what an earlier folder brought is dropped.

    The folder stays first after the block, for user code also imports while it runs.
    """
    global _current
    folder = folder.resolve()
    if folder != _current:
        for name in _offered(folder) | (_offered(_current) if _current else set()):
            _forget_unless_from(folder, name)
        if _current is not None and str(_current) in sys.path:
            sys.path.remove(str(_current))
        sys.path.insert(0, str(folder))
        _current = folder
    importlib.invalidate_caches()
    yield


def _import(name: str, folder: Path, where: str) -> ModuleType:
    hint = "correct the module; its own lines are below"
    with importing_beside(folder), blamed_on_user(f"{where}: importing {name} failed", hint):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # A module that the user's module lacks is the user's error, not a wrong reference.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise _no_module(name, folder, where) from None
    top = name.split(".")[0]
    if top in _offered(folder) and _home(sys.modules[top]) != folder:
        got = f"{top} was already loaded from {_home(sys.modules[top])}"
        raise InputError(f"{where} names a module that is taken", got, f"rename it in {folder}")
    return module


def _no_module(name: str, folder: Path, where: str) -> InputError:
    known = sorted(_offered(folder))
    close = nearest(name, known)
    hint = f"did you mean {close!r}?" if close else "check the name before the colon"
    if known and not close:
        hint = f"beside the spec there is {', '.join(known[:5])}"
    return InputError(f"{where} names a module that is not there", f"{name!r}, {folder}", hint)


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
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _is_users(filename: str) -> bool:
    path = Path(filename)
    return path.is_file() and not any(path.is_relative_to(root) for root in {_OURS, *_INSTALLED})


def _offered(folder: Path) -> set[str]:
    """Names of the modules and packages that lie in a folder."""
    modules = {path.stem for path in folder.glob("*.py")}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return {name for name in modules | packages if name.isidentifier()}


def _home(module: ModuleType) -> Path | None:
    """The folder on the import path that a top-level module was found in."""
    if not (file := getattr(module, "__file__", None)):
        return None
    path = Path(file).resolve()
    return path.parent.parent if path.name == "__init__.py" else path.parent


def _forget_unless_from(folder: Path, name: str) -> None:
    """Drop a loaded module of another folder; installed ones and hesscli's own stay."""
    home = _home(sys.modules[name]) if name in sys.modules else None
    if home is None or home in {folder, _OURS.parent} or name == "__main__":
        return
    if any(home.is_relative_to(root) for root in _INSTALLED):
        return
    for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[loaded]
