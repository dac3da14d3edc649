"""``hesscli ihvp`` as people and scripts run it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from program import SPEC, SUNSPOTS, hesscli_warm, three_lines
from safetensors.numpy import load_file, save_file

from hesscli.cli.app import main

PICTURES = ("ihvp", "ihvp_saliency", "ihvp_damping")


def test_ihvp_out_json_runs_as_it_stands_in_a_sample(tmp_path: Path, capsys) -> None:
    """Literally the words of the README, but for where files go."""
    run = hesscli_warm("ihvp", "--out", "json", "--dir", tmp_path, cwd=SUNSPOTS.parent)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    main(["schema"])
    jsonschema.validate(document, json.loads(capsys.readouterr().out))
    assert run.stdout == (tmp_path / "ihvp.json").read_text()
    assert document["files"] == {
        "json": str(tmp_path / "ihvp.json"),
        "tensors": str(tmp_path / "saliency.safetensors"),
        "png": str(tmp_path / "ihvp.png"),
        "svg": str(tmp_path / "ihvp.svg"),
        "png_saliency": str(tmp_path / "ihvp_saliency.png"),
        "svg_saliency": str(tmp_path / "ihvp_saliency.svg"),
        "png_damping": str(tmp_path / "ihvp_damping.png"),
        "svg_damping": str(tmp_path / "ihvp_damping.svg"),
    }
    assert {"rows", "row_kind", "damping", "blocks", "dtype"} <= set(document["window"])
    assert {"window", "operator", "operator_name"} <= set(document["residual"])
    for layer in document["layers"]:
        assert {"saliency", "leverage", "perturbations"} <= set(layer)
        for change in layer["perturbations"]:
            assert change["measured"] is None
            assert {"kind", "level", "granularity", "linear", "quadratic", "hawq"} <= set(change)
    saliency = load_file(tmp_path / "saliency.safetensors")
    shapes = {p["name"]: p["shape"] for layer in document["layers"] for p in layer["parameters"]}
    assert {name: list(t.shape) for name, t in saliency.items()} == shapes
    assert all((t >= 0).all() for t in saliency.values())


def test_verify_shows_measured_losses(tmp_path: Path) -> None:
    run = hesscli_warm("ihvp", SUNSPOTS, "--verify", "--dir", "here", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "here" / "ihvp_calibration.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "here" / "ihvp.json").read_text())
    changes = [c for layer in document["layers"] for c in layer["perturbations"]]
    assert all(c["measured"] is not None and len(c["changes"]) == 3 for c in changes)
    broken = sum(not c["holds"] for c in changes)
    assert 0 < broken < len(changes) / 2  # two bits are too few for a quadratic
    assert f"{broken} of {len(changes)} changes are too large" in run.stderr
    assert "measured" in run.stdout


def test_a_warning_says_how_far_the_window_is_from_the_matrix(tmp_path: Path) -> None:
    """In units of what was solved for, and not where the matrix itself was solved with."""
    few = ("ihvp", SUNSPOTS, "--vector", "gradient", "--window", "16", "--matrix", "ggn")
    for refined in ((), ("--refine", "0.05")):
        run = hesscli_warm(*few, *refined, "--out", "json", "--dir", "-", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        residual = json.loads(run.stdout)["residual"]["operator"]
        said = f"there its residual is {residual:.3g} times as long as the vector"
        assert (said in " ".join(run.stderr.split())) == (residual > 0.1) == (not refined)


def test_a_direction_is_solved_written_and_read_again(tmp_path: Path) -> None:
    first = hesscli_warm("ihvp", SUNSPOTS, "--vector", "gradient", "--dir", "a", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    direction = load_file(tmp_path / "a" / "ihvp.safetensors")
    assert not (tmp_path / "a" / "saliency.safetensors").exists()
    save_file({name: np.ones_like(t) for name, t in direction.items()}, tmp_path / "ones.st")
    options = ("--vector", "ones.st", "--damping", "10", "--matrix", "ggn", "--refine", "1e-2")
    run = hesscli_warm("ihvp", SUNSPOTS, *options, "--out", "json", "--dir", "-", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert document["solve"]["vector"] == "ones.st"
    assert document["solve"]["vector_norm"] == pytest.approx(315**0.5)
    assert document["solve"]["refinement"]["residual"] <= 1e-2
    assert document["residual"]["operator"] <= 1e-2
    assert document["layers"] == []
    assert document["ranking"] is None


def test_a_refinement_that_was_not_reached_exits_5(tmp_path: Path) -> None:
    options = ("--vector", "gradient", "--refine", "1e-30", "--damping", "1", "--dir", "-")
    run = hesscli_warm("ihvp", SUNSPOTS, *options, cwd=tmp_path)
    assert run.returncode == 5, run.stderr
    assert "residual" in run.stdout


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--rows", "samples"], 2, "microbatch:32"),
        (["--rows", "microbatch:0"], 2, "microbatch:32"),
        (["--window", "0"], 2, "--window 512"),
        (["--window", "8"], 2, "16 rows"),
        (["--window", "99999999999"], 2, "--window-file FILE"),
        (["--window-dtype", "float16"], 2, "bfloat16"),
        (["--window-file", "/nowhere/window"], 2, "its folder does not exist"),
        (["--blocks", "layers"], 2, "--blocks 64"),
        (["--damping", "0"], 2, "abs:1e-5"),
        (["--damping", "abs:-1"], 2, "abs:1e-5"),
        (["--refine", "2"], 2, "--refine 1e-3"),
        (["--vector", "missing.safetensors"], 3, "file not found"),
        (["--vector", "other.st"], 3, "no hidden1.weight"),
        (["--vector", "garbage.st"], 3, "cannot be read"),
        (["--vector", "nan.st"], 3, "not finite"),
        (["--layer", "hiden1"], 2, "hidden1"),
    ],
)
def test_ihvp_refuses_in_three_lines(
    options: list[str], code: int, words: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"other": np.ones(3)}, "other.st")
    Path("garbage.st").write_bytes(b"no safetensors")
    shapes = {"hidden1.weight": (18, 12), "hidden1.bias": (18,), "hidden2.weight": (4, 18)}
    shapes |= {"hidden2.bias": (4,), "head.weight": (1, 4), "head.bias": (1,)}
    save_file({n: np.full(shape, np.nan) for n, shape in shapes.items()}, "nan.st")
    assert main(["ihvp", str(SUNSPOTS), *SPEC, *options]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert words in " ".join(three_lines("\n".join(lines[-3:])))
    assert not Path("hesscli-out", "sunspots-model", "ihvp.json").exists()


def test_a_window_in_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    options = ("--window-file", "window", "--window", "64", "--out", "json", "--dir", "-")
    run = hesscli_warm("ihvp", SUNSPOTS, *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["window"]["file"] == "window"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_prints_the_ranking_so_far(tmp_path: Path) -> None:
    options = ("--verify", "-v", "--dir", "-", "--out", "json")
    run = hesscli_warm("ihvp", SUNSPOTS, *options, cwd=tmp_path, ctrl_c_at="perturbing")
    assert run.returncode == 130, run.stderr
    assert "Traceback" not in run.stderr
    document = json.loads(run.stdout)
    assert document["status"] == "interrupted"
    assert document["ranking"]["layers"]


def test_check_plans_the_window(tmp_path: Path) -> None:
    line = ("check", SUNSPOTS, "--window", "1024", "--out", "json", "--dir", "-")
    run = hesscli_warm(*line, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    plans = {plan["command"]: plan for plan in json.loads(run.stdout)["plan"]["commands"]}
    plan = plans["ihvp"]
    # 1024 rows of 315 float32 numbers.
    assert "1024 rows take 1.2 MiB" in plan["note"]
    assert plan["products"] >= 1 + 6  # of the solution, and for each damping
    assert plan["seconds"] > 0
