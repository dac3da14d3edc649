"""Examples as a model's task has them: text made tokens by the folder's tokenizer, and labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscli.errors import InputError, UsageError, shorten
from hesscli.problem.batches import BATCH_SIZE
from hesscli.problem.pretrained.folder import TOKENIZER, quiet, read_json
from hesscli.problem.pretrained.model import Pretrained, Task, blamed_on_transformers
from hesscli.problem.pretrained.rows import Taking, inputs_of
from hesscli.problem.pretrained.tables import Table
from hesscli.problem.sources import Examples
from hesscli.randomness import key

SEQUENCE = 512
"""Tokens of an example at most, where the user does not say and the model takes as many."""
_TOKENS_TOGETHER = 4096
"""Tokens of a batch, where the user does not say."""
_AT_ONCE = 1000
_MOST_NAMED = 8
_DRAWS = 64
MASKED = 0.15
"""The share of tokens that a masked model is asked for, as BERT was trained."""
IGNORED = -100
_KINDS: dict[type, str] = {str: "string", list: "list of words"}
_OF_NO_KIND = ("TokenizersBackend", "PreTrainedTokenizerFast")


@dataclass(frozen=True)
class Wanted:
    """What was asked for of the data.

    Attributes:
        text: the column of texts, or the two of pairs; None for the usual one.
        labels: the column of labels.
        sequence: tokens of an example at most.
        seed: of what is masked.
    """

    text: tuple[str, ...] | None = None
    labels: str | None = None
    sequence: int | None = None
    seed: int = 0

    @property
    def options(self) -> dict[str, str | int | None]:
        """What was typed, by the options' names."""
        text = " --text ".join(self.text) if self.text else None
        return {"--text": text, "--labels": self.labels, "--sequence": self.sequence}


def load_tokenizer(pretrained: Pretrained, *, trust: bool = False) -> Any:
    """The tokenizer that lies in the model's folder.

    Raises:
        InputError: there is none, or it is code that is not trusted.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder, said = pretrained.folder, {}
    if (folder / TOKENIZER).is_file():
        said = read_json(folder / TOKENIZER)
    # One of no kind of its own is what its file says; for some kinds of models the automatic class
    # would read that file as another tokenizer's.
    plain = said.get("tokenizer_class") in _OF_NO_KIND and "auto_map" not in said
    kind = PreTrainedTokenizerFast if plain else AutoTokenizer
    with quiet(), blamed_on_transformers(f"no tokenizer can be read from {folder}"):
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)


def tokenizer_sha256(tokenizer: Any) -> str:
    """The hash of what a tokenizer does, wherever it lies."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Whether it cuts and pads is a state that calls leave behind.
        said = {k: v for k, v in json.loads(backend.to_str()).items() if k not in _STATE}
    else:
        said = {"vocabulary": tokenizer.get_vocab(), "kind": type(tokenizer).__name__}
    said["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


_STATE = ("truncation", "padding")


def longest(pretrained: Pretrained, tokenizer: Any, wanted: Wanted) -> int:
    """Tokens of an example at most: as many as were asked for, if the model takes them.

    Raises:
        UsageError: it takes fewer.
    """
    most = _positions(pretrained.config)
    if wanted.sequence is None:
        return min(SEQUENCE, most, int(tokenizer.model_max_length))
    if wanted.sequence > most:
        got = f"--sequence {wanted.sequence}; its positions end at {most}"
        raise UsageError("the model takes no examples of so many tokens", got, f"--sequence {most}")
    return wanted.sequence


def _positions(config: Any) -> int:
    """How many a model has; those that are relative have no end."""
    if hasattr(config, "relative_attention_num_buckets"):
        return 1 << 62
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    return min((n for n in named if isinstance(n, int) and n > 1), default=1 << 62)


def tokens_together(sequence: int) -> int:
    """Examples of a batch, where the user does not say."""
    return max(1, min(BATCH_SIZE, _TOKENS_TOGETHER // sequence))


def text_examples(
    pretrained: Pretrained, tokenizer: Any, table: Table, wanted: Wanted
) -> tuple[Examples, Callable[[], tuple[str, ...]]]:
    """The examples of a model of text, and what is to be said of those that were fetched.

    Raises:
        InputError: the data is not what the task needs.
        UsageError: a length that the model does not take.
    """
    sequence = longest(pretrained, tokenizer, wanted)
    if pretrained.task in ("causal", "masked") and wanted.labels is not None:
        got = f"--labels {wanted.labels} for {type(pretrained.model).__name__}"
        raise UsageError("a language model's labels are its own tokens", got, "no --labels")
    columns = _columns(pretrained, table, wanted)
    texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    if pretrained.task == "causal":
        blocks = Blocks(tokenizer, texts, sequence, table.place)
        require_known(tokenizer, blocks.tokens, pretrained.model)
        return Examples(blocks), lambda: blocks.notes
    if tokenizer.pad_token is None:
        got = f"{pretrained.folder}: no pad_token"
        hint = "pad_token in tokenizer_config.json, and pad_token_id in config.json, as trained"
        raise InputError("the tokenizer cannot pad, and examples differ in length", got, hint)
    if pretrained.config.pad_token_id is None:  # classifiers ask it where a text ends
        pretrained.config.pad_token_id = tokenizer.pad_token_id
    encode = _Encode(tokenizer, sequence, pretrained.model)
    rows = _rows(pretrained, encode, table, texts, wanted)
    collate = Taking(_collator(pretrained.task, tokenizer), inputs_of(pretrained.model))
    return Examples(rows, collate), lambda: encode.notes


def _columns(pretrained: Pretrained, table: Table, wanted: Wanted) -> list[Sequence[Any]]:
    """The column of texts, or the two whose texts belong together."""
    classes = pretrained.task == "sequence classes"
    names = wanted.text or (None,)
    if len(names) > 1 + classes:
        got = f"--text {' --text '.join(map(str, names))} for {type(pretrained.model).__name__}"
        most = "two columns, as in --text premise --text hypothesis" if classes else "one column"
        raise UsageError("the model takes no examples of so many texts", got, f"--text of {most}")
    columns = [table.texts(name, wanted.labels, pairs=classes) for name in names]
    kind = list if pretrained.task == "token classes" else str
    for column in columns:
        for row, text in enumerate(column, 1):
            if not isinstance(text, kind):
                got = f"{table.place}: row {row} has {shorten(repr(text), 80)}"
                raise InputError(f"a text is no {_KINDS[kind]}", got, "--text of another column")
    return columns


def _rows(
    pretrained: Pretrained, encode: _Encode, table: Table, texts: Sequence[Any], wanted: Wanted
) -> Rows:
    """What is made of each text, and of its label or of the seed of what is masked in it."""
    if pretrained.task == "masked":
        if table.is_plain:
            texts = [line for text in texts for line in text.splitlines() if line.strip()]
        seeds = [key(wanted.seed, place) for place in range(len(texts))]
        return Rows(_Masked(encode), texts, seeds)
    labels = table.labels(wanted.labels)
    if pretrained.task == "seq2seq":
        return Rows(encode.pair, texts, labels)
    config = pretrained.config
    if pretrained.task == "token classes":
        classes = [as_classes(config, each, table.place) for each in labels]
        return Rows(encode.words, texts, classes)
    return Rows(encode.example, texts, as_classes(config, labels, table.place))


def _collator(task: Task, tokenizer: Any) -> Callable[[list[Any]], Any]:
    """The tokenizer's own way to make a batch; labels are ignored where tokens are padding."""
    import transformers

    collator: Callable[[list[Any]], Any]
    if task == "sequence classes":
        collator = transformers.DataCollatorWithPadding(tokenizer)
    else:
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return collator


def as_classes(config: Any, labels: Sequence[Any], place: str) -> list[Any]:
    """Labels as the numbers that a model knows them by.

    Numbers stay what they are, written out or not; names are looked up in ``label2id``.

    Raises:
        InputError: a name that the model does not know, or no label.
    """
    known = {str(name): number for name, number in (config.label2id or {}).items()}

    def number(label: Any) -> Any:
        if label in known:
            return int(known[label])
        if isinstance(label, str):
            for kind in (int, float):
                try:
                    return kind(label)
                except ValueError:
                    continue
        elif isinstance(label, (bool, int, float, list)):
            return label
        names = ", ".join(list(known)[:_MOST_NAMED])
        got = f"{place}: {shorten(repr(label), 80)}; it knows {names}"
        hint = "--labels of another column, or the names in label2id of config.json"
        raise InputError("a label is none of the model's", got, hint)

    found = [number(label) for label in labels]
    numbers = ("regression", "multi_label_classification")
    if config.num_labels == 1 or getattr(config, "problem_type", None) in numbers:
        return [list(map(float, n)) if isinstance(n, list) else float(n) for n in found]
    return found


class Rows:
    """One row for each text and what belongs to it, made when it is asked for."""

    def __init__(
        self,
        make: Callable[..., dict[str, Any]],
        texts: Sequence[Any],
        others: Sequence[Any],
    ) -> None:
        self.make, self.texts, self.others = make, texts, others

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.make(self.texts[index], self.others[index])


class _Encode:
    """Text as a tokenizer has it, cut where it is too long; ``cut`` are those texts."""

    def __init__(self, tokenizer: Any, length: int, model: Any) -> None:
        self.tokenizer, self.length, self.model = tokenizer, length, model
        self.cut: set[str] = set()

    def __call__(self, text: Any, **how: Any) -> Any:
        """One text, a pair of them, or the words of one."""
        texts = text if isinstance(text, tuple) else (text,)
        with quiet():
            row = self.tokenizer(*texts, truncation=True, max_length=self.length, **how)
            if len(row["input_ids"]) == self.length:
                whole = self.tokenizer(*texts, **how)
                if len(whole["input_ids"]) > self.length:
                    self.cut.add(str(text))
        if row["input_ids"]:
            require_known(self.tokenizer, torch.tensor(row["input_ids"], device="cpu"), self.model)
        return row

    def example(self, text: str, label: Any) -> dict[str, Any]:
        """A text and its class, number or numbers."""
        return {**self(text), "labels": label}

    def words(self, text: list[str], labels: list[int]) -> dict[str, Any]:
        """Words and their classes; of a word's tokens the first one has it."""
        if len(text) != len(labels):
            got = f"{shorten(repr(text), 80)} and {shorten(repr(labels), 80)}"
            hint = "--text and --labels of columns that hold lists of one length"
            raise InputError("words and their classes differ in number", got, hint)
        row = self(text, is_split_into_words=True)
        places = row.word_ids()
        first = [p is not None and p != q for p, q in zip(places, [None, *places], strict=False)]
        own = [labels[p] if f else IGNORED for p, f in zip(places, first, strict=True)]
        return {**row, "labels": own}

    def pair(self, text: str, answer: str) -> dict[str, Any]:
        """A text, and the tokens of its answer."""
        return {**self(text), "labels": self(text_target=answer, text=None)["input_ids"]}

    @property
    def notes(self) -> tuple[str, ...]:
        """How many were cut."""
        if not self.cut:
            return ()
        count = f"{len(self.cut)} of the examples that were kept had"
        return (f"{count} more than {self.length} tokens and were cut; --sequence takes more",)


class _Masked:
    """Texts of which some tokens are hidden, as transformers' own collator hides them.

    Which ones is drawn once, by a seed of the text's own; a draw that hides none is made anew.
    """

    def __init__(self, encode: _Encode) -> None:
        from transformers import DataCollatorForLanguageModeling

        self.encode = encode
        with blamed_on_transformers("the tokenizer has no mask"):
            self.collator = DataCollatorForLanguageModeling(
                encode.tokenizer, mlm_probability=MASKED
            )

    def __call__(self, text: str, seed: int) -> dict[str, Any]:
        """One row, with labels where tokens are hidden."""
        row = self.encode(text)
        ids = torch.tensor([row["input_ids"]], device="cpu")
        for attempt in range(_DRAWS):
            self.collator.generator = torch.Generator().manual_seed(key(seed, attempt) >> 1)
            with torch.device("cpu"):  # where the generator is
                hidden, labels = self.collator.torch_mask_tokens(ids.clone())
            if bool((labels != IGNORED).any()):
                break
        return {**row, "input_ids": hidden[0].tolist(), "labels": labels[0].tolist()}


def require_known(tokenizer: Any, tokens: Tensor, model: Any) -> None:
    """See that a model has a row for each token that its tokenizer has made.

    Raises:
        InputError: it has not.
    """
    size, most = len(model.get_input_embeddings().weight), int(tokens.max())
    if most >= size:
        name = tokenizer.convert_ids_to_tokens(most)
        got = f"token {most}, {name!r}, of a model that has {size}"
        hint = "the folder as it was saved after training, with its own tokenizer"
        raise InputError("the tokenizer makes tokens that the model does not have", got, hint)


class Blocks:
    """Documents one after the other, in blocks of equal length: what a causal model trains on.

    A document ends with the tokenizer's end of text where there are several of them and it has
    one. What makes no whole block at the end is left out.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[Any], length: int, place: str) -> None:
        documents = [text for text in texts if text]
        stream: list[int] = []
        ends: list[int] = []
        end = tokenizer.eos_token_id if len(documents) > 1 else None
        for ids in _tokenised(tokenizer, documents):
            stream += ids
            if end is not None and ids[-1:] != [end]:
                stream.append(end)
            ends.append(len(stream))
        self.length = min(length, len(stream))
        if self.length < 2:
            got = f"{place}: {len(stream)} tokens"
            raise InputError("the text is too short to predict a token of it", got, "more text")
        count = len(stream) // self.length
        self.tokens = torch.tensor(stream[: count * self.length], device="cpu").view(
            count, self.length
        )
        self.left_out = len(stream) - count * self.length
        inside = [place for place in ends[:-1] if place < self.tokens.numel()]
        self.crossed = sum(place % self.length != 0 for place in inside)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.tokens[index]
        return {"input_ids": block, "labels": block}

    @property
    def notes(self) -> tuple[str, ...]:
        """That documents are crossed, and what was left out."""
        told = []
        if self.crossed:
            told.append(
                f"blocks of {self.length} tokens cross {self.crossed} borders between documents: "
                "after one, tokens see the document before"
            )
        if self.left_out:
            told.append(
                f"the last {self.left_out} tokens, which make no whole block of {self.length}, "
                "are left out"
            )
        return tuple(told)


def _tokenised(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    with quiet():
        for start in range(0, len(texts), _AT_ONCE):
            yield from tokenizer(texts[start : start + _AT_ONCE])["input_ids"]
