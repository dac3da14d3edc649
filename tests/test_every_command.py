"""What holds for every command that measures, whichever it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from program import SUNSPOTS, hesscli_warm

from hesscli.commands import COMMANDS

LAYERS = {"hidden1", "hidden2", "head"}
FEW = {
    "trace": ("--method", "hutchinson", "--probes", 4),
    "diag": ("--method", "hutchinson", "--probes", 4),
    "ihvp": ("--window", 32),
    "spectrum": ("--steps", 8, "--probes", 2),
}
"""Little work, of the kind that each does."""


def named(text: str) -> set[str]:
    """The sample's layers that a text names, or the tensors of."""
    return {layer for layer in LAYERS if re.search(rf"\b{layer}\b", text)}


MEASURED = [name for name, command in COMMANDS.items() if command.figures]


@pytest.mark.parametrize("command", MEASURED)
def test_layer_restricts_table_pictures_and_document_alike(command: str, tmp_path: Path) -> None:
    line = (command, SUNSPOTS, *FEW[command], "--dir", ".", "--layer", "head")
    run = hesscli_warm(*line, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert named(run.stdout) <= {"head"}
    document = json.loads((tmp_path / f"{command}.json").read_text())
    assert [layer["name"] for layer in document["layers"]] == ["head"]
    pictures = [Path(path) for kind, path in document["files"].items() if kind.startswith("svg")]
    drawn = [named("\n".join(comments(tmp_path / picture))) for picture in pictures]
    assert {"head"} in drawn
    assert all(names <= {"head"} for names in drawn)


def comments(picture: Path) -> list[str]:
    """The texts of a picture, which are drawn as outlines."""
    return re.findall("<!-- (.*?) -->", picture.read_text(encoding="utf-8"))
