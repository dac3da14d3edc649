"""What reaches which stream, in what width, and the code where neither can be written."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from program import HESSCLI, SPEC, environment, hesscli_warm, three_lines
from torch import nn

from hesscli.cli import console
from hesscli.cli.console import SIGN_OF_LIFE, SignsOfLife
from hesscli.results import Snapshot

HEADER = "import torch\nfrom torch import nn\n"
NET = "class Net(nn.Linear):\n    def __init__(self): super().__init__(6, 3)\n"
DATA = (
    "def dataset():\n"
    "    g = torch.Generator().manual_seed(1)\n"
    "    x, y = torch.randn(32, 6, generator=g), torch.randint(0, 3, (32,), generator=g)\n"
    "    return torch.utils.data.TensorDataset(x, y)\n"
)


def project(folder: Path, name: str, source: str, model: nn.Module | None = None) -> None:
    """A folder with a module of that name, a spec, and weights."""
    (folder / f"{name}.py").write_text(HEADER + source)
    (folder / "hesscli.toml").write_text(
        f'checkpoint = "model.pt"\n[model]\nfactory = "{name}:Net"\n'
        f'[data]\nfactory = "{name}:dataset"\n[loss]\nname = "cross_entropy"\n'
    )
    torch.save((model or nn.Linear(6, 3)).state_dict(), folder / "model.pt")


def test_stdout_is_the_document_alone_whatever_writes_to_it(tmp_path: Path) -> None:
    """By Python, past it, from a child, from a buffer in C, and as the process ends."""
    writes = (
        "import atexit, ctypes, os\n"
        "print('by print')\n"
        "os.write(1, b'by descriptor\\n')\n"
        "os.system('echo by a child')\n"
        "ctypes.CDLL(None).printf(b'from a buffer\\n')\n"
        "atexit.register(print, 'at the end')\n"
    )
    project(tmp_path, "net", writes + NET + DATA)
    line = [*HESSCLI, "check", "--out", "json", "--dir", "-"]
    run = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["command"] == "check"
    for said in ("by print", "by descriptor", "by a child", "from a buffer", "at the end"):
        assert said in run.stderr.splitlines()


def test_a_log_has_a_line_now_and_then() -> None:
    """Of a process that is 31 seconds old, with 15 of 60 products done since a phase began."""
    lines: list[str] = []
    signs = SignsOfLife(lines.append, time.monotonic() - SIGN_OF_LIFE - 1)
    start = Snapshot(phase="probing", done=5.0, total=60.0)
    later = Snapshot(phase="probing", done=20.0, total=60.0, estimate=12.5, interval=(11.25, 13.75))
    assert not signs.observe(start)
    assert not signs.observe(later)
    (line,) = lines
    assert line.partition(": ")[2] == "probing, 5 of 60, time left unknown"
    old = SignsOfLife(lines.append, time.monotonic() - SIGN_OF_LIFE - 1)
    old.observe(later)
    assert lines[1].endswith("probing, 20 of 60, time left unknown, 12.5 ± 1.2")
    SignsOfLife(lines.append, time.monotonic()).observe(later)
    assert len(lines) == 2


def test_signs_of_life_are_for_stderr_and_not_for_the_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SIGN_OF_LIFE", 0.0)
    line = ["trace", *SPEC, "--probes", "4", "--dir", "-", "--out", "json"]
    run = hesscli_warm(*line, cwd=tmp_path)
    assert json.loads(run.stdout)["command"] == "trace"
    assert any(": probing, " in said for said in run.stderr.splitlines())
    assert hesscli_warm(*line, "-q", cwd=tmp_path).stderr == ""


@pytest.mark.parametrize("columns", ["0", "", "-5", "wide"])
def test_a_width_that_is_none_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    run = hesscli_warm("check", *SPEC, "--dir", "-", cwd=tmp_path)
    assert run.returncode == 0
    assert "autodiff mode" in run.stdout


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (["schema"], 2),
        (["trace", "--rtol", "0%"], 2),
        (["trace", "nothing.pt"], 3),
        (["check", *SPEC, "--dir", "-"], 2),
    ],
)
def test_no_success_without_a_result(tmp_path: Path, line: list[str], code: int) -> None:
    """Both streams on a full disk: what went wrong first is what the code stands for."""
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [*HESSCLI, *line], cwd=tmp_path, env=environment(), stdout=full, stderr=full
        )
    assert run.returncode == code


def test_names_are_spelled_on_every_stream(tmp_path: Path) -> None:
    """Layers called with escapes that set a title, clear the screen and turn the writing."""
    bad = "a\x1b]0;title\x07\x1b[2J\u202e\r\nb\x9b"
    source = "class Net(nn.Sequential):\n    def __init__(self):\n        super().__init__()\n"
    source += f"        self.add_module({bad!r}, nn.Linear(6, 3))\n"
    model = nn.Sequential()
    model.add_module(bad, nn.Linear(6, 3))
    project(tmp_path, "net_c1", source + DATA, model)
    for words in (["trace", "--layer"], ["trace", "--layer", "c"], ["trace", "--out", "json"]):
        run = hesscli_warm(*words, "--dir", "-", cwd=tmp_path)
        text = run.stdout + run.stderr
        assert not [char for char in text if ord(char) < 32 and char != "\n"]
        assert not {"\x7f", "\x9b", "\u202e"} & set(text)
        assert "title" in text


def test_one_name_does_not_fill_the_screen(tmp_path: Path) -> None:
    project(tmp_path, "net_c2", NET + DATA)
    state = {**nn.Linear(6, 3).state_dict(), "x" * 100_000: torch.zeros(1)}
    torch.save(state, tmp_path / "model.pt")
    run = hesscli_warm("check", "--dir", "-", cwd=tmp_path)
    assert run.returncode == 3
    three_lines(run.stderr)
    assert len(run.stderr) < 2000


@pytest.mark.parametrize(
    ("option", "given", "meant"),
    [
        ("--matrix", "GGN", "ggn"),
        ("--matrix", "gauss-newton", "ggn"),
        ("--matrix", "Gauss_Newton", "ggn"),
        ("--matrix", "HESSIAN", "hessian"),
        ("--matrix", "empirical_fisher", "empirical-fisher"),
        ("--matrix", "hesian", "hessian"),
        ("--dtype", "fp64", "float64"),
        ("--dtype", "double", "float64"),
        ("--dtype", "torch.float64", "float64"),
        ("--dtype", "bf16", "bfloat16"),
        ("--dtype", "fp32", "float32"),
        ("--mode", "forward", "forward-over-reverse"),
        ("--out", "JSON", "json"),
    ],
)
def test_a_name_that_is_nearly_one_suggests_it(
    option: str, given: str, meant: str, tmp_path: Path
) -> None:
    run = hesscli_warm("trace", option, given, cwd=tmp_path)
    assert run.returncode == 2
    assert three_lines(run.stderr)[2] == f"{option} {meant}"


def test_a_window_takes_half_types_by_their_own_names(tmp_path: Path) -> None:
    run = hesscli_warm("ihvp", "--window-dtype", "bf16", cwd=tmp_path)
    assert three_lines(run.stderr)[2] == "--window-dtype bfloat16"


@pytest.mark.parametrize("command", ["check", "trace", "diag"])
def test_files_carry_the_matrix_where_it_is_not_the_hessian(tmp_path: Path, command: str) -> None:
    sets = []
    for matrix in ("hessian", "ggn"):
        line = [command, *SPEC, "--matrix", matrix, "--dir", "out"]
        options = [] if command == "check" else ["--probes", "2"]
        run = hesscli_warm(*line, *options, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        name = command if matrix == "hessian" else f"{command}-{matrix}"
        document = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert document["problem"]["matrix"] == matrix
        sets.append(document["files"])
        assert all((tmp_path / path).is_file() for path in document["files"].values())
    assert sets[0].keys() == sets[1].keys()
    assert not set(sets[0].values()) & set(sets[1].values())
