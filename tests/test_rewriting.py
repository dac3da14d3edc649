"""A checkpoint that is written once more differs from the first in the weights that were meant."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hesscli.errors import InputError
from hesscli.parameters import Parameters
from hesscli.problem.checkpoint import read_checkpoint
from hesscli.problem.parts import Origin
from hesscli.problem.rewriting import Rewriting
from hesscli.problem.torch_files import verify_archive


class Tied(nn.Module):
    """Two names for one tensor, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3))


def tied(dtype: torch.dtype = torch.float32) -> Tied:
    torch.manual_seed(0)
    return Tied().to(dtype)


def rewritten(path: Path, model: nn.Module, **found: Any) -> tuple[Path, Tensor]:
    """The file with all weights set to halves of small numbers, which any type holds."""
    parameters = Parameters.of(model)
    vector = torch.arange(parameters.size) % 8 / 2
    again = path.with_name(f"again{path.suffix}")
    with again.open("xb+") as stream:
        Rewriting(path, parameters, Origin(**found)).writer(vector.double())(stream)
    return again, vector


def as_saved(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict())


def in_a_training_run(model: nn.Module) -> dict[str, Any]:
    """With things beside the weights that need code to load."""
    moments = {i: {"exp_avg": torch.ones_like(p)} for i, p in enumerate(model.parameters())}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.1, "params": list(moments)}]}
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    args = argparse.Namespace(lr=0.1)
    return {"epoch": 3, "args": args, "optimizer": optimizer, "model": state}


@pytest.mark.parametrize("held", [as_saved, in_a_training_run])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_archive_keeps_all_but_the_weights(
    held: Callable[[nn.Module], dict[str, Any]], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, path = tied(dtype), tmp_path / "model.pt"
    torch.save(held(model), path)
    again, vector = rewritten(path, model)
    assert verify_archive(again)
    with zipfile.ZipFile(path) as one, zipfile.ZipFile(again) as other:
        assert other.testzip() is None
        assert one.namelist() == other.namelist()
        assert one.read("model/data.pkl") == other.read("model/data.pkl")
    old, new = (torch.load(each, weights_only=False) for each in (path, again))
    new_state, old_state = new.get("model", new), old.get("model", old)
    assert list(new_state) == list(old_state)
    parts = dict(zip(Parameters.of(model).names, Parameters.of(model).split(vector), strict=True))
    parts["head.weight"] = parts["embed.weight"]
    for name, value in new_state.items():
        plain = name.removeprefix("module.")
        assert torch.equal(value, parts[plain].to(dtype) if plain in parts else old_state[name])
        assert value.dtype == old_state[name].dtype
    if "optimizer" in old:
        assert repr(old["optimizer"]) == repr(new["optimizer"])
        assert new["args"] == old["args"]


def test_an_archive_without_checksums_has_none_afterwards(tmp_path: Path) -> None:
    model, path = tied(), tmp_path / "model.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(before)
    again, vector = rewritten(path, model)
    assert not verify_archive(again)
    assert torch.equal(read_checkpoint(again).state["embed.weight"].flatten(), vector[:28])


def test_safetensors_keep_their_header(tmp_path: Path) -> None:
    model, path = tied(), tmp_path / "model.safetensors"
    state = {f"net.{n}": v for n, v in model.state_dict().items() if n != "head.weight"}
    save_file(state, path, {"format": "pt", "note": "kept"})
    again, vector = rewritten(path, model)
    headers = []
    for each in (path, again):
        raw = each.read_bytes()
        headers.append(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert headers[0] == headers[1]
    assert json.loads(headers[0])["__metadata__"]["note"] == "kept"
    found = read_checkpoint(again).state
    assert torch.equal(found["net.embed.weight"].flatten(), vector[:28])
    assert torch.equal(found["net.head.bias"], vector[28:])
    assert torch.equal(found["net.steps"], torch.arange(3))


def test_the_set_of_weights_that_was_meant_is_the_one_that_changes(tmp_path: Path) -> None:
    model, path = tied(), tmp_path / "model.pt"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"model": state, "model_ema": model.state_dict()}, path)
    again, vector = rewritten(path, model, key="model_ema")
    old, new = torch.load(path), torch.load(again)
    assert torch.equal(new["model"]["embed.weight"], old["model"]["embed.weight"])
    assert torch.equal(new["model_ema"]["head.weight"].flatten(), vector[:28])


def save_legacy(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


def save_another(model: nn.Module, path: Path) -> None:
    torch.save({name: value + 1 for name, value in model.state_dict().items()}, path)


def save_renamed(model: nn.Module, path: Path) -> None:
    torch.save({name.upper(): value for name, value in model.state_dict().items()}, path)


def save_packed(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("save", [save_legacy, save_another, save_renamed, save_packed])
def test_what_cannot_be_written_so_is_refused(
    save: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    model, path = tied(), tmp_path / "model.pt"
    save(model, path)
    with pytest.raises(InputError, match="written anew"):
        Rewriting(path, Parameters.of(model), Origin())
