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
from hesscli.problem.state_dict import load_state
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
    files = Rewriting(Origin(file=path, **found), parameters).files(vector.double(), "again")
    assert list(files) == ["checkpoint"]
    assert files["checkpoint"][0] == again.name
    with again.open("xb+") as stream:
        files["checkpoint"][1](stream)
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


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
def test_shards_are_written_as_they_were_with_their_index(kind: str, tmp_path: Path) -> None:
    model = tied(torch.bfloat16)
    state = {f"net.{n}": v.clone() for n, v in model.state_dict().items()}
    index = tmp_path / f"model{kind}.index.json"
    of = {name: f"{number}-of-{len(state)}{kind}" for number, name in enumerate(reversed(state))}
    index.write_text(json.dumps({"metadata": {"kept": 1}, "weight_map": of}))
    for name, file in of.items():
        beside = {name: state[name], "another's": torch.ones(2)}
        if kind == ".bin":
            torch.save(beside, tmp_path / file)
        else:
            save_file(beside, tmp_path / file, {"format": "pt"})
    parameters = Parameters.of(model)
    rewriting = Rewriting(Origin(file=index), parameters)
    vector = torch.arange(parameters.size).double() / 3
    files = rewriting.files(vector, "prune")
    (again := tmp_path / "again").mkdir()
    for file, write in files.values():
        with (again / file).open("xb+") as stream:
            write(stream)
    assert {path.name for path in again.iterdir()} == {index.name, *of.values()}
    assert (again / files["checkpoint"][0]).read_bytes() == index.read_bytes()
    found = read_checkpoint(again / index.name).state
    rounded = rewriting.rounded(vector)
    assert not torch.equal(rounded, vector)
    for name, part in zip(parameters.names, parameters.split(rounded), strict=True):
        assert torch.equal(found[f"net.{name}"].double(), part)
    assert torch.equal(found["net.steps"], torch.arange(3))
    index.write_text(json.dumps({"weight_map": {n: f"again/{f}" for n, f in of.items()}}))
    with pytest.raises(InputError, match="in another folder"):
        Rewriting(Origin(file=index), parameters)


def test_weights_have_the_narrowest_type_of_their_copies(tmp_path: Path) -> None:
    model, path = tied(torch.bfloat16).float(), tmp_path / "model.pt"
    state = dict(model.state_dict())
    state["head.weight"] = state["head.weight"].bfloat16()
    torch.save(state, path)
    parameters = Parameters.of(model)
    rewriting = Rewriting(Origin(file=path), parameters)
    vector = torch.full((parameters.size,), 1 / 3, dtype=torch.float64)
    expected = torch.full_like(vector, float(torch.tensor(1 / 3).bfloat16()))
    expected[28:] = float(torch.tensor(1 / 3))
    assert torch.equal(rewriting.rounded(vector), expected)


def test_names_are_those_that_the_weights_were_loaded_by(tmp_path: Path) -> None:
    """Another set of the same names and values is not the model's."""
    model, path = tied(), tmp_path / "model.pt"
    state = model.state_dict()
    copies = {f"{p}.{n}": v.clone() for p in ("ema", "own") for n, v in state.items()}
    torch.save(copies, path)
    loaded = load_state(model, read_checkpoint(path), strip="own.", ignore=["ema.*"])
    again, vector = rewritten(path, model, names=loaded.names)
    new = torch.load(again)
    assert torch.equal(new["own.embed.weight"].flatten(), vector[:28])
    assert torch.equal(new["ema.embed.weight"], state["embed.weight"])


def test_weights_that_were_renamed_are_known_by_their_entries(tmp_path: Path) -> None:
    """As a library renames them on the way; one that was not is known by its name."""
    model, path = tied(), tmp_path / "model.safetensors"
    state = model.state_dict()
    held = {"tokens": state["embed.weight"], "head.bias": state["head.bias"], "n": torch.ones(7)}
    save_file(held, path)
    again, vector = rewritten(path, model)
    found = read_checkpoint(again).state
    assert torch.equal(found["tokens"].flatten(), vector[:28])
    assert torch.equal(found["head.bias"], vector[28:])
    assert torch.equal(found["n"], torch.ones(7))


def shared_by_two(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"one.weight": state["two.weight"]}


def shared_with_what_stays(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"steps": state["two.weight"][:1]}


def spread_from_one_row(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"one.weight": state["one.weight"][:1].clone().expand(3, 3)}


def interleaved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    both = torch.stack([state["one.weight"], state["two.weight"]], 1)
    return state | {"one.weight": both[:, 0], "two.weight": both[:, 1]}


@pytest.mark.parametrize(
    ("share", "fine"),
    [
        (shared_by_two, False),
        (shared_with_what_stays, False),
        (spread_from_one_row, False),
        (interleaved, True),
    ],
)
def test_weights_that_share_memory_in_the_file_alone(
    share: Callable[[dict[str, Tensor]], dict[str, Tensor]], fine: bool, tmp_path: Path
) -> None:
    """Two parameters cannot be written to one place, each with its own values."""
    model, path = (
        nn.ModuleDict({n: nn.Linear(3, 3, bias=False) for n in ("one", "two")}),
        tmp_path / "m.pt",
    )
    model.register_buffer("steps", torch.zeros(1, 3))
    state = share({name: value.clone() for name, value in model.state_dict().items()})
    torch.save(state, path)
    model.load_state_dict(state)
    if fine:
        again, vector = rewritten(path, model)
        state = torch.load(again)
        assert torch.equal(torch.cat([state[f"{n}.weight"].flatten() for n in model]), vector)
    else:
        with pytest.raises(InputError, match="written anew"):
            Rewriting(Origin(file=path), Parameters.of(model))


def save_legacy(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


def save_another(model: nn.Module, path: Path) -> None:
    torch.save({name: value + 1 for name, value in model.state_dict().items()}, path)


def save_twice(model: nn.Module, path: Path) -> None:
    """By names that nobody knows, two of which have the same weights."""
    weight = model.state_dict()["embed.weight"]
    torch.save({"a": weight.clone(), "b": weight.clone()}, path)


def save_packed(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("save", [save_legacy, save_another, save_twice, save_packed])
def test_what_cannot_be_written_so_is_refused(
    save: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    model, path = tied(), tmp_path / "model.pt"
    save(model, path)
    with pytest.raises(InputError, match="written anew"):
        Rewriting(Origin(file=path), Parameters.of(model))
