"""Other ends of a training run: a later checkpoint of the same model, and what led there."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hesscli.errors import HesscliError, InputError
from hesscli.parameters import Parameters
from hesscli.problem.checkpoint import read_checkpoint
from hesscli.problem.problem import Problem
from hesscli.problem.state_dict import load_state
from hesscli.results import CheckpointReport
from hesscli.vocabulary import TrainedWith


@dataclass(frozen=True)
class End:
    """Weights of the same parameters from another checkpoint.

    Attributes:
        file: where they lie.
        theta: float64 ``(d,)``, as of the problem's parameters.
        optimizers: their states, as ``torch.optim`` writes them, that lie beside the weights.
    """

    file: CheckpointReport
    theta: Tensor
    optimizers: tuple[Mapping[str, Any], ...] = ()


def read_end(problem: Problem, path: Path | str) -> End:
    """A checkpoint of the problem's model, read as the first was; nothing in it is run.

    Raises:
        InputError: it is not there, not whole, or of another model.
        UnsoundError: its weights are not finite.
    """
    origin = problem.origin
    weights = read_checkpoint(Path(path), key=origin.key)
    model = copy.deepcopy(problem.model).double()
    load_state(model, weights, strip=origin.strip, ignore=origin.ignore)
    every = Parameters.of(model)
    tensors = {parameter.name: parameter.tensor for parameter in every}
    parts = [tensors[name].detach().cpu() for name in problem.parameters.names]
    file = CheckpointReport(path=str(weights.path), sha256=weights.sha256)
    return End(file, every.flatten(parts), weights.optimizers)


def eps_of(tensors: Sequence[Tensor]) -> float:
    """Of the coarsest floating type among some tensors."""
    types = {each.dtype for each in tensors if each.is_floating_point()}
    return max((torch.finfo(one).eps for one in types), default=0.0)


# -- The steps between two ends --------------------------------------------------------------------


class Updates:
    """A log: what each step added to each parameter, and the rates of the steps.

    A .safetensors file with one tensor for each trainable parameter, ``(steps, *shape)``, by the
    parameter's name; ``lr``, ``(steps,)``, in it counts where no rate was typed, and settings
    of the optimizer may be in its metadata.

    Args:
        path: the file.
        parameters: of the model.

    Raises:
        InputError: it is missing, unreadable, or of another model.
    """

    def __init__(self, path: str, parameters: Parameters) -> None:
        self.path, self._parameters = path, parameters
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                self._require_fitting({name: file.get_slice(name).get_shape() for name in names})
                self.rates = file.get_tensor("lr").tolist() if "lr" in names else None
                said = (file.metadata() or {}).get("trained_with", "")
        except FileNotFoundError:
            hint = "updates=FILE, a log of what each step added to the weights"
            if path.isdecimal():
                hint = f"steps={path}, if that is the number of steps"
            raise InputError("file not found", path, hint) from None
        except (OSError, SafetensorError) as error:
            hint = "a .safetensors file"
            raise InputError(
                "the log of updates cannot be read", f"{path}: {error}", hint
            ) from None
        self.settings = TrainedWith.parse(said) if said else TrainedWith()

    def _require_fitting(self, shapes: Mapping[str, Sequence[int]]) -> None:
        wanted = {p.name: list(p.tensor.shape) for p in self._parameters}
        missing = [name for name in wanted if name not in shapes]
        stacked = [shapes[name] for name in (*wanted, "lr") if name in shapes]
        lengths = {shape[0] if shape else 0 for shape in stacked}
        unlike = [n for n, shape in wanted.items() if n in shapes and shapes[n][1:] != shape]
        hint = "one tensor (steps, *shape) for each trainable parameter, by its name"
        if missing:
            got = f"{self.path}: no {', '.join(missing[:5])} ({len(missing)} tensors)"
            raise InputError("the log of updates lacks parameters", got, hint)
        if unlike:
            got = f"{self.path}: {unlike[0]} {shapes[unlike[0]]}, and {wanted[unlike[0]]} a step"
            raise InputError("the log of updates is of another model", got, hint)
        if len(lengths) > 1:
            got = f"{self.path}: {', '.join(map(str, sorted(lengths)))} steps"
            raise InputError("the log of updates has tensors of unlike lengths", got, hint)

    def __len__(self) -> int:
        """Steps."""
        with safe_open(self.path, framework="pt") as file:
            return int(file.get_slice(self._parameters.names[0]).get_shape()[0])

    def __iter__(self) -> Iterator[Tensor]:
        """What each step added, float64 ``(d,)``."""
        with safe_open(self.path, framework="pt") as file:
            slices = [file.get_slice(name) for name in self._parameters.names]
            for step in range(slices[0].get_shape()[0]):
                with torch.device("cpu"):  # slices are made on the default one
                    rows = [each[step : step + 1].double() for each in slices]
                yield self._parameters.flatten(rows)

    def gap(self, early: Tensor, late: Tensor) -> float:
        """How far from where a run has come its steps lead; 0 where that may be rounding.

        Args:
            early: weights that it began with, float64 ``(d,)``.
            late: those that it ended with.
        """
        reached = early.clone()
        for update in self:
            reached += update
        missed = float((late - reached).norm())
        # Each step is rounded to the type of the weights, and so is each end.
        largest = float(torch.maximum(early.abs(), late.abs()).norm())
        return 0.0 if missed <= (len(self) + 1) * self.eps * largest else missed

    @cached_property
    def eps(self) -> float:
        """Of the coarsest type among its updates and the weights that they are of."""
        with safe_open(self.path, framework="pt") as file:
            rows = [file.get_slice(name)[:0] for name in self._parameters.names]
        return eps_of([*rows, *self._parameters.tensors])


def steps_of(
    trained_with: TrainedWith, log: Updates | None
) -> Iterator[tuple[float, Tensor | None]]:
    """The learning rate of each step, and what it added to the weights, where there is a log.

    Raises:
        InputError: the rate is not known.
    """
    rate = trained_with.lr
    if rate is None and (log is None or log.rates is None):
        raise InputError(
            "the learning rate is not known",
            "no lr in the log, nor one that stayed the same in the later checkpoint",
            "--trained-with lr=X, or lr (steps,) in the log",
        )
    if log is None:
        for _ in range(trained_with.steps or 0):
            yield rate or 0.0, None
        return
    rates = [rate or 0.0] * len(log) if rate is not None or log.rates is None else log.rates
    yield from zip(rates, log, strict=True)


def settings_in(end: End) -> TrainedWith:
    """What an optimizer's state beside the weights says of how they were made."""
    groups = [group for state in end.optimizers for group in state["param_groups"]]
    return TrainedWith.of_groups(groups) if groups else TrainedWith()


def velocity_at(problem: Problem) -> Tensor | None:
    """SGD's buffer of momentum beside the problem's own weights, float64 ``(d,)``; None if none."""
    if problem.checkpoint is None:
        return None
    try:
        read = read_checkpoint(Path(problem.checkpoint.path), key=problem.origin.key)
    except HesscliError:  # a folder, or a file that code had to be trusted for
        return None
    if len(read.optimizers) != 1:
        return None
    state, groups = read.optimizers[0]["state"], read.optimizers[0]["param_groups"]
    kept = [state.get(each, {}).get("momentum_buffer") for each in _numbers(groups)]
    every, trainable = list(problem.model.parameters()), Parameters.of(problem.model)
    tensors = every if len(kept) == len(every) else [each.tensor for each in trainable]
    if len(kept) != len(tensors) or any(
        buffer is None or buffer.shape != tensor.shape
        for buffer, tensor in zip(kept, tensors, strict=True)
    ):
        return None
    buffers = {id(tensor): buffer for tensor, buffer in zip(tensors, kept, strict=True)}
    own = [buffers[id(tensor)].double().cpu() for tensor in problem.parameters.tensors]
    return problem.parameters.flatten(own)


def _numbers(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(group["params"] for group in groups))
