"""Folders that transformers saved: no spec, the user's own function, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pretrained
import pytest
import torch
from pretrained import LINES

import hesscli
from hesscli.errors import InputError, UsageError
from hesscli.problem.problem import Problem

LENGTH = 8
FACTORY = """
import json, torch, transformers
from pathlib import Path

def model(folder, name):
    cls = getattr(transformers, name)
    config = cls.config_class.from_pretrained(folder)
    config._attn_implementation = config._experts_implementation = "eager"
    config.use_cache = False
    return cls(config)

def rows():
    return json.loads(Path({rows!r}).read_text())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pretrained.save("llama", tmp_path / "llama")
    (tmp_path / "corpus.txt").write_text("\n".join(LINES))
    return tmp_path


def _load(folder: Path, kind: str = "llama", **how: object) -> Problem:
    problem: Problem = hesscli.load(folder / kind, **{"data": folder / "corpus.txt"} | how)
    return problem


def _blocks(text: str, length: int) -> list[list[int]]:
    ids = pretrained.tokenizer()(text)["input_ids"]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def _by_factory(folder: Path, kind: str, rows: list[dict[str, object]]) -> Problem:
    """The same weights and rows through a spec that names code of the user's own."""
    place = folder / "by hand"
    place.mkdir()
    model = pretrained.build(kind, len(pretrained.tokenizer()))
    torch.save(model.state_dict(), place / "model.pt")
    (place / "rows.json").write_text(json.dumps(rows))
    (place / "hand.py").write_text(FACTORY.format(rows=str(place / "rows.json")))
    spec = place / "model.toml"
    spec.write_text(
        f'[model]\nfactory = "hand:model"\nkwargs.folder = {json.dumps(str(folder / kind))}\n'
        f'kwargs.name = "{type(model).__name__}"\n'
        '[data]\nfactory = "hand:rows"\n[loss]\nname = "huggingface"\n'
    )
    problem: Problem = hesscli.load(place / "model.pt", spec=spec)
    return problem


def test_a_folder_is_the_same_function_as_its_weights_by_hand(folder: Path) -> None:
    problem = _load(folder, sequence=LENGTH)
    blocks = _blocks("\n".join(LINES), LENGTH)
    other = _by_factory(folder, "llama", [{"input_ids": b, "labels": b} for b in blocks])
    assert problem.prove().loss == other.prove().loss
    assert problem.manifest_sha256 == other.manifest_sha256
    one, two = (hesscli.trace(p, probes=2, seed=3).trace for p in (problem, other))
    assert one == two
    assert problem.prove().warnings == ()
    left = sum(len(line.split()) for line in LINES) - LENGTH * len(blocks)
    assert problem.warnings == (
        f"the last {left} tokens, which make no whole block of {LENGTH}, are left out",
    )


def test_a_folder_says_in_the_report_what_it_is(folder: Path) -> None:
    report = _load(folder, sequence=LENGTH).report("hessian")
    assert report.model_class == "LlamaForCausalLM"
    assert report.num_tokens == LENGTH * report.num_examples
    assert report.total_weight == (LENGTH - 1) * report.num_examples
    assert report.data is not None
    assert report.data.path == str(folder / "corpus.txt")
    assert len(report.tokenizer_sha256 or "") == 64


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_curvature_is_that_of_the_loss_written_out(kind: str, tmp_path: Path) -> None:
    model = pretrained.save(kind, tmp_path / kind)
    (tmp_path / "corpus.txt").write_text("\n".join(LINES))
    problem = _load(tmp_path, kind, sequence=LENGTH)
    truth = pretrained.in_float64(model)
    expected = pretrained.hessian(truth, problem.data.batches)
    size = problem.parameters.size
    assert expected.shape == (size, size)
    # Each entry sums over tokens, and its rounding is of the terms, which the largest entry bounds.
    bound = 8 * problem.total_weight * torch.finfo(torch.float32).eps * float(expected.abs().max())
    loss = float(pretrained.mean_loss(truth, problem.data.batches).detach())
    assert problem.prove().loss == pytest.approx(loss, abs=bound)
    chosen = torch.arange(0, size, size // 10)[:10]
    columns = hesscli.Hessian(problem) @ torch.eye(size)[:, chosen]
    assert float((columns - expected[:, chosen]).abs().max()) <= bound
    estimate = hesscli.trace(problem, probes=8, confidence=0.999).trace
    low, high = estimate.interval
    assert low <= float(expected.trace()) <= high


def test_documents_that_are_packed_and_crossed_are_said(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    problem = _load(folder, data=rows, sequence=LENGTH)
    stream = [token for line in LINES for token in [*pretrained.tokenizer()(line)["input_ids"], 1]]
    kept = len(stream) // LENGTH * LENGTH
    assert problem.report("hessian").num_tokens == kept
    ends = [i for i, token in enumerate(stream[: kept - 1], 1) if token == 1]
    crossed = sum(end % LENGTH != 0 for end in ends)
    assert problem.warnings[0].startswith(f"blocks of {LENGTH} tokens cross {crossed} borders")


REFUSED = {
    "no such name": ("nobody/nothing", {}, "no model of that name in the cache"),
    "a file": ("llama/model.safetensors", {}, "--data goes with a folder"),
    "no data": ("llama", {"data": "nothing.txt"}, "data not found"),
    "too long": ("llama", {"sequence": 33}, "takes no examples of so many tokens"),
    "labels": ("llama", {"labels": "label"}, "labels are its own tokens"),
    "no column": ("llama", {"text": "body"}, "no column 'body'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    checkpoint, how, what = REFUSED[name]
    with pytest.raises((InputError, UsageError), match=what):
        hesscli.load(checkpoint, **{"data": "corpus.txt"} | how)


def test_weights_that_would_be_drawn_at_random_are_refused_by_name(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "llama" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "llama" / "model.safetensors")
    with pytest.raises(InputError, match="draw at random") as caught:
        _load(folder)
    assert "1 missing for LlamaForCausalLM: model.norm.weight" in caught.value.got


def test_weights_that_the_class_has_no_use_for_are_said(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "llama" / "model.safetensors")
    save_file(weights | {"value.weight": torch.ones(3)}, folder / "llama" / "model.safetensors")
    assert any("left aside: value.weight" in text for text in _load(folder).warnings)


def test_a_spec_of_the_folders_own_is_not_overruled(folder: Path) -> None:
    (folder / "llama" / "hesscli.toml").write_text("")
    with pytest.raises(UsageError, match="both say what the data is"):
        _load(folder)


def test_a_folder_without_data_is_told_of_it(folder: Path) -> None:
    with pytest.raises(InputError, match="no spec found") as caught:
        hesscli.load(folder / "llama")
    assert caught.value.hint.startswith("--data corpus.txt")


def test_options_of_data_without_data_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="--sequence is about --data"):
        hesscli.load(folder / "llama", sequence=4)


def test_code_in_a_folder_is_run_only_where_it_is_trusted(folder: Path) -> None:
    config = folder / "llama" / "config.json"
    said = json.loads(config.read_text()) | {
        "model_type": "own",
        "architectures": ["Own"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    }
    config.write_text(json.dumps(said))
    (folder / "llama" / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(InputError, match="code that lies in its folder") as caught:
        _load(folder)
    assert caught.value.hint.startswith("--trust")
    problem = _load(folder, trust=True)
    assert problem.report("hessian").model_class == "Own"


def test_transformers_is_imported_for_nothing_else(samples: Path) -> None:
    program = (
        "import sys; from hesscli.cli.app import main;"
        "main(['trace', sys.argv[1], '--probes', '2', '--dir', '-']); main(['--help']);"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, "samples/sunspots/model.pt"],
        capture_output=True, text=True, check=True, cwd=samples.parent,
    )  # fmt: skip
    assert not {"transformers", "peft", "tokenizers", "datasets"} & set(run.stderr.split())
