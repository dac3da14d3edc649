"""A vector over the parameters, from a file with one tensor a parameter."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hesscli.errors import InputError
from hesscli.parameters import Parameters


def load_vector(path: Path, parameters: Parameters) -> Tensor:
    """The file's tensors as one vector, float64 ``(d,)``.

    Raises:
        InputError: the file is missing or unreadable, or its tensors are not the parameters'.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(
            "file not found", str(path), "--vector gradient, or a .safetensors file"
        ) from None
    except (OSError, SafetensorError) as error:
        raise InputError(
            "the vector cannot be read", f"{path}: {error}", "a .safetensors file"
        ) from None
    wanted = {p.name: tuple(p.tensor.shape) for p in parameters}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != given:
        raise InputError(
            "the vector's tensors are not the parameters'",
            f"{path}: {_difference(wanted, given)}",
            "one tensor for each trainable parameter, with its name and shape",
        )
    vector = parameters.flatten([tensors[name].to(torch.float64) for name in parameters.names])
    if not torch.isfinite(vector).all():
        raise InputError("the vector is not finite", str(path), "a vector without NaN or infinity")
    return vector


def _difference(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> str:
    """The first names that are missing, unexpected or of another shape."""
    missing = [f"no {name}" for name in wanted if name not in given]
    unexpected = [f"unexpected {name}" for name in given if name not in wanted]
    misshapen = [
        f"{name} of shape {given[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    found = [*missing, *unexpected, *misshapen]
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
