"""``hesscli spectrum`` as people and scripts run it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from program import SPEC, SUNSPOTS, hesscli_warm, three_lines
from safetensors.numpy import load_file

from hesscli.cli.app import main
from hesscli.errors import ExitCode

FILES = [
    f"{name}.{kind}"
    for name in ("spectrum", "spectrum_staircase", "spectrum_participation", "spectrum_convergence")
    for kind in ("png", "svg")
]


def test_as_a_person_runs_it(tmp_path: Path) -> None:
    run = hesscli_warm(
        "spectrum", SUNSPOTS, "-v", "--steps", 20, "--probes", 2, "--dir", "here", cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert "largest eigenvalue of the Hessian  561.8" in run.stdout
    assert "hidden1 92%" in run.stdout
    wrote = [line for line in run.stderr.splitlines() if line.startswith("wrote ")]
    names = ["spectrum.json", *FILES]
    assert wrote == [f"wrote {Path('here', name)}" for name in names]
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == sorted(names)


def test_as_a_script_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--vectors",
        "--k",
        3,
        "--layer",
        "head",
        "--probes",
        2,
        "--steps",
        12,
        "--out",
        "json",
    ]
    run = hesscli_warm("spectrum", SUNSPOTS, *options, "--dir", "here", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (tmp_path / "here" / "spectrum.json").read_text()
    document = json.loads(run.stdout)
    main(["schema"])
    jsonschema.validate(document, json.loads(capsys.readouterr().out))
    assert [e["end"] for e in document["eigenvalues"]] == ["top"] * 3 + ["bottom"] * 3
    top = document["eigenvalues"][0]
    assert abs(top["value"] - 561.80956488171) <= top["residual"] + 1e-9
    assert document["negative_mass"] == 0
    assert [layer["name"] for layer in document["layers"]] == ["head"]
    assert document["layers"][0]["density"]["bandwidth"] > 0
    assert "vectors" not in document
    vectors = load_file(tmp_path / document["files"]["tensors"])
    norms = sum(np.square(v).reshape(6, -1).sum(1) for v in vectors.values())
    np.testing.assert_allclose(norms, 1, atol=1e-10)


MISUSES = [
    ("spectrum --k 0", "--k must be", "--k 10"),
    ("spectrum --steps x", "--steps must be", "--steps 64"),
    ("spectrum --probes 0", "--probes must be", "--probes 5"),
    ("spectrum --bandwidth wide", "--bandwidth must be", "--bandwidth 10%"),
    ("spectrum --damping 0", "--damping must be", "--damping 1e-3"),
    ("spectrum --rtol 0", "--rtol must be", "--rtol 1%"),
    ("spectrum --exact-limit -1", "--exact-limit must be", "--exact-limit 5000"),
]


@pytest.mark.parametrize(("line", "what", "hint"), MISUSES)
def test_misuse_is_told_in_three_lines(
    line: str, what: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == ExitCode.USAGE
    first, got, third = three_lines(capsys.readouterr().err)
    assert first.startswith(what)
    assert line.split()[-1] in got
    assert hint in third


def test_a_dense_matrix_above_the_limit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["spectrum", str(SUNSPOTS), *SPEC, "--exact", "--exact-limit", "314", "--dir", "-"]
    assert main(line) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert three_lines(printed.err)[0] == "--exact is for at most 314 parameters"


@pytest.mark.parametrize(("asked", "code"), [(["--rtol", "0.1%"], 5), ([], 0)])
def test_an_unreached_tolerance_exits_5(
    asked: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["spectrum", str(SUNSPOTS), *SPEC, "--steps", "5", "--probes", "1", "--dir", "-", "-q"]
    assert main([*line, "--out", "json", *asked]) == code
    assert json.loads(capsys.readouterr().out)["status"] == "budget"


def test_ctrl_c_prints_the_result_so_far(tmp_path: Path) -> None:
    line = ("spectrum", SUNSPOTS, "--steps", 315, "--out", "json", "-v", "--dir", "-")
    run = hesscli_warm(*line, cwd=tmp_path, ctrl_c_at="iterating")
    assert run.returncode == 130, run.stderr
    assert "Traceback" not in run.stderr
    result = json.loads(run.stdout)
    assert result["status"] == "interrupted"
    assert 1 <= result["steps"] < 315
