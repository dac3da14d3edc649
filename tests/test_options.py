"""How options are read: every accepted form, and every refusal."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hesscli.cli import parsing
from hesscli.cli.answer import what_is_asked
from hesscli.cli.console import describe_estimate, describe_time_left
from hesscli.cli.trace import USAGE as TRACE
from hesscli.cli.usage import fill_bare_layers
from hesscli.errors import UsageError
from hesscli.results import Snapshot

ACCEPTED = [
    (parsing.fraction, "5%", 0.05),
    (parsing.fraction, "0.05", 0.05),
    (parsing.fraction, "0.5%", 0.005),
    (parsing.fraction, "150%", 1.5),
    (parsing.fraction, "1e-3", 1e-3),
    (parsing.fraction, "1", 1.0),
    (parsing.confidence, "95%", 0.95),
    (parsing.confidence, "0.99", 0.99),
    (parsing.duration, "10m", 600.0),
    (parsing.duration, "90s", 90.0),
    (parsing.duration, "1h30m", 5400.0),
    (parsing.duration, "1h30m10s", 5410.0),
    (parsing.duration, "1.5h", 5400.0),
    (parsing.duration, "600", 600.0),
    (parsing.duration, "0.25", 0.25),
    (parsing.duration, "none", None),
    (parsing.probes, "64", 64),
    (parsing.probes, "64:128", (64, 128)),
    (parsing.probes, "0:1", (0, 1)),
    (parsing.numbers, "8:16", (8, 16)),
    (parsing.examples, "4096", "4096"),
    (parsing.examples, "all", "all"),
    (parsing.examples, "first:10", "first:10"),
    (parsing.block, "auto", "auto"),
    (parsing.block, "head:4", "head:4"),
    (parsing.block, "32", "32"),
    (parsing.device, "auto", "auto"),
    (parsing.device, "cpu", "cpu"),
    (parsing.device, "cuda", "cuda"),
    (parsing.device, "cuda:1", "cuda:1"),
    (parsing.non_negative, "0", 0.0),
    (parsing.non_negative, "1e-4", 1e-4),
    (parsing.positive, "0.1", 0.1),
    (parsing.count, "1", 1),
    (parsing.whole, "0", 0),
    (parsing.whole, str(2**63 - 1), 2**63 - 1),
]

REFUSED = [
    (parsing.fraction, ["", "%", "0", "0%", "-5%", "5", "95", "nan", "nan%", "inf%", "five"]),
    (parsing.confidence, ["0", "1", "100%", "95", "-1", "nan"]),
    (parsing.duration, ["", "0", "-5", "0s", "10x", "m", "1m1h", "inf", "nan", "9" * 400]),
    (parsing.probes, ["", "0", "-1", "5:5", "8:4", ":", "3:", "1:2:3", "1.5", "many"]),
    (parsing.numbers, ["", "8", "5:5", "8:4", ":", "3:", ":3", "1:2:3"]),
    (parsing.examples, ["", "0", "-1", "first", "first:", "first:0", "most", "1.5", "ALL"]),
    (parsing.block, ["", "0", "head:", "head:0", "head", "rows", "-1", "1.5"]),
    (parsing.device, ["", "gpu", "cuda:", "cuda:x", "cuda0", "mps"]),
    (parsing.non_negative, ["", "-1", "nan", "inf", "x"]),
    (parsing.positive, ["", "0", "-1", "nan", "inf"]),
    (parsing.count, ["", "0", "-1", "1.0"]),
    (parsing.whole, ["", "-1", "1e3", str(2**63)]),
]


@pytest.mark.parametrize(("read", "text", "value"), ACCEPTED)
def test_accepted(read, text, value) -> None:
    assert read(text) == value


@pytest.mark.parametrize(("read", "text"), [(read, t) for read, texts in REFUSED for t in texts])
def test_refused(read, text) -> None:
    with pytest.raises((ValueError, UsageError)):
        read(text)


@pytest.mark.parametrize(
    ("typed", "rtol"),
    [
        ({}, 0.05),
        ({"rtol": 0.01}, 0.01),
        ({"atol": 0.1}, None),
        ({"rtol": 0.01, "atol": 0.1}, 0.01),
    ],
)
def test_a_typed_absolute_tolerance_replaces_the_usual_relative_one(
    typed: dict[str, float], rtol: float | None
) -> None:
    assert what_is_asked(TRACE, TRACE.defaults() | typed)["rtol"] == rtol


@pytest.mark.parametrize(
    ("args", "filled"),
    [
        ([], []),
        (["--layer"], ["--layer=*"]),
        (["--layer", "conv*"], ["--layer", "conv*"]),
        (["--layer", "--out", "json"], ["--layer=*", "--out", "json"]),
        (["--layer", "-q"], ["--layer=*", "-q"]),
        (["--layer", "--layer", "fc"], ["--layer=*", "--layer", "fc"]),
        (["--layer=fc", "x.pt"], ["--layer=fc", "x.pt"]),
        (["--layer", "--", "x.pt"], ["--layer=*", "--", "x.pt"]),
        (["--", "--layer"], ["--", "--layer"]),
        (["--layer", "missing.pt"], ["--layer", "missing.pt"]),
    ],
)
def test_bare_layer(args: list[str], filled: list[str]) -> None:
    assert fill_bare_layers(args) == filled


def test_a_file_after_a_bare_layer_is_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    checkpoint.touch()
    assert fill_bare_layers(["--layer", str(checkpoint)]) == ["--layer=*", str(checkpoint)]
    # A folder may well be named like a layer.
    (tmp_path / "conv1").mkdir()
    folder = str(tmp_path / "conv1")
    assert fill_bare_layers(["--layer", folder]) == ["--layer", folder]


def test_time_left_is_the_rest_at_the_observed_rate_or_unknown() -> None:
    first = Snapshot(phase="probing", done=10.0, total=100.0)
    assert describe_time_left(first, first, 0.0) == "time left unknown"
    # 20 products in 60 s leave 70, which is 210 s.
    later = Snapshot(phase="probing", done=30.0, total=100.0)
    assert describe_time_left(first, later, 60.0) == "3m30s left"
    beyond = Snapshot(phase="probing", done=120.0, total=100.0)
    assert describe_time_left(first, beyond, 60.0) == "0s left"
    unbounded = Snapshot(phase="probing", done=30.0)
    assert describe_time_left(first, unbounded, 60.0) == "time left unknown"


def test_the_estimate_comes_with_its_error_bar_where_there_is_one() -> None:
    assert describe_estimate(Snapshot(phase="pilot")) == ""
    assert describe_estimate(Snapshot(phase="pilot", estimate=12.5)) == "12.5"
    bounded = Snapshot(phase="probing", estimate=12.5, interval=(11.25, 13.75))
    assert describe_estimate(bounded) == "12.5 ± 1.2"
    unbounded = Snapshot(phase="probing", estimate=12.5, interval=(-math.inf, math.inf))
    assert describe_estimate(unbounded) == "12.5"
