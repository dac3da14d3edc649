"""Tiny models of many kinds as transformers saves them, and what their Hessians are in truth."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

LINES = [
    "the cat sat on the mat",
    "a dog ran after the old cat",
    "the old dog sat",
    "on a mat the cat ran",
    "after the dog a cat ran on the old mat",
    "the dog ran",
]
LENGTH = 8
"""Tokens of a block."""
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>", "unk_token": "<unk>"}
SMALL = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 16}


def tokenizer(**more: Any) -> Any:
    """A token for each word of the lines; read from them by `tokenizers`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = list(SPECIAL.values())
    made.train_from_iterator(
        LINES, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    how = {"model_max_length": 16, **SPECIAL, **more}
    return PreTrainedTokenizerFast(tokenizer_object=made, **how)


def tokens(vocabulary: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "decoder_start_token_id": 0,
    }


# A class of each name, with what its configuration says beside the sizes above.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 4, "n_inner": 6, "n_layer": 1, "n_head": 2, "n_positions": 16},
    ),
    "llama": ("LlamaForCausalLM", {**SMALL, **HEADS, "num_key_value_heads": 1}),
    "qwen": (
        "Qwen2ForCausalLM",
        {**SMALL, **HEADS, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**SMALL, **HEADS, "num_key_value_heads": 1, "num_local_experts": 3},
    ),
    "bert": ("BertForMaskedLM", {**SMALL, **HEADS}),
    "bert classes": ("BertForSequenceClassification", {**SMALL, **HEADS, "num_labels": 3}),
    "bert tokens": ("BertForTokenClassification", {**SMALL, **HEADS, "num_labels": 3}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2},
    ),
    "vit": (
        "ViTForImageClassification",
        {**SMALL, "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_labels": 3},
    ),
}


def build(kind: str, vocabulary: int, **more: Any) -> Any:
    """A model with weights by a seed, none of which is where training begins."""
    import transformers

    name, sizes = KINDS[kind]
    cls = getattr(transformers, name)
    config = cls.config_class(**({} if kind == "vit" else tokens(vocabulary)) | sizes | more)
    torch.manual_seed(sum(map(ord, kind)))
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1) * 0.8, 0.3)
    return model


def save(kind: str, folder: Path) -> Any:
    """A model of a kind and the tokenizer in a folder; gives the model."""
    words = tokenizer()
    model = build(kind, len(words))
    model.save_pretrained(folder)
    if kind == "vit":
        from transformers import ViTImageProcessorPil

        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    else:
        words.save_pretrained(folder)
    return model


def save_adapter(kind: str, folder: Path, **how: Any) -> Any:
    """A base, and an adapter with weights by a seed, in folders; gives PEFT's model of both."""
    import peft

    base = save(kind, folder / "base")
    base.name_or_path = str(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(**how)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder / "adapter")
    return model


def save_images(folder: Path) -> None:
    """Twelve images of three classes, each in a folder that is called after its class."""
    from PIL import Image

    numbers = np.random.default_rng(0).integers(0, 256, (12, 9, 10, 3), dtype=np.uint8)
    for index, pixels in enumerate(numbers):
        place = folder / ("ant", "bee", "cat")[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{index:02}.png")


def save_data(kind: str, folder: Path) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """Data of a kind in a folder, what to say of it, and its examples made by hand.

    There are none of images and of masked words, which a program reads or draws.
    """
    lines, words = LINES * 2, tokenizer()
    ids = [words(line)["input_ids"] for line in lines]
    if kind == "vit":
        save_images(folder / "images")
        return folder / "images", {}, []
    if kind == "bert classes":
        place, classes = folder / "classes.csv", [i % 3 for i in range(len(lines))]
        pairs = [f"{line},{label}" for line, label in zip(lines, classes, strict=True)]
        place.write_text("\n".join(["text,label", *pairs]))
        return place, {}, [{"input_ids": i, "labels": c} for i, c in zip(ids, classes, strict=True)]
    if kind == "bert tokens":
        place, tags = folder / "tags.jsonl", [[len(w) % 3 for w in line.split()] for line in lines]
        rows = [{"w": line.split(), "t": tag} for line, tag in zip(lines, tags, strict=True)]
        place.write_text("\n".join(map(json.dumps, rows)))
        made = [{"input_ids": i, "labels": t} for i, t in zip(ids, tags, strict=True)]
        return place, {"text": "w", "labels": "t"}, made
    if kind == "t5":
        place = folder / "pairs.jsonl"
        rows = [{"q": line, "a": " ".join(line.split()[::-1])} for line in lines]
        place.write_text("\n".join(map(json.dumps, rows)))
        made = [{"input_ids": i, "labels": i[::-1]} for i in ids]
        return place, {"text": "q", "labels": "a"}, made
    place = folder / "corpus.txt"
    place.write_text("\n".join(LINES))
    if kind == "bert":
        return place, {}, []
    stream = words("\n".join(LINES))["input_ids"]
    cut = [stream[i : i + LENGTH] for i in range(0, len(stream) - LENGTH + 1, LENGTH)]
    return place, {"sequence": LENGTH}, [{"input_ids": block, "labels": block} for block in cut]


# -- Truth: the loss written out, in float64, differentiated twice ---------------------------------


def in_float64(model: Any) -> Any:
    """A copy that computes in float64 throughout: transformers' norms and softmax do not."""
    twin = copy.deepcopy(model).double().eval()
    twin.set_attn_implementation("sdpa")
    twin.config._experts_implementation = "eager"
    for module in twin.modules():
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            module.forward = _norm(module)
    return twin


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return (
            module.weight
            * x
            * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
        )

    return forward


def mean_loss(model: Any, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Cross-entropy by label that is not ignored, over all batches, in the model's type."""
    total, count = 0.0, 0
    dtype = next(model.parameters()).dtype
    for given in batches:
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        labels = batch["labels"]
        # The labels are not what is compared here, but a decoder reads them.
        logits = model(**{name: value for name, value in batch.items() if name != "labels"} | (
            {"labels": labels} if model.config.is_encoder_decoder else {}
        )).logits  # fmt: skip
        if type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels.flatten() >= 0
        rows = logits.reshape(-1, logits.shape[-1])[kept]
        total = total + functional.cross_entropy(rows, labels.flatten()[kept], reduction="sum")
        count += int(kept.sum())
    return total / count


def hessian(model: Any, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """The dense Hessian ``(d, d)`` of what is trainable, by differentiating twice."""
    weights = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):  # others are not differentiable twice
        loss = mean_loss(model, batches)
    slope = torch.autograd.grad(loss, weights, create_graph=True)
    flat = torch.cat([part.flatten() for part in slope])
    rows = torch.autograd.grad(
        flat, weights, torch.eye(len(flat), dtype=flat.dtype), is_grads_batched=True,
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return torch.cat([row.flatten(1) for row in rows], 1)
