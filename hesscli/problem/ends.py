"""Other ends of a training run: a later checkpoint of the same model, and what led there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hesscli.errors import InputError
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
    """

    file: CheckpointReport
    theta: Tensor


def read_end(problem: Problem, path: Path | str) -> End:
    """A checkpoint of the problem's model; nothing in it is run.

    Raises:
        InputError: it is not there, not whole, or of another model.
        UnsoundError: its weights are not finite.
    """
    weights = read_checkpoint(Path(path))
    model = copy.deepcopy(problem.model).double()
    load_state(model, weights)
    every = Parameters.of(model)
    tensors = {parameter.name: parameter.tensor for parameter in every}
    parts = [tensors[name].detach().cpu() for name in problem.parameters.names]
    file = CheckpointReport(path=str(weights.path), sha256=weights.sha256)
    return End(file, every.flatten(parts))


def steps_of(problem: Problem, trained_with: TrainedWith) -> Iterator[tuple[float, Tensor | None]]:
    """The learning rate of each step, and what it added to the weights, where there is a log.

    A log is a .safetensors file with one tensor for each trainable parameter, ``(steps, *shape)``,
    by the parameter's name; ``lr``, ``(steps,)``, in it counts in place of a single rate.

    Raises:
        InputError: the log is missing, unreadable or of another model.
    """
    rate, path = trained_with.lr, trained_with.updates
    if path is None:
        for _ in range(trained_with.steps or 0):
            yield _known(rate), None
        return
    parameters = problem.parameters
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            _require_all(path, names, parameters)
            slices = [file.get_slice(name) for name in parameters.names]
            count = min((each.get_shape()[0] for each in slices), default=0)
            rates = file.get_tensor("lr").tolist() if "lr" in names else [_known(rate)] * count
            for step in range(count):
                rows = [each[step : step + 1].double() for each in slices]
                yield rates[step], parameters.flatten(rows)
    except FileNotFoundError:
        raise InputError(
            "file not found", path, "updates=FILE, a log of what each step added to the weights"
        ) from None
    except (OSError, SafetensorError) as error:
        raise InputError(
            "the log of updates cannot be read", f"{path}: {error}", "a .safetensors file"
        ) from None


def _known(rate: float | None) -> float:
    if rate is None:
        raise InputError(
            "the learning rate is not known", "updates, and no lr in them", "--trained-with lr=X"
        )
    return rate


def _require_all(path: str, names: set[str], parameters: Parameters) -> None:
    missing = [name for name in parameters.names if name not in names]
    if missing:
        raise InputError(
            "the log of updates lacks parameters",
            f"{path}: no {', '.join(missing[:5])} ({len(missing)} tensors)",
            "one tensor (steps, *shape) for each trainable parameter, by its name",
        )
