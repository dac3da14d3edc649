"""Start-up stays fast, and the house keeps its floors: imports run downwards only."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import hesscli

PACKAGE = Path(hesscli.__file__).parent
HEAVY = {"torch", "numpy", "matplotlib", "scipy"}

# From the street up to the roof; a room may import from the floors below it.
FLOORS = [
    {"errors", "units", "commands", "heap"},
    {"vocabulary", "state", "world"},
    {"results"},
    {
        "arithmetic",
        "parameters",
        "randomness",
        "storage",
        "tensor_files",
        "memory",
        "meter",
        "pairing",
        "shards",
        "sums",
        "torch_private",
    },
    {"locks", "ledger"},
    {"joining"},
    {"problem"},
    {"operators"},
    {"engines"},
    {"diagnostics", "optim", "render"},
    {"cli"},
    {"__main__"},
]
RENDER_MAY_USE = {"render", "results", "commands", "vocabulary", "errors", "units"}
WITHOUT_TORCH = (
    "cli",
    "render",
    "results",
    "commands.py",
    "vocabulary.py",
    "errors.py",
    "units.py",
)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # ``from hesscli import x`` may name a room or a name that __init__ resolves.
            yield from (
                f"hesscli.{alias.name}" if node.module == "hesscli" else node.module
                for alias in node.names
            )


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """What a module imports when it is imported: outside functions and TYPE_CHECKING."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        pending.extend(ast.iter_child_nodes(node))


def floor(name: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("args", [["--help"], ["trace", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    program = (
        "import sys; from hesscli.cli.app import main; code = main(sys.argv[1:]);"
        "print(code, *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, check=True
    )
    code, *modules = run.stderr.split()
    assert code == "0"
    assert "hesscli" in run.stdout
    assert "typer" in modules
    assert not HEAVY & set(modules)


OWN_PARAMETER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(4, 6))
        self.mix = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.mix(x + self.places).mean(1)

def dataset():
    x = torch.randn(20, 4, 6, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, torch.arange(20) % 6)
"""
"""A model with parameters that are in no module of their own: their examples go through vmap."""


def test_a_run_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_PARAMETER)
    (tmp_path / "own.toml").write_text(
        'checkpoint = "own.pt"\n[model]\nfactory = "own:Net"\n[data]\nfactory = "own:dataset"\n'
        '[loss]\nname = "cross_entropy"\n'
    )
    mix = nn.TransformerEncoderLayer(6, 2, 8).state_dict(prefix="mix.")
    torch.save({"places": torch.zeros(4, 6), **mix}, tmp_path / "own.pt")
    own = f"{tmp_path / 'own.pt'} --spec {tmp_path / 'own.toml'}"
    program = (
        "import gc, sys; from hesscli.cli.app import main;"
        "[main([*line.split(), '--dir', '-']) for line in sys.argv[1:]];"
        "print(gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects()), file=sys.stderr);"
        "print(*sys.modules, file=sys.stderr)"
    )
    sunspots = "samples/sunspots/model.pt"
    lines = (
        f"trace {sunspots}",
        f"diag {sunspots} --matrix ggn",
        f"trace {sunspots} --method hutchinson --probes 2",
        f"spectrum {sunspots} --matrix fisher --steps 4 --probes 1",
        f"ihvp {sunspots}",
        f"trace {own} --matrix ggn",
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *lines],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    assert run.stdout.count(" parameters · loss") == len(lines)
    *_, collector, loaded = run.stderr.splitlines()
    on, frozen, others = collector.split()
    assert on == "True"
    assert int(frozen) > 10 * int(others), "the collector goes through all that modules hold"
    modules = set(loaded.split())
    assert {"hesscli.engines.lanczos", "hesscli.engines.mfac.window"} <= modules
    assert not {"sympy", "torch._dynamo", "scipy.stats", "matplotlib"} & modules


def test_imports_run_downwards() -> None:
    seen = 0
    for path in sources():
        here = room(module_name(path))
        if here == "__init__":  # the Python API names every room, lazily
            continue
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            there = room(name) if name.startswith("hesscli.") else None
            if there is None or there == "__version__":
                continue
            seen += 1
            below = floor(there) < floor(here)
            assert below or there == here, f"{path}: {here} imports {there}"
            if here == "render":
                assert there in RENDER_MAY_USE, f"{path}: render imports {there}"
    assert seen > 20


def test_torch_is_not_imported_where_results_are_shown() -> None:
    for part in WITHOUT_TORCH:
        place = PACKAGE / part
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            names = at_import_time(ast.parse(path.read_text(encoding="utf-8")))
            assert "torch" not in {name.partition(".")[0] for name in names}, path


def test_engines_know_no_problem() -> None:
    """They run on whatever makes products, as an optimizer's own step does."""
    engines = sorted((PACKAGE / "engines").rglob("*.py"))
    assert len(engines) > 10
    for path in engines:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        rooms = {room(name) for name in imported(tree) if name.startswith("hesscli.")}
        assert "problem" not in rooms, path
        assert not [
            n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "problem"
        ], path


def test_the_map_shows_rooms_that_there_are() -> None:
    """Of ``folder/room`` the file, and of ``folder/room.name`` that it has such a name."""
    told = (PACKAGE.parent / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"`([a-z]+)/(\w+)(?:\.(\w+))?(?:\(\.\.\.\))?`", told)
    rooms = [place for place in shown if (PACKAGE / place[0]).is_dir() and place[1] != "x"]
    assert len(rooms) > 10
    for folder, name, inner in rooms:
        place = PACKAGE / folder / name
        assert place.is_dir() or place.with_suffix(".py").is_file(), f"{folder}/{name}"
        if inner not in ("", "py"):
            assert hasattr(importlib.import_module(f"hesscli.{folder}.{name}"), inner), inner


def test_no_modules_import_each_other_round_about() -> None:
    """Not even where only a type checker looks, or a function is called."""
    names = {module_name(path): path for path in sources()}
    imports: dict[str, set[str]] = {}
    for name, path in names.items():
        found = set[str]()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inner & names.keys()) or {node.module}
        imports[name] = found & names.keys() - {name}
    assert sum(map(len, imports.values())) > 200
    while free := [name for name, needs in imports.items() if not needs & imports.keys()]:
        for name in free:
            del imports[name]
    assert not imports, f"in or behind a circle: {', '.join(sorted(imports))}"


@pytest.mark.parametrize("script", sorted(Path(__file__).parent.rglob("benchmarks/*.py")), ids=str)
def test_benchmarks_import_what_there_is(script: Path) -> None:
    """They are run by hand, so that nothing else would tell."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hesscli"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                known = hasattr(module, alias.name)
                assert known or importlib.util.find_spec(f"{node.module}.{alias.name}"), alias.name
