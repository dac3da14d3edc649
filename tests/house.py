"""The measures of the house: how many rooms it has, and how far one walks through them.

``python tests/house.py [CHECKOUT ...]`` prints a column for each checkout, without a name for this
one. Everything is read from the sources but for two lines: which files one run of ``hesscli trace``
passes through, and how deeply its calls are nested.

``python tests/house.py --guess SEED 2> ANSWERS`` draws twenty functions and prints them beside the
tree of files: someone who has not seen the code names the file of each. What they miss is in the
wrong room, or in one with the wrong name.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parents[1]
CHECKPOINT = "samples/fashion/model.pt"
LARGE, SMALL = 600, 40
"""Lines: a file is one room, neither a hall nor a cupboard."""
ENTRIES = ("__init__", "__main__")

NodeT = TypeVar("NodeT", bound=ast.AST)


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """What it says."""
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        """All of them."""
        return len(self.text.splitlines())

    @property
    def floor(self) -> str:
        """The folder of the package that it lies in, or its own name."""
        return self.name.split(".")[1] if "." in self.name else self.name

    def find(self, kind: type[NodeT]) -> Iterator[NodeT]:
        """Nodes of a kind, wherever they stand."""
        return (node for node in ast.walk(self.tree) if isinstance(node, kind))

    @cached_property
    def docstrings(self) -> set[int]:
        """Lines of docstrings, and of strings that stand below what they explain."""
        texts = [
            node.value
            for node in self.find(ast.Expr)
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ]
        return {number for text in texts for number in _span(text)}

    @property
    def code(self) -> int:
        """Lines that are neither blank, nor comments, nor docstrings."""
        return sum(
            bool(line.strip()) and not line.lstrip().startswith("#")
            for number, line in enumerate(self.text.splitlines(), 1)
            if number not in self.docstrings
        )

    @property
    def import_lines(self) -> int:
        """Lines of import statements."""
        statements = [*self.find(ast.Import), *self.find(ast.ImportFrom)]
        return sum(len(_span(statement)) for statement in statements)


@dataclass(frozen=True)
class House:
    """The package in one checkout."""

    checkout: Path
    modules: dict[str, Module]

    @classmethod
    def at(cls, checkout: Path) -> House:
        """Read it."""
        modules = {}
        for path in sorted((checkout / "hesscli").rglob("*.py")):
            parts = path.relative_to(checkout).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = Module(name, path, path.read_text(encoding="utf-8"))
        assert modules, f"there is no hesscli in {checkout}"
        return cls(checkout, modules)

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """What each module imports of the package: within functions and for types too."""
        return {name: set(self._imported(module)) - {name} for name, module in self.modules.items()}

    def _imported(self, module: Module) -> Iterator[str]:
        for statement in module.find(ast.Import):
            yield from (alias.name for alias in statement.names if alias.name in self.modules)
        for origin in module.find(ast.ImportFrom):
            for alias in origin.names:
                inner = f"{origin.module}.{alias.name}"
                if inner in self.modules or origin.module in self.modules:
                    yield inner if inner in self.modules else str(origin.module)

    def reached(self, start: str) -> set[str]:
        """The modules that are imported where one is imported, by whatever way."""
        found, pending = set[str](), [start]
        while pending:
            new = self.imports[pending.pop()] - found
            found |= new
            pending += new
        return found

    def single_importers(self) -> dict[str, str]:
        """Modules that one other imports and nobody else, and which that is."""
        found = {}
        for name, module in self.modules.items():
            importers = [other for other, imported in self.imports.items() if name in imported]
            if len(importers) == 1 and module.path.stem not in ENTRIES:
                found[name] = importers[0]
        return found

    def circles(self) -> set[frozenset[str]]:
        """Groups of modules each of which imports all the others, by whatever way."""
        reached = {name: self.reached(name) for name in self.modules}
        return {
            frozenset(other for other in reached[name] if name in reached[other])
            for name in self.modules
            if name in reached[name]
        }

    def longest_signature(self) -> tuple[int, str]:
        """The most parameters of a function, and which one has them."""
        return max(
            (_parameters(function), f"{module.name}.{function.name}")
            for module in self.modules.values()
            for function in module.find(ast.FunctionDef)
        )

    def interruptions(self) -> Counter[str]:
        """Where KeyboardInterrupt is caught below the command line."""
        return Counter(
            module.name
            for module in self.modules.values()
            for handler in module.find(ast.ExceptHandler)
            if module.floor != "cli"
            and handler.type
            and "KeyboardInterrupt" in ast.unparse(handler.type)
        )

    def looks_at_the_budget(self) -> Counter[str]:
        """Where it is asked whether time is up."""
        return Counter(
            module.name
            for module in self.modules.values()
            for attribute in module.find(ast.Attribute)
            if attribute.attr == "out_of_time"
        )

    def engines_on_problem(self) -> list[str]:
        """Engines that import a problem's parts."""
        return [
            name
            for name, imported in self.imports.items()
            if self.modules[name].floor == "engines"
            and any(self.modules[there].floor == "problem" for there in imported)
        ]

    def odd_sizes(self) -> tuple[list[str], list[str]]:
        """Files that are too large, and those that are too small."""
        rooms = [m for m in self.modules.values() if m.path.stem not in ENTRIES]
        return [m.name for m in self.modules.values() if m.lines > LARGE], [
            m.name for m in rooms if m.lines < SMALL
        ]

    def walk(self) -> tuple[int, int]:
        """Files that one exact trace runs, and how deeply its calls are nested."""
        with tempfile.TemporaryDirectory() as scratch:
            sample, found = Path(CHECKPOINT).parent, Path(scratch, "walk.json")
            shutil.copytree(HERE / sample, Path(scratch, sample))
            environment = {"PYTHONPATH": str(self.checkout.resolve()), "OMP_NUM_THREADS": "1"}
            subprocess.run(
                [sys.executable, __file__, "--walk", str(found)],
                cwd=scratch,
                env=os.environ | environment,
                capture_output=True,
                check=True,
            )
            files, depth = json.loads(found.read_text())
        return len(files), depth

    def measures(self) -> dict[str, int]:
        """Every measure, by what it is called."""
        modules = self.modules.values()
        files_run, depth = self.walk()
        single = self.single_importers()
        large, small = self.odd_sizes()
        return {
            "files": len(modules),
            "lines": sum(module.lines for module in modules),
            "lines of code": sum(module.code for module in modules),
            "lines of docstrings": sum(len(module.docstrings) for module in modules),
            "lines of import statements": sum(module.import_lines for module in modules),
            f"files run for hesscli trace {CHECKPOINT}": files_run,
            "call depth of that": depth,
            "modules with one importer": len(single),
            "of them, in the same folder": sum(
                name.rpartition(".")[0] == importer.rpartition(".")[0]
                for name, importer in single.items()
            ),
            "import circles, for types and within functions too": len(self.circles()),
            "longest signature, parameters": self.longest_signature()[0],
            "except KeyboardInterrupt below cli/": self.interruptions().total(),
            "looks at out_of_time": self.looks_at_the_budget().total(),
            "engines that import problem/": len(self.engines_on_problem()),
            f"files above {LARGE} lines": len(large),
            f"files below {SMALL} lines": len(small),
        }

    def places(self) -> Iterator[str]:
        """Where what is counted stands."""
        parameters, function = self.longest_signature()
        yield f"longest signature: {function}, {parameters} parameters"
        yield from (f"circle: {', '.join(sorted(circle))}" for circle in self.circles())
        large, small = self.odd_sizes()
        counted = {
            "except KeyboardInterrupt": self.interruptions(),
            "out_of_time": self.looks_at_the_budget(),
            "engines that import problem/": self.engines_on_problem(),
            f"above {LARGE} lines": large,
            f"below {SMALL} lines": small,
            "one importer": self.single_importers(),
        }
        for what, names in counted.items():
            yield f"{what}: {', '.join(names) or 'none'}"


DRAWN = 20


def described(module: Module) -> Iterator[str]:
    """What functions and methods of a file do, told without the file; closures aside."""
    owners: list[tuple[str, list[ast.stmt]]] = [("", module.tree.body)]
    owners += [(f"{node.name}.", node.body) for node in module.find(ast.ClassDef)]
    for owner, body in owners:
        for function in body:
            if isinstance(function, ast.FunctionDef) and (told := ast.get_docstring(function)):
                result = f" -> {ast.unparse(function.returns)}" if function.returns else ""
                signature = f"{owner}{function.name}({ast.unparse(function.args)}){result}"
                yield f"{signature}\n    {told.splitlines()[0]}"


def guess(seed: int, house: House) -> None:
    """Print the tree and what twenty functions do; to stderr, where they are."""
    modules = house.modules.values()
    paths = {module.name: str(module.path.relative_to(house.checkout)) for module in modules}
    every = [(text, paths[module.name]) for module in modules for text in described(module)]
    print(*sorted(paths.values()), sep="\n", end="\n\n")
    for number, (text, path) in enumerate(random.Random(seed).sample(every, DRAWN), 1):
        print(f"{number:2} {text}")
        print(f"{number:2} {path}", file=sys.stderr)


def _span(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _parameters(function: ast.FunctionDef) -> int:
    given = function.args
    several = [one for one in (given.vararg, given.kwarg) if one is not None]
    return len([*given.posonlyargs, *given.args, *given.kwonlyargs, *several])


def watch(found: Path) -> int:
    """Run the command, and write down which files had a function run, and the greatest depth."""
    import hesscli
    from hesscli.cli.app import main as hesscli_main

    package = str(Path(hesscli.__file__).parent)
    nested, files = threading.local(), set[str]()
    deepest = 0

    def ours(code: CodeType) -> bool:
        """Functions alone: the bodies of modules and classes are not optimized."""
        return bool(code.co_flags & inspect.CO_OPTIMIZED) and code.co_filename.startswith(package)

    def look(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal deepest
        if event not in ("call", "return") or not ours(frame.f_code):
            return
        depth = getattr(nested, "depth", 0) + (1 if event == "call" else -1)
        nested.depth = depth
        deepest = max(deepest, depth)
        files.add(frame.f_code.co_filename)

    threading.setprofile(look)
    sys.setprofile(look)
    code = hesscli_main(["trace", CHECKPOINT])
    sys.setprofile(None)
    found.write_text(json.dumps([sorted(files), deepest]))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measures of each checkout, and where the last one's counts stand."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--walk"]:
        return watch(Path(words[1]))
    if words[:1] == ["--guess"]:
        guess(int(words[1]), House.at(HERE))
        return 0
    houses = [House.at(Path(word)) for word in words or [str(HERE)]]
    columns = [house.measures() for house in houses]
    for name in columns[0]:
        print(f"{name:52}", *(f"{column[name]:>8}" for column in columns))
    print(*houses[-1].places(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
