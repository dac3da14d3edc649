"""Folders that transformers and PEFT wrote come out of ``hesscli prune`` as such folders."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import peft
import pretrained
import pytest
import torch
from program import hesscli_warm, three_lines

import hesscli
from hesscli.errors import ExitCode

FEW = ("--window", 16, "--sparsity", "60%")


def loss_of(model: Any, data: Path, how: dict[str, Any], folder: Path) -> float:
    """Of a model that a library has loaded, on the examples that the program has of a folder."""
    batches = hesscli.load(folder, data=data, **how).data.batches
    with torch.no_grad():
        return float(pretrained.mean_loss(model.eval(), batches))


def zeros(model: Any) -> int:
    """Of the weights that may go: none of these models' vectors is zero."""
    return sum(int((p == 0).sum()) for p in model.parameters() if p.requires_grad)


def test_a_folder_in_shards_is_one_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    pretrained.save("llama", tmp_path / "base").save_pretrained(
        tmp_path / "base", max_shard_size=300
    )
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / "README.md").write_text("of the old weights")
    data, how, _ = pretrained.save_data("llama", tmp_path)
    line = ("prune", "base", "--data", data, "--sequence", how["sequence"], *FEW, "--dir", "out")
    run = hesscli_warm(*line, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    said, out = json.loads((tmp_path / "out" / "prune.json").read_text()), tmp_path / "out"
    made = {path.name for path in out.iterdir() if not path.name.startswith("prune")}
    assert made == {path.name for path in (tmp_path / "base").iterdir()} - {"README.md"}
    found = LlamaForCausalLM.from_pretrained(out)
    assert zeros(found) == said["sparsity"]["num_zeros"]
    loss = loss_of(found, data, how, out)  # of float32 sums of a hundred terms
    assert said["methods"][0]["loss"] == pytest.approx(loss, rel=1e-5)
    inside = hesscli_warm(*line[:-1], "base", cwd=tmp_path)
    assert inside.returncode == ExitCode.USAGE
    assert "take the place of the checkpoint" in inside.stderr


def test_an_adapter_is_one_that_peft_lays_onto_the_same_base(tmp_path: Path) -> None:
    how = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    base = pretrained.save_adapter("llama", tmp_path, **how).get_base_model()
    data, options, _ = pretrained.save_data("llama", tmp_path)
    line = ("prune", "adapter", "--data", data, "--sequence", options["sequence"], *FEW)
    run = hesscli_warm(*line, "--dir", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    said = json.loads((tmp_path / "out" / "prune.json").read_text())
    fresh = type(base).from_pretrained(tmp_path / "base")
    found = peft.PeftModel.from_pretrained(fresh, tmp_path / "out", is_trainable=True)
    count = sum(p.numel() for p in found.parameters() if p.requires_grad)
    assert zeros(found) == said["sparsity"]["num_zeros"] == round(0.6 * count)
    loss = loss_of(found.base_model.model, data, options, tmp_path / "out")
    assert said["methods"][0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_weights_that_a_library_has_put_together_are_refused_with_what_spares_them(
    tmp_path: Path,
) -> None:
    """Experts are a tensor each in the file, and one for all in the model."""
    pretrained.save("mixtral", tmp_path / "base")
    data, how, _ = pretrained.save_data("mixtral", tmp_path)
    line = ("prune", "base", "--data", data, "--sequence", how["sequence"], *FEW, "--dir", "out")
    run = hesscli_warm(*line, cwd=tmp_path)
    assert run.returncode == ExitCode.INPUT
    told = run.stderr[run.stderr.index("error:") :]
    what, got, cure = three_lines(told)
    assert what == "this checkpoint cannot be written anew"
    assert "experts" in got
    spared = shlex.split(re.sub(" to let.*", "", cure))
    run = hesscli_warm(*line, *spared, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
