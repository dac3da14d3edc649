"""How options are read: every accepted form, and every refusal."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hesscli.cli import reading
from hesscli.cli.answer import what_is_asked
from hesscli.cli.console import describe_estimate, describe_time_left
from hesscli.cli.trace import USAGE as TRACE
from hesscli.cli.usage import fill_bare_layers
from hesscli.errors import UsageError
from hesscli.results import Snapshot

ACCEPTED = [
    (reading.fraction, "5%", 0.05),
    (reading.fraction, "0.05", 0.05),
    (reading.fraction, "0.5%", 0.005),
    (reading.fraction, "150%", 1.5),
    (reading.fraction, "1e-3", 1e-3),
    (reading.fraction, "1", 1.0),
    (reading.confidence, "95%", 0.95),
    (reading.confidence, "0.99", 0.99),
    (reading.duration, "10m", 600.0),
    (reading.duration, "90s", 90.0),
    (reading.duration, "1h30m", 5400.0),
    (reading.duration, "1h30m10s", 5410.0),
    (reading.duration, "1.5h", 5400.0),
    (reading.duration, "600", 600.0),
    (reading.duration, "0.25", 0.25),
    (reading.duration, "none", None),
    (reading.probes, "64", (0, 64)),
    (reading.probes, "64:128", (64, 128)),
    (reading.probes, "0:1", (0, 1)),
    (reading.examples, "4096", "4096"),
    (reading.examples, "all", "all"),
    (reading.examples, "first:10", "first:10"),
    (reading.block, "auto", "auto"),
    (reading.block, "head:4", "head:4"),
    (reading.block, "32", "32"),
    (reading.device, "auto", "auto"),
    (reading.device, "cpu", "cpu"),
    (reading.device, "cuda", "cuda"),
    (reading.device, "cuda:1", "cuda:1"),
    (reading.non_negative, "0", 0.0),
    (reading.non_negative, "1e-4", 1e-4),
    (reading.positive, "0.1", 0.1),
    (reading.count, "1", 1),
    (reading.whole, "0", 0),
    (reading.whole, str(2**63 - 1), 2**63 - 1),
]

REFUSED = [
    (reading.fraction, ["", "%", "0", "0%", "-5%", "5", "95", "nan", "nan%", "inf%", "five"]),
    (reading.confidence, ["0", "1", "100%", "95", "-1", "nan"]),
    (reading.duration, ["", "0", "-5", "0s", "10x", "m", "1m1h", "inf", "nan", "9" * 400]),
    (reading.probes, ["", "0", "-1", "5:5", "8:4", ":", "3:", "1:2:3", "1.5", "many"]),
    (reading.examples, ["", "0", "-1", "first", "first:", "first:0", "most", "1.5", "ALL"]),
    (reading.block, ["", "0", "head:", "head:0", "head", "rows", "-1", "1.5"]),
    (reading.device, ["", "gpu", "cuda:", "cuda:x", "cuda0", "mps"]),
    (reading.non_negative, ["", "-1", "nan", "inf", "x"]),
    (reading.positive, ["", "0", "-1", "nan", "inf"]),
    (reading.count, ["", "0", "-1", "1.0"]),
    (reading.whole, ["", "-1", "1e3", str(2**63)]),
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
