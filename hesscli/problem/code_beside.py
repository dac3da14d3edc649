"""What the Python files of a folder define: models and data, parsed and never imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from hesscli.problem.factory import is_standard, offered

_MODULES = {"Module", "LightningModule", "PreTrainedModel"}


@dataclass(frozen=True)
class ModelClass:
    """A class deriving from nn.Module, as its source shows it."""

    file: Path
    node: ast.ClassDef
    is_lightning: bool

    @property
    def reference(self) -> str:
        """As a spec names it."""
        return f"{self.file.stem}:{self.node.name}"

    @cached_property
    def attributes(self) -> frozenset[str]:
        """What its methods set on it, or on something else."""
        stored = (n for n in ast.walk(self.node) if isinstance(n, ast.Attribute))
        return frozenset(n.attr for n in stored if isinstance(n.ctx, ast.Store))

    @property
    def names(self) -> frozenset[str]:
        """All names that it speaks of, dotted ones by their last."""
        found = {n.attr for n in ast.walk(self.node) if isinstance(n, ast.Attribute)}
        return frozenset(found | {n.id for n in ast.walk(self.node) if isinstance(n, ast.Name)})

    @property
    def signature(self) -> str:
        """How it is called, in one line."""
        text = ast.unparse(self._arguments).removeprefix("self").lstrip(", ")
        return f"{self.node.name}({' '.join(text.split())})"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names that it can be called with."""
        arguments = self._arguments
        positional = [*arguments.posonlyargs, *arguments.args][1:]
        return tuple(a.arg for a in (*positional, *arguments.kwonlyargs))

    @property
    def takes_any(self) -> bool:
        """Whether it can be called with any other name too."""
        return self._arguments.kwarg is not None

    @property
    def required(self) -> tuple[str, ...]:
        """Those of its arguments that have no default."""
        arguments = self._arguments
        positional = [*arguments.posonlyargs, *arguments.args][1:]
        bare = positional[: len(positional) - len(arguments.defaults)]
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        return tuple(a.arg for a in (*bare, *(a for a, default in pairs if default is None)))

    @property
    def _arguments(self) -> ast.arguments:
        for part in self.node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                return part.args
        return ast.arguments([], [ast.arg("self")], None, [], [], None, [])


def find_models(folder: Path) -> Iterator[ModelClass]:
    """The classes that derive from nn.Module."""
    for path, tree in _sources(folder):
        known, lightning = set(_MODULES), {"LightningModule"}
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and _derives(node, known):
                known.add(node.name)
                if is_lightning := _derives(node, lightning):
                    lightning.add(node.name)
                yield ModelClass(path, node, is_lightning)


def find_loaders(folder: Path) -> Iterator[str]:
    """Functions without required arguments, and data sets, that are named like data."""
    for path, tree in _sources(folder):
        for node in tree.body:
            match node:
                case ast.FunctionDef() if not _needs_arguments(node.args):
                    name = node.name
                case ast.ClassDef() if _derives(node, {"Dataset"}):
                    name = node.name
                case _:
                    continue
            if "data" in name.lower() or "loader" in name.lower():
                yield f"{path.stem}:{name}"


def find_data_modules(folder: Path) -> Iterator[str]:
    """Lightning's own kind of data, as a line of Python imports it."""
    for path, tree in _sources(folder):
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and _derives(node, {"LightningDataModule"}):
                yield f"from {path.stem} import {node.name}"


def absent_imports(file: Path) -> list[str]:
    """Top-level modules that a file imports, and that are neither beside it nor installed."""
    tree = ast.parse(file.read_bytes())
    named: dict[str, None] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            named |= dict.fromkeys(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named[node.module.partition(".")[0]] = None
    near = offered(file.parent)
    return [n for n in named if not (n in near or is_standard(n)) and find_spec(n) is None]


def _sources(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.glob("*.py")):
        if path.stem.isidentifier():
            try:
                yield path, ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue


def _derives(node: ast.ClassDef, bases: set[str]) -> bool:
    return any(ast.unparse(base).split(".")[-1] in bases for base in node.bases)


def _needs_arguments(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    return positional > len(arguments.defaults) or None in arguments.kw_defaults
