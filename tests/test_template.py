"""The spec that `hesscli init` writes: guesses are marked, and what it guesses can be read."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hesscli.problem.factory import load_factory
from hesscli.problem.spec import read_spec
from hesscli.problem.template import write_template

SOURCE = """
import pathlib
import torch
from torch import nn
from torch.utils.data import Dataset

pathlib.Path(__file__).with_name("imported").touch()

class Block(nn.Module):
    def __init__(self, size):
        self.inner = nn.Linear(size, size)

class Base(nn.Module):
    pass

class Net(Base):
    def __init__(self, width: int, classes: int = 3):
        self.first = nn.Linear(4, width)
        self.second: nn.Module = nn.Linear(width, classes)

class Helper:
    pass

def train_loader(batch_size=4):
    return []

def load_data(path):
    return path
"""


def _net(outputs: int = 3) -> dict[str, torch.Tensor]:
    return {
        "first.weight": torch.zeros(8, 4),
        "first.bias": torch.zeros(8),
        "second.weight": torch.zeros(outputs, 8),
    }


def _write(folder: Path, state: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    torch.save(state, folder / "model.pt")
    text = write_template(folder / "model.pt")
    for line in text.splitlines():
        if line.startswith(("factory", "file", "inputs", "targets", "name")):
            assert "# a guess" in line or "REPLACE" in line
    return text, tomllib.loads(text)


def test_a_realistic_folder(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:\n")
    text, document = _write(tmp_path, _net())
    assert document["checkpoint"] == "model.pt"
    assert document["model"] == {"factory": "net:Net", "kwargs": {}}
    assert "Net(width: int, classes: int=3)" in text
    assert "or net:Base, net:Block" in text
    assert "Helper" not in text
    assert document["data"] == {"factory": "net:train_loader"}
    assert document["loss"] == {"name": "cross_entropy"}
    assert "3 tensors, 64 numbers" in text
    assert not (tmp_path / "imported").exists()
    (tmp_path / "model.toml").write_text(text)
    assert read_spec(tmp_path / "model.toml").checkpoint == tmp_path.resolve() / "model.pt"


def test_an_empty_folder_leaves_places_to_fill(tmp_path: Path) -> None:
    text, document = _write(tmp_path, _net(outputs=1))
    assert document["model"]["factory"] == document["data"]["factory"] == "REPLACE:REPLACE"
    assert document["loss"]["name"] == "mse"
    (tmp_path / "model.toml").write_text(text)
    assert read_spec(tmp_path / "model.toml").loss.name == "mse"


@pytest.mark.parametrize(
    ("tensors", "inputs", "targets", "loss"),
    [
        ({"images": torch.zeros(9, 4), "labels": torch.zeros(9).long()}, 0, 1, "cross_entropy"),
        ({"a": torch.zeros(9, 4), "b": torch.zeros(9)}, 0, 1, "mse"),
        (
            {"t": torch.zeros(9, 5).long(), "next_t": torch.zeros(9, 5).long()},
            0,
            1,
            "language_model",
        ),
    ],
)
def test_data_files(
    tmp_path: Path, tensors: dict[str, torch.Tensor], inputs: int, targets: int, loss: str
) -> None:
    save_file(tensors, tmp_path / "train.safetensors")
    save_file(tensors, tmp_path / "held_out.safetensors")
    save_file(_net(), tmp_path / "another_model.safetensors")
    _, document = _write(tmp_path, _net())
    names = list(tensors)
    expected = {"file": "train.safetensors", "inputs": names[inputs], "targets": names[targets]}
    assert document["data"] == expected
    assert document["loss"]["name"] == loss


def test_several_inputs(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(9, 2) for name in ("left", "right")} | {"label": torch.zeros(9)}
    save_file(tensors, tmp_path / "train.safetensors")
    assert sorted(_write(tmp_path, _net())[1]["data"]["inputs"]) == ["left", "right"]


def test_an_embedding_as_wide_as_the_outputs(tmp_path: Path) -> None:
    state = {"embedding.weight": torch.zeros(7, 4), "head.weight": torch.zeros(7, 4)}
    assert _write(tmp_path, state)[1]["loss"]["name"] == "language_model"


def test_odd_names_are_quoted(tmp_path: Path) -> None:
    tensors = {'in "quotes"\n': torch.zeros(9, 2), "targets\n[x]": torch.zeros(9)}
    save_file(tensors, tmp_path / "train.safetensors")
    _, document = _write(tmp_path, {"a\n[b]": torch.zeros(2, 2)})
    assert document["data"]["inputs"] == 'in "quotes"\n'
    assert document.keys() == {"checkpoint", "model", "data", "loss"}


def test_a_program_needs_no_model(tmp_path: Path) -> None:
    program = torch.export.export(
        nn.Linear(4, 3),
        (torch.zeros(2, 4),),
        dynamic_shapes={"input": {0: torch.export.Dim("batch")}},
    )
    torch.export.save(program, tmp_path / "model.pt2")
    assert "model" not in tomllib.loads(write_template(tmp_path / "model.pt2", trust=True))


def test_the_samples_are_guessed_right() -> None:
    samples = Path(__file__).parents[1] / "samples"
    specs = sorted(samples.glob("*/hesscli.toml"))
    assert specs
    for written in specs:
        spec = read_spec(written)
        assert spec.checkpoint is not None
        guess = tomllib.loads(write_template(spec.checkpoint))
        assert spec.model is not None
        assert spec.data.file is not None
        assert guess["model"]["factory"] == spec.model.factory
        assert guess["data"]["file"] == spec.data.file.name
        assert (guess["data"]["inputs"], guess["data"]["targets"]) == (
            spec.data.inputs,
            spec.data.targets,
        )
        assert guess["loss"]["name"] == spec.loss.name


def test_samples_load() -> None:
    from hesscli.problem.checkpoint import read_checkpoint
    from hesscli.problem.precision import as_wide
    from hesscli.problem.state_dict import load_state

    specs = sorted((Path(__file__).parents[1] / "samples").glob("*/hesscli.toml"))
    assert specs
    for written in specs:
        spec = read_spec(written)
        assert spec.model is not None
        assert spec.checkpoint is not None
        factory = load_factory(spec.model.factory, written.parent, "[model] factory")
        read = read_checkpoint(spec.checkpoint)
        model = factory(**spec.model.kwargs).to(as_wide(read.state.values()))
        load_state(model, read)
        assert all(
            torch.equal(model.state_dict()[name], value) for name, value in read.state.items()
        )


def test_a_folder_gets_a_path_that_is_right_from_where_the_spec_lies(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint"
    place.mkdir()
    save_file(_net(), place / "weights.safetensors")
    (place / "hesscli.toml").write_text(write_template(place))
    found = read_spec(place / "hesscli.toml").checkpoint
    assert found is not None
    assert found.samefile(place / "weights.safetensors")


def test_a_link_keeps_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    save_file(_net(), tmp_path / "blobs" / "0123")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    text = write_template(tmp_path / "model.safetensors")
    assert tomllib.loads(text)["checkpoint"] == "model.safetensors"


def test_one_of_several_sets_is_guessed(tmp_path: Path) -> None:
    torch.save({"netG": _net(), "netD": _net(outputs=1)}, tmp_path / "model.pt")
    text = write_template(tmp_path / "model.pt")
    assert tomllib.loads(text)["checkpoint_keys"] == {"key": "netD"}
    assert 'a guess; or "netG"' in text
