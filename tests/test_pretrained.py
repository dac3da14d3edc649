"""Folders that transformers saved: no spec, the user's own function, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretrained
import pytest
import torch
from pretrained import LENGTH, LINES
from program import hesscli_warm, three_lines
from tokenizers.processors import TemplateProcessing

import hesscli
from hesscli.errors import InputError, UsageError
from hesscli.ledger import FileLedger
from hesscli.problem.problem import Problem

FACTORY = """
import json, transformers
from pathlib import Path

def model(folder, name):
    cls = getattr(transformers, name)
    config = cls.config_class.from_pretrained(folder)
    config._attn_implementation = config._experts_implementation = "eager"
    config.use_cache = False
    return cls(config)

def rows(place):
    return json.loads(Path(place).read_text())

def collate(rows):
    words = transformers.PreTrainedTokenizerFast.from_pretrained({folder!r})
    if rows[0]["labels"] == rows[0]["input_ids"]:
        return transformers.default_data_collator(rows)
    if isinstance(rows[0]["labels"], int):
        return transformers.DataCollatorWithPadding(words)(rows)
    return transformers.DataCollatorForSeq2Seq(words)(rows)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pretrained.save("llama", tmp_path / "llama")
    (tmp_path / "corpus.txt").write_text("\n".join(LINES))
    return tmp_path


def _load(folder: Path, **how: Any) -> Problem:
    problem: Problem = hesscli.load(folder / "llama", **{"data": folder / "corpus.txt"} | how)
    return problem


def _by_factory(model: Any, folder: Path, rows: list[dict[str, Any]]) -> Problem:
    """The same weights and rows through a spec that names code of the user's own."""
    place = folder.parent / "by hand"
    place.mkdir()
    torch.save(model.state_dict(), place / "model.pt")
    (place / "rows.json").write_text(json.dumps(rows))
    (place / "hand.py").write_text(FACTORY.format(folder=str(folder)))
    spec = place / "model.toml"
    spec.write_text(
        f'[model]\nfactory = "hand:model"\nkwargs.folder = {json.dumps(str(folder))}\n'
        f'kwargs.name = "{type(model).__name__}"\n'
        f'[data]\nfactory = "hand:rows"\nkwargs.place = {json.dumps(str(place / "rows.json"))}\n'
        'collate = "hand:collate"\n[loss]\nname = "huggingface"\n'
    )
    problem: Problem = hesscli.load(place / "model.pt", spec=spec)
    return problem


SLOW = ("t5", "bert tokens")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.hf) if k in SLOW else k for k in pretrained.KINDS],
)
def test_a_folder_is_the_function_of_its_weights(kind: str, tmp_path: Path) -> None:
    """The loss written out in float64, differentiated twice; and the same weights by a factory."""
    model = pretrained.save(kind, tmp_path / "model")
    data, how, rows = pretrained.save_data(kind, tmp_path)
    problem = hesscli.load(tmp_path / "model", data=data, **how)
    assert problem.independence.proven
    assert problem.prove().warnings == ()
    truth = pretrained.in_float64(model)
    expected = pretrained.hessian(truth, problem.data.batches)
    size = problem.parameters.size
    assert expected.shape == (size, size)
    # An entry sums over labels, and its rounding is of terms that the largest entry bounds.
    bound = 8 * problem.total_weight * torch.finfo(torch.float32).eps * float(expected.abs().max())
    loss = float(pretrained.mean_loss(truth, problem.data.batches).detach())
    assert problem.prove().loss == pytest.approx(loss, abs=bound)
    chosen = torch.arange(0, size, size // 10)[:10]
    columns = hesscli.Hessian(problem) @ torch.eye(size)[:, chosen]
    assert float((columns - expected[:, chosen]).abs().max()) <= bound
    result = hesscli.trace(problem, probes=4, confidence=0.999)
    low, high = result.trace.interval
    assert low <= float(expected.trace()) <= high
    assert result.problem.model_class == type(model).__name__
    if rows:
        other = _by_factory(model, tmp_path / "model", rows)
        assert problem.prove().loss == other.prove().loss
        assert hesscli.trace(other, probes=4, confidence=0.999).trace == result.trace


def test_a_tail_that_makes_no_block_is_said(folder: Path) -> None:
    left = sum(len(line.split()) for line in LINES) % LENGTH
    assert _load(folder, sequence=LENGTH).warnings == (
        f"the last {left} tokens, which make no whole block of {LENGTH}, are left out",
    )


def test_masks_are_drawn_once_by_the_seed_whatever_is_kept(tmp_path: Path) -> None:
    pretrained.save("bert", tmp_path / "model")
    data, *_ = pretrained.save_data("bert", tmp_path)

    def rows(**how: Any) -> set[tuple[str, str]]:
        problem = hesscli.load(tmp_path / "model", data=data, **how)
        found = set()
        for batch in problem.data.batches:
            for ids, labels, mask in zip(
                batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
            ):
                kept = mask.bool()
                assert (labels[~kept] == -100).all()
                assert (labels[kept] != -100).any()
                whole = ids.where(labels == -100, labels)[kept].tolist()
                found.add((words.decode(whole), str(ids[kept].tolist())))
        return found

    words = pretrained.tokenizer()
    every = rows()
    assert {text for text, _ in every} == set(LINES)
    assert rows() == every
    assert rows(examples=3) < every
    assert rows(seed=1) != every


def test_examples_that_are_too_long_are_cut_and_that_is_said(tmp_path: Path) -> None:
    pretrained.save("bert classes", tmp_path / "model")
    data, *_ = pretrained.save_data("bert classes", tmp_path)
    problem = hesscli.load(tmp_path / "model", data=data, sequence=6)
    longer = sum(len(line.split()) > 6 for line in LINES)
    assert len(problem.warnings) == 1
    assert problem.warnings[0].startswith(f"{longer} of the examples that were kept had more")
    assert {batch["input_ids"].shape[1] for batch in problem.data.batches} <= {3, 4, 5, 6}


def test_names_of_classes_are_looked_up(tmp_path: Path) -> None:
    model = pretrained.build("bert classes", len(pretrained.tokenizer()))
    model.config.label2id = {"good": 2, "bad": 0, "neither": 1}
    model.save_pretrained(tmp_path / "model")
    pretrained.tokenizer().save_pretrained(tmp_path / "model")
    names = ["bad", "neither", "good"]
    rows = [f"{line},{names[i % 3]}" for i, line in enumerate(LINES)]
    (tmp_path / "named.csv").write_text("\n".join(["text,mood", *rows]))
    problem = hesscli.load(tmp_path / "model", data=tmp_path / "named.csv", labels="mood")
    found = sorted(int(label) for batch in problem.data.batches for label in batch["labels"])
    assert found == [0, 0, 1, 1, 2, 2]
    (tmp_path / "named.csv").write_text("text,mood\nthe cat,awful")
    with pytest.raises(InputError, match="a label is none of the model's") as caught:
        hesscli.load(tmp_path / "model", data=tmp_path / "named.csv", labels="mood")
    assert "'awful'" in caught.value.got
    assert "bad, good, neither" in caught.value.got


def test_pairs_are_encoded_as_the_tokenizer_encodes_pairs(tmp_path: Path) -> None:
    model = pretrained.save("bert classes", tmp_path / "model")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    words = pretrained.tokenizer(model_input_names=inputs)
    # As BERT's own: the second text after a separator, and of another type.
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    )
    words.save_pretrained(tmp_path / "model")
    pairs = list(zip(LINES, LINES[::-1], strict=True))
    rows = [{"premise": a, "other": b, "label": i % 3} for i, (a, b) in enumerate(pairs)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = [f"{row['premise']},{row['other']},{row['label']}" for row in rows]
    (tmp_path / "pairs.csv").write_text("\n".join(["premise,other,label", *fields]))
    how = {"max_length": 12, "truncation": True, "return_tensors": "pt"}
    logits = torch.cat([model(**words(*pair, **how)).logits for pair in pairs])
    classes = torch.tensor([row["label"] for row in rows])
    expected = float(torch.nn.functional.cross_entropy(logits, classes).detach())
    for name in ("pairs.jsonl", "pairs.csv"):
        asked = {"data": tmp_path / name, "text": ["premise", "other"], "sequence": 12}
        problem = hesscli.load(tmp_path / "model", **asked)
        assert problem.prove().loss == pytest.approx(
            expected, rel=1e2 * torch.finfo(torch.float32).eps
        )
        assert any(batch["token_type_ids"].any() for batch in problem.data.batches)
        assert any("were cut" in warning for warning in problem.warnings)
    with pytest.raises(InputError, match="which column holds the text") as caught:
        hesscli.load(tmp_path / "model", data=tmp_path / "pairs.csv")
    assert "--text premise --text other" in caught.value.hint
    for text in (["premise", "nothing"], ["premise", "other", "label"]):
        with pytest.raises((InputError, UsageError)):
            hesscli.load(tmp_path / "model", data=tmp_path / "pairs.csv", text=text)


def test_a_model_of_one_output_is_a_regression(tmp_path: Path) -> None:
    model = pretrained.build("bert classes", len(pretrained.tokenizer()), num_labels=1)
    model.save_pretrained(tmp_path / "model")
    words = pretrained.tokenizer()
    words.save_pretrained(tmp_path / "model")
    (tmp_path / "scores.csv").write_text(
        "\n".join(["text,score", *(f"{line},{i}" for i, line in enumerate(LINES))])
    )
    problem = hesscli.load(tmp_path / "model", data=tmp_path / "scores.csv", labels="score")
    found = [model(input_ids=torch.tensor([words(line)["input_ids"]])).logits for line in LINES]
    errors = torch.cat(found).flatten() - torch.arange(len(LINES))
    mean = float(errors.square().mean().detach())
    assert problem.prove().loss == pytest.approx(mean, rel=1e2 * torch.finfo(torch.float32).eps)
    assert problem.total_weight == len(LINES)


def test_images_of_classes_that_the_model_cannot_know_are_refused(tmp_path: Path) -> None:
    pretrained.save("vit", tmp_path / "model")
    pretrained.save_images(tmp_path / "images")
    (tmp_path / "images" / "cat").rename(tmp_path / "cat")
    with pytest.raises(InputError, match="a label is none of the model's"):
        hesscli.load(tmp_path / "model", data=tmp_path / "images")


def test_a_folder_says_in_the_report_what_it_is(folder: Path) -> None:
    report = _load(folder, sequence=LENGTH).report("hessian")
    assert report.model_class == "LlamaForCausalLM"
    assert report.num_tokens == LENGTH * report.num_examples
    assert report.total_weight == (LENGTH - 1) * report.num_examples
    assert report.data is not None
    assert report.data.path == str(folder / "corpus.txt")
    assert len(report.tokenizer_sha256 or "") == 64


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


def test_the_program_measures_a_folder_and_a_run_of_other_data_is_another(folder: Path) -> None:
    what = ("trace", "llama", "--data", "corpus.txt", "--sequence", LENGTH, "--probes", 2)
    run = hesscli_warm(*what, cwd=folder)
    assert run.returncode == 0
    head = run.stdout.split("float32")[0]
    assert "llama · LlamaForCausalLM" in head
    assert "32 tokens of corpus.txt" in " ".join(head.split())
    document = json.loads(
        (folder / "hesscli-out" / f"{folder.name}-llama" / "trace.json").read_text()
    )
    said = document["problem"]
    assert said["model_class"] == "LlamaForCausalLM"
    assert said["num_tokens"] == 32
    content = (folder / "corpus.txt").read_bytes()
    assert said["data"] == {
        "path": "corpus.txt",
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_a_ledger_knows_data_tokenizer_and_options(folder: Path) -> None:
    first = _load(folder, sequence=LENGTH).origin.facts
    other = folder / "other.txt"
    other.write_text("the cat sat on the mat and on the mat")
    assert _load(folder, sequence=4).origin.facts != first
    assert _load(folder, data=other, sequence=LENGTH).origin.facts["data"] != first["data"]
    words = pretrained.tokenizer()
    words.eos_token = "<unk>"
    words.save_pretrained(folder / "llama")
    assert _load(folder, sequence=LENGTH).origin.facts["tokenizer"] != first["tokenizer"]
    config = folder / "llama" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert _load(folder, sequence=LENGTH).origin.facts["config"] != first["config"]


def test_a_run_on_a_folder_goes_on(folder: Path) -> None:
    path = folder / "trace.ledger"

    def measured(resume: bool) -> float:
        problem = _load(folder, sequence=LENGTH)
        ledger = FileLedger(path, problem.origin.facts, resume=resume, say=pytest.fail)
        result = hesscli.trace(problem, matrix="ggn", rtol=0.5, budget=None, ledger=ledger)
        return result.trace.estimate

    assert measured(resume=False) == measured(resume=True)


REFUSED = {
    "no such name": ("nobody/nothing", {}, "no model of that name in the cache"),
    "a file": ("llama/model.safetensors", {}, "--data goes with a folder"),
    "no data": ("llama", {"data": "nothing.txt"}, "data not found"),
    "too long": ("llama", {"sequence": 17}, "takes no examples of so many tokens"),
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


def _sharded(folder: Path, model: Any) -> None:
    model.save_pretrained(folder, max_shard_size=400)
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path, model: Any) -> None:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("save", [_sharded, _pickled])
def test_weights_in_other_files_are_the_same(
    save: Callable[[Path, Any], None], folder: Path
) -> None:
    expected = _load(folder).prove().loss
    save(folder / "llama", pretrained.build("llama", len(pretrained.tokenizer())))
    assert _load(folder).prove().loss == expected


def test_weights_of_another_type_are_what_they_are(folder: Path) -> None:
    model = pretrained.build("llama", len(pretrained.tokenizer())).to(torch.bfloat16)
    model.save_pretrained(folder / "llama")
    problem = _load(folder)
    assert problem.dtype == torch.float32
    assert all(
        torch.equal(own, given.float())
        for own, given in zip(problem.model.parameters(), model.parameters(), strict=True)
    )
    doubled = _load(folder, dtype="float64")
    assert doubled.dtype == torch.float64
    batches = doubled.data.batches
    expected = float(pretrained.mean_loss(pretrained.in_float64(model), batches).detach())
    # Norms and softmax are computed in float32 by transformers itself.
    assert doubled.prove().loss == pytest.approx(expected, rel=32 * torch.finfo(torch.float32).eps)


def test_a_name_is_found_in_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    place = folder / "cache" / "models--me--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots").mkdir()
    expected = _load(folder).prove().loss
    (folder / "llama").rename(place / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    problem = hesscli.load("me/tiny", data="corpus.txt")
    assert problem.prove().loss == expected
    assert problem.checkpoint is not None
    assert problem.checkpoint.path == "me/tiny"


def test_weights_of_other_shapes_are_refused_by_name(folder: Path) -> None:
    config = folder / "llama" / "config.json"
    said = json.loads(config.read_text()) | {"intermediate_size": 5}
    config.write_text(json.dumps(said))
    with pytest.raises(InputError, match="not of the shapes") as caught:
        _load(folder)
    assert "mlp.down_proj.weight [4, 6], expected [4, 5]" in caught.value.got


def test_what_is_no_text_is_refused(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "the cat"}\n{"text": null}')
    with pytest.raises(InputError, match="a text is no string") as caught:
        _load(folder, data=rows)
    assert "row 2 has None" in caught.value.got
    rows.write_text('{"text": "the cat"}\n{"text"')
    with pytest.raises(InputError, match="the data cannot be read") as caught:
        _load(folder, data=rows)
    assert "line 2" in caught.value.got


def test_weights_that_would_be_drawn_at_random_are_refused_by_name(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "llama" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "llama" / "model.safetensors")
    with pytest.raises(InputError, match="draw at random") as caught:
        _load(folder)
    assert "1 missing for LlamaForCausalLM: model.norm.weight" in caught.value.got


def test_tokens_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    words = pretrained.tokenizer()
    words.add_tokens(["old"])
    words.add_tokens(["a-new-one"])
    words.save_pretrained(folder / "llama")
    assert _load(folder, sequence=LENGTH).prove().loss > 0  # it may know more than it meets
    (folder / "corpus.txt").write_text("the cat sat on a-new-one")
    with pytest.raises(InputError, match="makes tokens that the model does not have") as caught:
        _load(folder)
    assert "'a-new-one'" in caught.value.got


def test_weights_that_the_class_has_no_use_for_are_said(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "llama" / "model.safetensors")
    save_file(weights | {"value.weight": torch.ones(3)}, folder / "llama" / "model.safetensors")
    assert any("left aside: value.weight" in text for text in _load(folder).warnings)


def test_a_spec_of_the_folders_own_is_not_overruled(folder: Path) -> None:
    (folder / "llama" / "hesscli.toml").write_text("")
    with pytest.raises(UsageError, match="both say what the data is"):
        _load(folder)


def test_no_spec_is_made_where_none_is_needed(folder: Path) -> None:
    run = hesscli_warm("init", "llama", cwd=folder)
    assert run.returncode == 2
    what, got, hint = three_lines(run.stderr)
    assert what == "a Hugging Face folder needs no spec"
    assert got == "llama"
    assert hint.startswith("hesscli trace llama --data corpus.txt")
    assert not (folder / "llama" / "hesscli.toml").exists()


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
