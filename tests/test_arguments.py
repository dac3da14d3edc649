"""Numbers that Python hands to a command's function: refused by name before anything runs."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import hesscli
from hesscli.errors import UsageError

WRONG = {
    "budget": ["60s", 0, -1.0, float("nan"), True],
    "rtol": ["5%", 5, 0, float("nan")],
    "atol": ["1", -1],
    "confidence": [95, 1, 0, "95%"],
    "seed": ["a", -1, 0.5, 2**63],
    "probes": ["16", 2.5, (0, 1.5), -4],
    "refine": [2, "1e-3"],
    "bandwidth": ["auto", 0],
    "sparsity": [90, 0, 1, "90%"],
    "damping": [0, "1e-3"],
    "steps": [0, 1.5, "8"],
    "k": [0, "3"],
    "exact_limit": [0],
}
FUNCTIONS = ["trace", "diagonal", "spectrum", "sensitivity", "ihvp", "prune", "check", "symmetries"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_number_of_its_kind(name: str) -> None:
    """In three lines, as a Python argument is written; the problem is not looked at."""
    function = getattr(hesscli, name)
    taken = inspect.signature(function).parameters.keys() & WRONG.keys()
    assert {"budget", "seed"} <= taken
    for argument in taken:
        for value in WRONG[argument]:
            with pytest.raises(UsageError) as refusal:
                function(None, **{argument: value})
            assert f"{argument}={value!r}" in str(refusal.value)
            assert f"try: {argument}=" in str(refusal.value)


def test_numbers_of_any_type(sunspots: hesscli.Problem) -> None:
    plain = {"probes": (0, 8), "seed": 3, "rtol": 0.25, "budget": 60}
    kinds = (np.int64, np.int32, np.float32, np.float64)
    given = {
        name: tuple(map(kind, value)) if name == "probes" else kind(value)
        for (name, value), kind in zip(plain.items(), kinds, strict=True)
    }
    found, wanted = (
        hesscli.trace(sunspots, method="hutchinson", **each) for each in (given, plain)
    )
    assert found.trace == wanted.trace
