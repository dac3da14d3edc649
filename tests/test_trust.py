"""Whose code runs: the user's own, installed packages' and what is named or trusted; no other."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from program import HESSCLI, environment, hesscli_warm, three_lines
from safetensors.torch import save_file
from torch import nn

import hesscli
from hesscli.errors import InputError
from hesscli.problem.factory import load_factory

DATA = '[data]\nfile = "data.safetensors"\ninputs = "x"\ntargets = "y"\n'
LINEAR = 'factory = "torch.nn:Linear"\nkwargs = { in_features = 3, out_features = 2 }'


def download(parent: Path, model: str, spec: str = "hesscli.toml", **modules: str) -> Path:
    """A folder with weights, data, a spec, and modules that leave a mark where they run."""
    folder = parent / "download"
    folder.mkdir()
    save_file(nn.Linear(3, 2).state_dict(), folder / "model.safetensors")
    data = {"x": torch.randn(16, 3), "y": torch.randint(0, 2, (16,))}
    save_file(data, folder / "data.safetensors")
    text = f'[model]\n{model}\n{DATA}[loss]\nname = "cross_entropy"\n'
    (folder / spec).write_text(text)
    for name, body in modules.items():
        mark = f"import pathlib\npathlib.Path({str(parent / 'RAN')!r}).touch()\n"
        (folder / f"{name}.py").write_text(mark + body)
    return folder


NET = "from torch import nn\ndef Net(): return nn.Linear(3, 2)\n"


@pytest.mark.parametrize("spec", ["model.toml", "hesscli.toml"])
@pytest.mark.parametrize("given", ["model.safetensors", "."])
def test_a_spec_found_outside_the_working_folder_runs_nothing(
    tmp_path: Path, spec: str, given: str
) -> None:
    folder = download(tmp_path, 'factory = "net_u1:Net"', spec, net_u1=NET)
    if given == "." and spec == "model.toml":  # a folder's spec goes by the folder's name
        (folder / spec).rename(tmp_path / "download.toml")
    work = tmp_path / "work"
    work.mkdir()
    run = hesscli_warm("check", Path("../download", given), "--dir", "-", cwd=work)
    assert (run.returncode, run.stdout) == (3, "")
    what, got, hint = three_lines(run.stderr)
    assert "outside the working folder" in what
    assert "net_u1:Net" in got
    assert "--spec ../download" in hint
    assert "--trust" in hint
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("options", [["--spec", "../download/hesscli.toml"], ["--trust"]])
def test_naming_it_or_trusting_it_runs_it(tmp_path: Path, options: list[str]) -> None:
    folder = download(tmp_path, 'factory = "net_u2:Net"', net_u2=NET)
    work = tmp_path / "work"
    work.mkdir()
    run = hesscli_warm("check", folder / "model.safetensors", *options, "--dir", "-", cwd=work)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "RAN").exists(), (
        "the mark must work, or its absence elsewhere proves nothing"
    )


def test_the_same_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download(tmp_path, 'factory = "net_u3:Net"', net_u3=NET)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with pytest.raises(InputError, match="outside the working folder"):
        hesscli.load(folder / "model.safetensors")
    assert not (tmp_path / "RAN").exists()
    assert hesscli.load(folder / "model.safetensors", trust=True).parameters.size == 8


def test_ones_own_tree_is_ones_own(tmp_path: Path) -> None:
    download(tmp_path, 'factory = "net_u4:Net"', net_u4=NET)
    run = hesscli_warm("check", "download/model.safetensors", "--dir", "-", cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_a_link_leads_out_of_the_tree(tmp_path: Path) -> None:
    folder = download(tmp_path, 'factory = "net_u5:Net"', net_u5=NET)
    work = tmp_path / "work"
    work.mkdir()
    (work / "link").symlink_to(folder)
    run = hesscli_warm("check", "link/model.safetensors", "--dir", "-", cwd=work)
    assert run.returncode == 3
    assert not (tmp_path / "RAN").exists()


def test_ones_own_spec_is_offered_beside_the_stranger(tmp_path: Path) -> None:
    download(tmp_path, LINEAR)
    work = tmp_path / "work"
    work.mkdir()
    (work / "hesscli.toml").touch()
    run = hesscli_warm("check", "../download/model.safetensors", cwd=work)
    assert "--spec hesscli.toml is your own" in three_lines(run.stderr)[2]


@pytest.mark.parametrize(
    "reference",
    [
        "os:system",
        "posix:system",
        "subprocess:check_output",
        "builtins:exec",
        "importlib:import_module",
        "torch:os.system",
        "torch.serialization:os.unlink",
        "net_u6:os.system",
        "net_u6:run",
        "net_u6:Shell",
    ],
)
def test_nothing_of_the_standard_library_is_a_factory(tmp_path: Path, reference: str) -> None:
    text = "import os\nfrom os import system as run\nfrom subprocess import Popen as Shell\n"
    (tmp_path / "net_u6.py").write_text(text)
    with pytest.raises(InputError, match="comes with Python"):
        load_factory(reference, tmp_path, "[model] factory")


@pytest.mark.parametrize("table", ["model", "data", "loss", "step"])
def test_no_table_calls_the_standard_library(tmp_path: Path, table: str) -> None:
    folder = download(tmp_path, LINEAR)
    shell = 'factory = "os:system"\nkwargs = { command = "touch RAN" }\n'
    text = (folder / "hesscli.toml").read_text()
    text = {
        "model": text.replace(LINEAR, shell),
        "data": text.replace(DATA, f"[data]\n{shell}"),
        "loss": text.replace('name = "cross_entropy"', shell),
        "step": text.replace('name = "cross_entropy"', shell.replace("factory", "step")),
    }[table]
    (folder / "hesscli.toml").write_text(text)
    run = hesscli_warm("check", "model.safetensors", "--dir", "-", cwd=folder)
    assert run.returncode == 3
    assert "os comes with Python" in three_lines(run.stderr)[1]
    assert not (folder / "RAN").exists()


def test_ones_own_module_with_a_standard_name_is_told_to_be_renamed(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("class Net: pass\n")
    with pytest.raises(InputError, match=r"rename .*code"):
        load_factory("code:Net", tmp_path, "[model] factory")


def test_libraries_are_not_shadowed_by_what_lies_beside_a_spec(tmp_path: Path) -> None:
    """A fresh process, which has loaded none of them; the spec's folder is the working folder."""
    shadows = dict.fromkeys(("matplotlib", "numpy", "rich", "scipy", "json", "PIL"), "")
    folder = download(tmp_path, LINEAR, **shadows)
    line = [*HESSCLI, "trace", "model.safetensors", "--dir", "out", "--probes", "2"]
    run = subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (folder / "out" / "trace.png").exists()
    assert not (tmp_path / "RAN").exists()


def test_a_users_module_goes_before_an_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where the user runs a script beside it, such as the one that trained."""
    installed, own = tmp_path / "site", tmp_path / "own"
    for folder in (installed, own):
        folder.mkdir()
        (folder / "tools_u7.py").write_text(f"PLACE = {folder.name!r}\n")
    (own / "net_u7.py").write_text("import tools_u7\ndef where(): return tools_u7.PLACE\n")
    monkeypatch.syspath_prepend(str(installed))
    assert load_factory("net_u7:where", own, "[model] factory")() == "own"


def test_code_beside_the_spec_goes_before_that_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net_u8.py").write_text("def where(): return 'root'\n")
    assert load_factory("net_u8:where", configs, "[model] factory")() == "root"
    (configs / "net_u8.py").write_text("def where(): return 'configs'\n")
    monkeypatch.chdir(configs)  # another search, which forgets the first net_u8
    assert load_factory("net_u8:where", configs, "[model] factory")() == "configs"
    monkeypatch.chdir(tmp_path)
    assert load_factory("net_u8:where", configs, "[model] factory")() == "configs"
    with pytest.raises(InputError) as caught:
        load_factory("nowhere_u8:f", configs, "[model] factory")
    assert f"looked in {configs}, {tmp_path}" in caught.value.got
