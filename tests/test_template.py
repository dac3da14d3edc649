"""The spec that `hesscli init` writes: guesses are marked, and what it guesses can be read."""

from __future__ import annotations

import datetime
import json
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hesscli.errors import InputError
from hesscli.problem.builders import named
from hesscli.problem.factory import PACKAGES, load_factory
from hesscli.problem.loading import load
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
    return _guess(folder / "model.pt")


def _guess(checkpoint: Path) -> tuple[str, dict[str, Any]]:
    """What is written for a checkpoint; each line that is no fact says so."""
    template = write_template(checkpoint)
    for line in template.text.splitlines():
        if line.startswith(("factory =", "file =", "inputs =", "targets =", "name =")):
            assert "# a guess" in line or "REPLACE" in line
    left = sum("REPLACE" in line for line in template.text.splitlines())
    assert len(template.to_fill_in) == left
    return template.text, tomllib.loads(template.text)


def test_a_realistic_folder(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:\n")
    text, document = _write(tmp_path, _net())
    assert document["checkpoint"] == "model.pt"
    assert document["model"] == {"factory": "net:Net", "kwargs": {"width": "REPLACE"}}
    assert "Net(width: int, classes: int=3)" in text
    assert "or net:Base, net:Block" in text
    assert "Helper" not in text
    assert document["data"] == {"factory": "net:train_loader"}
    assert document["loss"] == {"name": "cross_entropy"}
    assert "3 tensors, 64 numbers" in text
    assert not (tmp_path / "imported").exists()
    (tmp_path / "model.toml").write_text(text)
    with pytest.raises(InputError, match="not filled in yet") as caught:
        read_spec(tmp_path / "model.toml")
    assert caught.value.got.endswith("model.toml: [model] kwargs width")
    (tmp_path / "model.toml").write_text(text.replace('"REPLACE"', "8"))
    assert read_spec(tmp_path / "model.toml").checkpoint == tmp_path.resolve() / "model.pt"


def test_an_empty_folder_leaves_places_to_fill(tmp_path: Path) -> None:
    text, document = _write(tmp_path, _net(outputs=1))
    assert document["model"]["factory"] == document["data"]["factory"] == "REPLACE:REPLACE"
    assert document["loss"]["name"] == "mse"
    (tmp_path / "model.toml").write_text(text.replace("REPLACE", "net"))
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
    log = {name: torch.zeros(5, *value.shape) for name, value in _net().items()}
    save_file(log | {"lr": torch.zeros(5)}, tmp_path / "log_of_updates.safetensors")
    _, document = _write(tmp_path, _net())
    names = list(tensors)
    expected = {"file": "train.safetensors", "inputs": names[inputs], "targets": names[targets]}
    assert document["data"] == expected
    assert document["loss"]["name"] == loss


def test_several_inputs(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(9, 2) for name in ("left", "right")} | {"label": torch.zeros(9)}
    save_file(tensors, tmp_path / "train.safetensors")
    assert sorted(_write(tmp_path, _net())[1]["data"]["inputs"]) == ["left", "right"]


@pytest.mark.parametrize("name", ["embedding.weight", "tok.weight"])
def test_an_embedding_as_wide_as_the_outputs(tmp_path: Path, name: str) -> None:
    state = {name: torch.zeros(7, 4), "head.weight": torch.zeros(7, 4)}
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
    assert "model" not in tomllib.loads(write_template(tmp_path / "model.pt2", trust=True).text)


def test_the_samples_are_guessed_right() -> None:
    samples = Path(__file__).parents[1] / "samples"
    specs = sorted(samples.glob("*/hesscli.toml"))
    assert specs
    for written in specs:
        spec = read_spec(written)
        assert spec.checkpoint is not None
        guess = tomllib.loads(write_template(spec.checkpoint).text)
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
    (place / "hesscli.toml").write_text(write_template(place).text.replace("REPLACE", "net"))
    found = read_spec(place / "hesscli.toml").checkpoint
    assert found is not None
    assert found.samefile(place / "weights.safetensors")


def test_a_link_keeps_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    save_file(_net(), tmp_path / "blobs" / "0123")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    text = write_template(tmp_path / "model.safetensors").text
    assert tomllib.loads(text)["checkpoint"] == "model.safetensors"


def test_one_of_several_sets_is_guessed(tmp_path: Path) -> None:
    torch.save({"netG": _net(), "netD": _net(outputs=1)}, tmp_path / "model.pt")
    text = write_template(tmp_path / "model.pt").text
    assert tomllib.loads(text)["checkpoint_keys"] == {"key": "netD"}
    assert 'a guess; or "netG"' in text


# -- Networks that a library or the checkpoint itself knows ----------------------------------------

IMAGES = {
    "conv1.weight": torch.zeros(4, 3, 3, 3),
    "layer1.0.conv1.weight": torch.zeros(4, 4, 3, 3),
    "fc.weight": torch.zeros(10, 4),
    "fc.bias": torch.zeros(10),
}
GREY = {**IMAGES, "conv1.weight": torch.zeros(4, 1, 3, 3)}
TIMM = {"model_name": "resnet18", "num_classes": 10}
TORCHVISION = {"name": "resnet18", "num_classes": 10}


@pytest.mark.parametrize(
    ("held", "asked", "factory", "kwargs"),
    [
        (IMAGES, "timm:resnet18", "timm:create_model", TIMM),
        (GREY, "timm:resnet18", "timm:create_model", {**TIMM, "in_chans": 1}),
        (IMAGES, "torchvision:resnet18", "torchvision.models:get_model", TORCHVISION),
        # as timm's training script and torchvision's examples save
        (
            {"arch": "resnet18", "version": 2, "state_dict": IMAGES, "metric": 0.9},
            None,
            "timm:create_model",
            TIMM,
        ),
        (
            {"arch": "resnet18", "epoch": 3, "state_dict": IMAGES, "best_acc1": 0.9},
            None,
            "torchvision.models:get_model",
            TORCHVISION,
        ),
    ],
)
def test_networks_of_libraries(
    tmp_path: Path, held: Any, asked: str | None, factory: str, kwargs: dict[str, Any]
) -> None:
    torch.save(held, tmp_path / "model.pt")
    template = write_template(tmp_path / "model.pt", model=named(asked) if asked else None)
    document = tomllib.loads(template.text)
    assert document["model"] == {"factory": factory, "kwargs": kwargs}
    assert document["loss"]["name"] == "cross_entropy"
    library = factory.partition(":")[0].partition(".")[0]
    assert (template.needs == ()) == (find_spec(library) is not None)


def test_a_folder_that_timm_saved(tmp_path: Path) -> None:
    save_file(IMAGES, tmp_path / "model.safetensors")
    config = {"architecture": "resnet18", "num_classes": 10, "model_args": {"drop_rate": 0.5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    document = tomllib.loads(write_template(tmp_path).text)
    assert document["model"]["kwargs"] == {**TIMM, "drop_rate": 0.5}
    with pytest.raises(InputError, match="transformers does not know") as caught:
        load(tmp_path, data="images")
    assert "hesscli init" in caught.value.hint


def test_a_network_of_ones_own_goes_before_a_name(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    torch.save({"arch": "net", "state_dict": _net()}, tmp_path / "model.pt")
    assert _guess(tmp_path / "model.pt")[1]["model"]["factory"] == "net:Net"


LIGHTNING = """
from torch import nn
from torch.nn import functional as F

class Inner(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, classes)

class {base}(nn.Module):
    pass

class Task({base}):
    def __init__(self, width, classes=3, lr=1e-3, names=None):
        super().__init__()
        self.model = Inner(width, classes)

    def forward(self, x):
        return self.model.second(self.model.first(x).tanh())

    def training_step(self, batch, index):
        return F.nll_loss(self(batch[0]), batch[1])

def train_data():
    import torch
    return [(torch.randn(4), i % 2) for i in range(6)]
"""


def _lightning(**hyper: Any) -> dict[str, Any]:
    """What a Trainer saves."""
    state = {
        "model.first.weight": torch.randn(8, 4),
        "model.first.bias": torch.zeros(8),
        "model.second.weight": torch.randn(2, 8),
        "model.second.bias": torch.zeros(2),
    }
    return {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper,
    }


def test_a_lightning_checkpoint_runs_as_guessed(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(LIGHTNING.format(base="LightningModule"))
    hyper = {"width": 8, "classes": 2, "lr": 0.01, "names": ["a b", '"c"'], "gone": 1}
    torch.save(_lightning(**hyper), tmp_path / "last.ckpt")
    text, document = _guess(tmp_path / "last.ckpt")
    del hyper["gone"]  # which the class does not take
    assert document["model"] == {"factory": "task:Task", "kwargs": hyper}
    assert document["loss"]["name"] == "nll"
    (tmp_path / "last.toml").write_text(text)
    problem = load(tmp_path / "last.ckpt", spec=tmp_path / "last.toml")
    assert problem.parameters.size == 8 * 4 + 8 + 2 * 8 + 2


def test_of_a_lightning_checkpoint_what_cannot_be_copied_is_to_be_filled_in(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(LIGHTNING.format(base="LightningModule"))
    torch.save(_lightning(classes=2, names=datetime.date(2020, 1, 1)), tmp_path / "last.ckpt")
    _, document = _guess(tmp_path / "last.ckpt")
    expected = {"classes": 2, "names": "REPLACE", "width": "REPLACE"}
    assert document["model"]["kwargs"] == expected


def test_one_argument_that_holds_all(tmp_path: Path) -> None:
    source = LIGHTNING.replace("width, classes=3, lr=1e-3, names=None", "config")
    (tmp_path / "task.py").write_text(source.format(base="LightningModule"))
    held = {**_lightning(width=8, classes=2), "hparams_name": "config"}
    torch.save(held, tmp_path / "last.ckpt")
    _, document = _guess(tmp_path / "last.ckpt")
    assert document["model"]["kwargs"] == {"config": {"width": 8, "classes": 2}}


def test_a_lightning_checkpoint_without_code_beside_it(tmp_path: Path) -> None:
    torch.save(_lightning(width=8), tmp_path / "last.ckpt")
    _, document = _guess(tmp_path / "last.ckpt")
    assert document["model"] == {"factory": "REPLACE:REPLACE", "kwargs": {"width": 8}}


def test_a_network_within_a_lightning_module_is_found(tmp_path: Path) -> None:
    source, _, _ = LIGHTNING.partition("class {base}")
    (tmp_path / "task.py").write_text(source.format() + "class Other(nn.Module): pass")
    torch.save(_lightning(width=8, classes=2), tmp_path / "last.ckpt")
    _, document = _guess(tmp_path / "last.ckpt")
    assert document["model"] == {"factory": "task:Inner", "kwargs": {"width": 8, "classes": 2}}


def test_what_is_not_installed_is_said_with_its_cure(tmp_path: Path) -> None:
    module, package = next(pair for pair in PACKAGES.items() if find_spec(pair[0]) is None)
    source = LIGHTNING.format(base="Base")
    (tmp_path / "task.py").write_text(f"import {module}\n{source}")
    torch.save(_lightning(width=8), tmp_path / "last.ckpt")
    cure = f"pip install {package}"
    assert write_template(tmp_path / "last.ckpt").needs == (cure,)
    for reference in ("task:Task", f"{module}.models:make"):
        with pytest.raises(InputError) as caught:
            load_factory(reference, tmp_path, "[model] factory")
        assert caught.value.hint == cure
