"""From a checkpoint and a spec to a Problem."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesscli.errors import BudgetError, HesscliError, InputError, UsageError
from hesscli.problem.checkpoint import Checkpoint, read_checkpoint
from hesscli.problem.criteria import NAMED, as_loss, with_tensors
from hesscli.problem.factory import blamed_on_user, call_user, load_factory
from hesscli.problem.forward import cast, require_real
from hesscli.problem.losses import Loss, StepLoss
from hesscli.problem.parts import Origin, Parts
from hesscli.problem.precision import as_wide, weights_in
from hesscli.problem.pretrained.examples import Wanted
from hesscli.problem.pretrained.loading import from_folder
from hesscli.problem.problem import Problem
from hesscli.problem.sources import TensorRows
from hesscli.problem.spec import DataSpec, LossSpec, Spec, read_spec
from hesscli.problem.spec_places import find_spec, specs_of
from hesscli.problem.state_dict import Loaded, load_state
from hesscli.results import CheckpointReport, Observe, Snapshot
from hesscli.units import larger_budget
from hesscli.vocabulary import Selection


def load(
    checkpoint: Path | str | None = None,
    *,
    spec: Path | str | None = None,
    data: Path | str | None = None,
    text: str | Sequence[str] | None = None,
    labels: str | None = None,
    sequence: int | None = None,
    params: str | Sequence[str] | None = None,
    examples: str | int = Selection.usual,
    device: str = "auto",
    dtype: str | None = None,
    checkpoint_activations: bool = False,
    batch_size: int | None = None,
    weight_decay: float | None = None,
    trust: bool = False,
    seed: int = 0,
    budget: float | None = None,
    observe: Observe | None = None,
) -> Problem:
    """Load a checkpoint and the data that its spec names, or a Hugging Face folder and its data.

    Args:
        checkpoint: weights; default the one that the spec names. With ``data`` a folder that
            ``save_pretrained`` wrote, or a name that is in the cache.
        spec: default ``<checkpoint stem>.toml`` or ``hesscli.toml`` beside the checkpoint, or
            ``hesscli.toml`` in the working folder. It names code that is run; one that was found
            and not named must lie inside the working folder's tree.
        data: of a Hugging Face folder, which needs no spec: a .txt, .jsonl, .csv or .parquet
            file, a folder of images by class, or what ``datasets`` saved or has in its cache.
        text: the column of ``data`` that holds texts, or the two of pairs; default ``text``.
        labels: the column that holds labels; default ``labels`` or ``label``.
        sequence: tokens of an example at most; default 512, fewer where the model takes fewer.
        params: globs of the parameters or modules that the matrix is of, ``!GLOB`` leaving some
            out; the others count as frozen. Default all trainable ones.
        examples: how many to keep at random: ``N``, ``"all"``, or ``"first:N"``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        dtype: ``float32`` or ``float64``, or ``bfloat16`` for products under autocast; default
            the checkpoint's (half types: float32).
        checkpoint_activations: keep of the model's blocks what they are given, and run them again.
        batch_size: instead of the spec's.
        weight_decay: instead of the spec's.
        trust: let code in the checkpoint run, and that of a spec found outside that tree.
        seed: of the draw of examples.
        budget: seconds after which reading is given up.
        observe: told of examples read.

    Raises:
        InputError: checkpoint, spec or data are missing, unreadable or do not match.
        UnsoundError: weights that are not finite.
        UsageError: a glob of ``params`` takes nothing, or nothing is left.
    """
    path = None if checkpoint is None else Path(checkpoint)
    named = None if spec is None else Path(spec)
    asked = None if dtype is None else getattr(torch, dtype)
    chosen = None if asked is None else weights_in(asked)
    place = resolve_device(device)
    texts = (text,) if isinstance(text, str) else tuple(text or ())
    wanted = Wanted(texts or None, labels, sequence, seed)
    if data is None:
        _require_no_wishes(wanted)
        parts = _from_spec(path, named, place, chosen, trust=trust)
    else:
        _require_no_spec(path, named)
        parts = from_folder(path, str(data), wanted, chosen, trust=trust)
    with blamed_on_user(
        f"{parts.where} failed", "data that can be read in full, in one type of batch"
    ):
        problem = Problem(
            parts.model,
            parts.loss,
            parts.data,
            params=params,
            output=parts.output,
            weight_decay=parts.weight_decay if weight_decay is None else weight_decay,
            examples=examples,
            reduction=parts.reduction,
            collate=parts.collate,
            batch_size=parts.batch_size if batch_size is None else batch_size,
            unseen=parts.unseen,
            device=place,
            dtype=parts.dtype if asked is None else asked,
            checkpoint_activations=checkpoint_activations,
            seed=seed,
            checkpoint=parts.checkpoint,
            warnings=parts.notes,
            observe=_until(budget, observe),
        )
    problem.origin = parts.origin
    problem.warnings += parts.seen()
    return problem


def _until(budget: float | None, observe: Observe | None) -> Observe | None:
    """Gives up reading when the budget is spent."""
    if budget is None:
        return observe
    began = time.monotonic()

    def watch(snapshot: Snapshot) -> bool:
        seconds = time.monotonic() - began
        if seconds > budget:
            raise _not_read(snapshot, budget, seconds)
        return observe is not None and observe(snapshot)

    return watch


def _not_read(snapshot: Snapshot, budget: float, seconds: float) -> HesscliError:
    had = f"{budget:.2g} s that start-up had left"
    if snapshot.done is None:
        return BudgetError(
            "the budget ended before the data were looked through",
            f"{had}, then still {snapshot.phase}",
            larger_budget(seconds),
        )
    if snapshot.total is None:
        return InputError(
            "the data did not end within the budget",
            f"{snapshot.done:.0f} examples read in {budget:.3g} s",
            f"--examples first:{Selection.usual}, which reads no more than those",
        )
    return BudgetError(
        "the budget ended before the data were read",
        f"{snapshot.done:.0f} of {snapshot.total:.0f} examples, in the {had}",
        larger_budget(seconds, snapshot.done / snapshot.total),
    )


def resolve_device(name: str) -> torch.device:
    """A device from ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.

    Raises:
        UsageError: that device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UsageError(
            "no such device", f"--device {name}; {count} CUDA devices are visible", "--device auto"
        )
    return device


def _from_spec(
    path: Path | None,
    named: Path | None,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    trust: bool,
) -> Parts:
    """What a spec describes."""
    document = read_spec(find_spec(path, named, trust=trust))
    chosen_key = document.checkpoint_keys.key
    weights = read_checkpoint(_checkpoint_path(path, document), trust=trust, key=chosen_key)
    chosen = as_wide(weights.state.values()) if dtype is None else dtype
    model, loaded = _build_model(document, weights, device, chosen)
    folder = document.path.parent
    return Parts(
        model=model,
        loss=_build_loss(document.loss, folder),
        data=_build_data(document.data, folder),
        dtype=chosen,
        checkpoint=CheckpointReport(path=str(weights.path), sha256=weights.sha256),
        where=f"[data] {document.data.factory or document.data.file}",
        output=None if document.model is None else document.model.output,
        weight_decay=document.loss.weight_decay,
        reduction=document.loss.reduction,
        collate=_collate(document.data, folder),
        batch_size=document.data.batch_size,
        unseen=document.data.unseen,
        notes=(*weights.notes, *loaded.notes),
        origin=Origin(
            {"spec": document.sha256},
            file=weights.path,
            names=loaded.names,
            key=chosen_key,
            strip=document.checkpoint_keys.strip,
            ignore=tuple(document.checkpoint_keys.ignore),
            trust=trust,
        ),
    )


def _require_no_spec(path: Path | None, named: Path | None) -> None:
    """Refuse two accounts of what the data is: a spec that is meant, and ``--data``."""
    own = [] if path is None else specs_of(path)
    for found in filter(None, (named, *own)):
        raise UsageError(
            "a spec and --data both say what the data is",
            f"{found} and --data",
            "no --data, and the spec counts; or --data and no --spec, the spec moved away",
        )


def _require_no_wishes(wanted: Wanted) -> None:
    """Refuse options that nothing would follow."""
    for option, value in wanted.options.items():
        if value is not None:
            raise UsageError(
                f"{option} is about --data, and there is none",
                f"{option} {value}",
                f"--data FILE {option} {value}, for a Hugging Face folder",
            )


def _checkpoint_path(path: Path | None, spec: Spec) -> Path:
    if path is not None:
        return path
    if spec.checkpoint is not None:
        return spec.checkpoint
    raise InputError(
        "no checkpoint given",
        f"{spec.path} names none",
        'an argument, as in `hesscli trace model.pt`, or checkpoint = "model.pt" in the spec',
    )


def _build_model(
    spec: Spec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, Loaded]:
    """The model with its weights, and how they came to fit."""
    if spec.model is None:
        if checkpoint.module is None:
            raise InputError(
                "the spec does not say how the model is built",
                f"{spec.path} has no [model]; {checkpoint.path.name} holds weights alone",
                'factory = "net:Net" under [model]',
            )
        names = {name: name for name in checkpoint.state}
        return cast(checkpoint.module, device, dtype), Loaded((), names)
    build = load_factory(spec.model.factory, spec.path.parent, "[model] factory")
    model = call_user(partial(build, **spec.model.kwargs), where="[model] factory")
    if not isinstance(model, nn.Module):
        raise InputError(
            "[model] factory must return a torch.nn.Module",
            f"{spec.model.factory} returned {type(model).__name__}",
            "a class or function that builds the network",
        )
    require_real(model)
    # Before the weights come, for float64 ones would be rounded to the factory's.
    cast(model, device, dtype)
    keys = spec.checkpoint_keys
    loaded = load_state(model, checkpoint, strip=keys.strip, ignore=keys.ignore)
    return model.train(spec.model.training), loaded


def _build_data(spec: DataSpec, folder: Path) -> Any:
    if spec.file is not None:
        inputs = [spec.inputs] if isinstance(spec.inputs, str) else (spec.inputs or [])
        return TensorRows.from_file(spec.file, inputs, spec.targets)
    build = load_factory(str(spec.factory), folder, "[data] factory")
    return call_user(partial(build, **spec.kwargs), where="[data] factory")


def _collate(spec: DataSpec, folder: Path) -> Callable[..., Any] | None:
    return None if spec.collate is None else load_factory(spec.collate, folder, "[data] collate")


def _build_loss(spec: LossSpec, folder: Path) -> Loss:
    if spec.name is not None:
        chosen = {"label_smoothing", "ignore_index", "class_weights", "pos_weight"}
        return NAMED[spec.name](**spec.model_dump(include=chosen & spec.model_fields_set))
    if spec.step is not None:
        step = load_factory(spec.step, folder, "[loss] step")
        return StepLoss(partial(step, **spec.kwargs), spec.step)
    loss = load_factory(str(spec.factory), folder, "[loss] factory")
    bound = partial(loss, **with_tensors(loss, spec.kwargs))
    if isinstance(loss, type):  # a criterion, which is built first
        return as_loss(call_user(bound, where="[loss] factory"), spec.factory)
    return as_loss(bound, spec.factory)
