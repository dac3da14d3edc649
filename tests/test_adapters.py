"""PEFT's folders: the matrix is of the adapter alone, on its frozen base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pretrained
import pytest
import torch

import hesscli
from hesscli.errors import InputError
from hesscli.problem.problem import Problem

LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}


def _adapted(folder: Path, kind: str = "llama", **how: Any) -> Any:
    return pretrained.save_adapter(kind, folder, **LORA | how)


def _load(folder: Path, what: str = "adapter") -> Problem:
    data, how, _ = pretrained.save_data("llama", folder)
    problem: Problem = hesscli.load(folder / what, data=data, **how)
    return problem


def test_the_matrix_is_the_block_of_the_adapter(tmp_path: Path) -> None:
    model = _adapted(tmp_path, task_type="CAUSAL_LM")
    problem = _load(tmp_path)
    assert all(".lora_" in name for name in problem.parameter_names)
    assert problem.parameters.size == sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name
    )
    report = problem.report("hessian")
    assert report.num_frozen == sum(p.numel() for p in model.get_base_model().parameters()) - (
        report.num_parameters
    )
    expected = pretrained.hessian(pretrained.in_float64(model), problem.data.batches)
    bound = 8 * problem.total_weight * torch.finfo(torch.float32).eps * float(expected.abs().max())
    found = hesscli.Hessian(problem).to_dense()
    assert float((found - expected).abs().max()) <= bound
    result = hesscli.trace(problem)
    assert result.status == "exact"
    low, high = result.trace.interval
    assert low <= float(expected.trace()) <= high


def test_a_merged_adapter_is_a_folder_like_any_other(tmp_path: Path) -> None:
    model = _adapted(tmp_path, task_type="CAUSAL_LM")
    alone = _load(tmp_path).prove()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    pretrained.tokenizer().save_pretrained(tmp_path / "merged")
    merged = _load(tmp_path, "merged")
    assert merged.parameters.size == sum(
        p.numel() for p in pretrained.build("llama", len(pretrained.tokenizer())).parameters()
    )
    # Products are added before or after the weights are: float32 sums of a few terms.
    assert merged.prove().loss == pytest.approx(alone.loss, rel=64 * torch.finfo(torch.float32).eps)


def test_an_adapter_for_classes_brings_its_head(tmp_path: Path) -> None:
    import transformers

    base = pretrained.save("llama", tmp_path / "base")
    config = transformers.LlamaConfig.from_pretrained(tmp_path / "base", num_labels=3)
    classes = transformers.LlamaForSequenceClassification(config)
    classes.model.load_state_dict(base.model.state_dict())
    classes.name_or_path = str(tmp_path / "base")
    how = {**LORA, "task_type": "SEQ_CLS"}
    peft.get_peft_model(classes, peft.LoraConfig(**how)).save_pretrained(tmp_path / "adapter")
    data, _, rows = pretrained.save_data("bert classes", tmp_path)
    problem = hesscli.load(tmp_path / "adapter", data=data)
    assert problem.total_weight == len(rows)
    assert any("score" in name for name in problem.parameter_names)
    logits = [classes(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    labels = torch.tensor([row["labels"] for row in rows])
    expected = float(torch.nn.functional.cross_entropy(torch.stack(logits), labels).detach())
    assert problem.prove().loss == pytest.approx(expected, rel=1e3 * torch.finfo(torch.float32).eps)


def _without(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    found = next(key for key in weights if name in key)
    del weights[found]
    save_file(weights, folder / "adapter_model.safetensors")


def test_an_adapter_that_is_not_whole_or_without_its_base_is_refused(tmp_path: Path) -> None:
    _adapted(tmp_path, task_type="CAUSAL_LM")
    _without(tmp_path / "adapter", "v_proj.lora_B")
    with pytest.raises(InputError, match="lacks weights of its adapter") as caught:
        _load(tmp_path)
    assert "1 missing" in caught.value.got
    assert "v_proj.lora_B" in caught.value.got
    place = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(place.read_text()) | {"base_model_name_or_path": "nobody/nothing"}
    place.write_text(json.dumps(said))
    with pytest.raises(InputError, match="the adapter's base: no such folder") as caught:
        _load(tmp_path)
    assert "hf download nobody/nothing" in caught.value.hint
