"""Errors of the user's own code, whatever they are: exit 3, three lines, and its own frames."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import hesscli_warm
from test_console import DATA, NET, project

RAISED = {
    "ValueError('first\\nsecond')": "ValueError: first",
    "ValueError()": "ValueError",
    "SystemExit(0)": "SystemExit: 0",
    "GeneratorExit('closed')": "GeneratorExit: closed",
    "StopIteration(3)": "StopIteration: 3",
    "asyncio.CancelledError()": "CancelledError",
    "ExceptionGroup('both', [ValueError(1)])": "ExceptionGroup: both",
    "RecursionError('deep')": "RecursionError: deep",
    "UnicodeDecodeError('utf-8', b'x', 0, 1, 'odd')": "UnicodeDecodeError",
    "SyntaxError('odd', (None, None, None, None))": "SyntaxError",
    "Mute()": "Mute",
    "ValueError('a\\x1b[2Jb')": "ValueError: a\\x1b[2Jb",
    "ValueError('x' * 10**6)": "ValueError: xxx",
}
MUTE = (
    "import asyncio\n"
    "class Mute(Exception):\n"
    "    def __str__(self): raise RuntimeError('nor can it say what')\n"
    "    __repr__ = __str__\n"
)


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("place", ["import", "model", "data"])
def test_whatever_a_factory_raises(tmp_path: Path, raised: str, place: str) -> None:
    source = {
        "import": f"raise {raised}\n",
        "model": f"def Net(): raise {raised}\n{DATA}",
        "data": f"{NET}def dataset(): raise {raised}\n",
    }[place]
    project(tmp_path, "net_e1", MUTE + source)
    run = hesscli_warm("check", "--dir", "-", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (3, "")
    what, got, hint, *frames = run.stderr.splitlines()
    assert what.startswith("error: [")
    assert RAISED[raised] in got
    assert hint.startswith("  try: ")
    assert frames == [] or any("net_e1.py" in frame for frame in frames)
    assert len(run.stderr) < 5000
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("calls", [1, 4, 12, 30])
@pytest.mark.parametrize("raised", ["SystemExit(0)", "RuntimeError('now')"])
def test_a_model_that_fails_after_so_many_calls(tmp_path: Path, raised: str, calls: int) -> None:
    """Wherever it does, it is no success, and not taken for a bug of hesscli."""
    source = (
        f"{NET}"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        Net.calls += 1\n"
        f"        if Net.calls >= {calls}: raise {raised}\n"
        "        return super().forward(x)\n"
    )
    project(tmp_path, "net_e2", source + DATA)
    run = hesscli_warm(
        "trace", "--dir", "-", "--method", "hutchinson", "--probes", 64, cwd=tmp_path
    )
    assert run.returncode in (3, 4), run.stderr
    assert "has a bug" not in run.stderr
    assert run.stdout == ""
