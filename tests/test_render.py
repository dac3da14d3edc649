"""What people read: the right numbers in plain words, at any width and in any encoding."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from example_results import LAYERS, check_result, estimate, layer, problem, trace_result
from PIL import Image
from shown import assert_tidy, drawn_texts, encoded, on_one_line, printed

import hesscli
from hesscli.render.figures.trace import trace_figure
from hesscli.render.tables.check import check_table
from hesscli.render.tables.trace import trace_table
from hesscli.render.words import shorten, shorten_all, with_error
from hesscli.results import LayerTrace, TraceResult


def many_layers(number: int) -> list[LayerTrace]:
    """Every seventh layer is a hundred times larger than its neighbours."""
    return [
        layer(
            f"transformer.encoder.layers.{index}.self_attention.in_projection",
            (100.0 if index % 7 == 0 else 1.0) + index / 1000,
            0.25,
        )
        for index in range(number)
    ]


@pytest.mark.parametrize(
    ("value", "half_width", "expected"),
    [
        (1234, 56, "1 234 ± 56"),
        (0.0123, 0.0004, "0.0123 ± 0.0004"),
        (3.1e-06, 2e-07, "3.1e-06 ± 2e-07"),
        (-1234567, 5600, "-1 234 600 ± 5 600"),
        (1.23456e9, 5.6e6, "1.2346e+09 ± 5.6e+06"),
        (99.97, 0.31, "99.97 ± 0.31"),
        (9.996, 0.3, "10.0 ± 0.3"),
        (-12.34, 100, "-10 ± 100"),
        (-0.004, 0.05, "0.00 ± 0.05"),
        (3e-08, 2e-07, "0 ± 2e-07"),
        (4, 0.996, "4.0 ± 1.0"),
        (1234.5678, 1e-6, "1 234.57 ± 1.0e-06"),
        (1234.5678, 0, "1 234.57"),
        (0, 0, "0"),
        (5, math.inf, "5.00 ± unknown"),
        (math.nan, 1, "unknown"),
    ],
)
def test_digits_follow_the_error_bar(value: float, half_width: float, expected: str) -> None:
    assert with_error(value, half_width) == expected


def test_long_names_keep_both_ends() -> None:
    name = "transformer.encoder.layers.11.mlp.fc2"
    assert shorten(name, 37) == name
    for width in range(1, 37):
        cut = shorten(name, width)
        assert len(cut) <= max(width, 2)
        assert "…" in cut
    assert shorten(name, 24).endswith("layers.11.mlp.fc2")
    assert shorten("a\x1b[31m\nb", 20) == "a?[31m?b"


@pytest.mark.parametrize(
    "names",
    [
        [f"encoder.layer.{i}.feedforward_network.{j}.output" for i in range(9) for j in "ab"],
        [f"blocks.{i}.attention.self.query_key_value" for i in range(9)],
        [f"deep.a{i}.{'same.' * 9}end" for i in range(5)],
    ],
)
@pytest.mark.parametrize("width", [26, 32])
def test_names_that_are_cut_can_be_told_apart(names: list[str], width: int) -> None:
    """With one beside them that lies in none of their modules, so that these are not left out."""
    names = ["classifier", *names]
    for name, cut in zip(names, shorten_all(names, width), strict=True):
        assert len(cut) <= width
        pattern = ".*".join(map(re.escape, cut.split("…")))
        assert [other for other in names if re.fullmatch(pattern, other)] == [name]


def test_trace_table_says_it_all() -> None:
    text = on_one_line(printed(trace_table(trace_result()), width=160))
    for words in (
        "model.pt · 12 650 parameters",
        "loss 0.2314 (cross_entropy) · accuracy 92.1% · ‖gradient‖ 0.0123",
        "4 096 of 60 000 examples · float32 on cpu",
        "trace of the Hessian 1 234 ± 56 (95%) between 1 178 and 1 290",
        "features.conv1 160 480 22 39%",
        "classifier 7 850 142.4 9.3 12%",
        "converged: the interval is within the tolerance",
        "64 products · the work of 193 full gradients · 12 s · 512 MiB peak memory",
        "64 rademacher probes",
    ):
        assert words in text
    names = [text.index(name) for name in ("features.conv1", "features.conv2", "classifier")]
    assert names == sorted(names)


def test_the_model_is_described_only_as_it_is() -> None:
    odd = problem(
        checkpoint=None, num_unreached=12, num_frozen=3, accuracy=None, training_mode=True
    )
    text = on_one_line(printed(trace_table(trace_result(problem=odd))))
    assert "model in memory · 12 650 parameters (12 unreached by the loss, 3 frozen)" in text
    assert "training mode" in text
    assert "accuracy" not in text


IN_HASTE = replace(trace_result().method, batches_joined=1)


# The interval holds data noise only for the examples that were left out, σ·√(1 − n/N).
@pytest.mark.parametrize(
    ("result", "largest"),
    [
        (trace_result(), "probe noise ± 25 largest; --rtol 2.3% (four times the work)"),
        (
            trace_result(status="budget"),
            "probe noise ± 25 largest; --probes 256 and a --budget that is 38s larger (four times",
        ),
        (
            trace_result(status="interrupted"),
            "probe noise ± 25 largest; --probes 256 (four times the work) halves it",
        ),
        (
            trace_result(status="budget", method=IN_HASTE),
            "probe noise ± 25 largest; --resume and a --budget that is 25s larger (four times",
        ),
        (
            trace_result(status="interrupted", method=IN_HASTE, files={}),
            "probe noise ± 25 largest; a --budget that is 38s larger (four times the work) halves",
        ),
        (trace_result(method=IN_HASTE), "probe noise ± 25 largest; --rtol 2.3%"),
        (
            trace_result(trace=estimate(data_stderr=50.0)),
            "data noise ± 48 largest; --examples 16384 (four times as many) halves it",
        ),
        (
            trace_result(
                trace=estimate(data_stderr=50.0), problem=problem(num_examples_available=5000)
            ),
            "probe noise ± 25 largest; --rtol 2.3%",
        ),
        (
            trace_result(
                trace=estimate(data_stderr=90.0), problem=problem(num_examples_available=5000)
            ),
            "data noise ± 38 largest; --examples all removes it",
        ),
        (trace_result(trace=estimate(label_stderr=40.0)), "label noise ± 40 largest; more"),
        (
            trace_result(trace=estimate(probe_stderr=0.001, data_stderr=None)),
            "rounding ± 0.012 largest; --dtype float64",
        ),
        (
            trace_result(trace=estimate(estimate=3.0, interval=(-53.0, 59.0))),
            "probe noise ± 25 largest; --atol 28",
        ),
    ],
)
def test_the_largest_noise_and_its_remedy(result: TraceResult, largest: str) -> None:
    text = on_one_line(printed(trace_table(result), width=200))
    budget = text[text.index("error budget") :]
    assert largest in budget
    assert budget.count("largest;") == 1


def test_rounding_is_called_a_bound() -> None:
    """It widens the interval by itself; the other sources do so by their variance."""
    alone = estimate(probe_stderr=0.0, data_stderr=None, rounding_error=0.012)
    text = on_one_line(printed(trace_table(trace_result(trace=alone)), width=200))
    assert "error budget (a bound) rounding ± 0.012" in text
    text = on_one_line(printed(trace_table(trace_result()), width=200))
    assert "(one standard error each; rounding is a bound)" in text


def test_unknown_number_of_examples_is_said() -> None:
    result = trace_result(problem=problem(num_examples_available=None))
    text = on_one_line(printed(trace_table(result), width=200))
    assert "4 096 examples of an unknown number" in text
    assert "data noise of ± 12 is left out" in text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("exact", "exact: no probe noise, and every example was used"),
        (
            "budget",
            "budget: the tolerance was not reached within the limits; probe noise is largest",
        ),
        ("data-limited", "data-limited: data noise alone exceeds the tolerance; --examples"),
        ("interrupted", "interrupted: stopped early"),
    ],
)
def test_status_in_words(status: str, words: str) -> None:
    assert words in on_one_line(printed(trace_table(trace_result(status=status)), width=200))


@pytest.mark.parametrize(
    ("rtol", "atol", "named"),
    [
        (0.05, None, "the tolerance of 5%"),
        (None, 0.25, "the tolerance of ± 0.25"),
        (0.01, 3.0, "the tolerance of 1% or ± 3"),
        (None, None, "the tolerance"),
    ],
)
def test_the_tolerance_is_named(rtol: float | None, atol: float | None, named: str) -> None:
    method = replace(trace_result().method, rtol=rtol, atol=atol)
    for status, words in (("converged", f"within {named}"), ("budget", f"{named} was not reached")):
        text = printed(trace_table(trace_result(method=method, status=status)), width=200)
        assert re.search(rf"{re.escape(words)}($|;)| {re.escape(words)} ", text, re.MULTILINE), text


def test_many_layers_are_cut_to_the_largest() -> None:
    result = trace_result(many_layers(100))
    large = {f"layers.{index}." for index in range(0, 100, 7)}
    short = printed(trace_table(result), width=120)
    assert short.count("in_projection") == 30
    assert all(name in short for name in large)
    assert "70 smaller layers not listed: see the JSON" in short
    full = printed(trace_table(result, full=True), width=120)
    assert full.count("in_projection") == 100
    assert "not listed" not in full
    assert printed(trace_table(trace_result(many_layers(40))), width=120).count("in_proj") == 40


def test_selected_layers_leave_the_totals() -> None:
    text = printed(trace_table(trace_result().only(("features.conv2",))))
    assert "features.conv2" in text
    assert "classifier" not in text
    assert "1 234 ± 56" in text
    assert "1 of 3 layers selected" in text


def test_layers_of_unknown_sign_are_dimmed() -> None:
    unsure = layer("unsure", 1.0, 3.0)
    result = trace_result([*LAYERS, unsure, layer("zero", 0.0, 0.0)])
    text = printed(trace_table(result), terminal=True)
    dimmed = [line for line in text.splitlines() if line.startswith("\x1b[2m")]
    assert any("unsure" in line for line in dimmed)
    assert not any("conv1" in line or "zero" in line for line in dimmed)
    assert "unsure: the interval includes 0" in text


def test_layers_of_unknown_sign_are_named_where_they_are_few() -> None:
    unsure = [layer(f"unsure{index}", 1.0, 3.0) for index in range(4)]
    text = printed(trace_table(trace_result([*LAYERS, *unsure[:3]])), width=100)
    assert "unsure0, unsure1, unsure2: the interval includes 0" in text
    text = printed(trace_table(trace_result([*LAYERS, *unsure])), width=100)
    assert "4 layers: the interval includes 0" in text


ODD_RESULTS = {
    "usual": trace_result(),
    "many": trace_result(many_layers(70)),
    "one": trace_result(LAYERS[:1]),
    "none": trace_result([]),
    "negative": trace_result([layer("a", -900.0, 300.0), layer("b", 1.5, 0.2)]),
    "zero": trace_result(
        [layer("a", 0.0, 0.0), layer("b", 0.0, 0.0)],
        trace=estimate(estimate=0.0, interval=(0.0, 0.0), probe_stderr=0.0, rounding_error=0.0),
        status="exact",
    ),
    "unbounded": trace_result(
        [replace(LAYERS[0], interval=(-math.inf, math.inf)), LAYERS[1]],
        trace=estimate(interval=(-math.inf, math.inf), probe_stderr=math.inf),
        status="interrupted",
    ),
    "tiny": trace_result([layer("a", 5e-7, 1e-7), layer("b", 3e-12, 1e-13)]),
    "wide": trace_result([layer(f"a{10**p}", (-1) ** p * 10.0**p, 10.0**p) for p in range(-9, 9)]),
    "odd names": trace_result([layer("[bold]$x_1$[/red]", 3.0, 1.0), layer("", 2.0, 1.0)]),
    "empty layer": trace_result([layer("empty", 0.0, 0.0, num_parameters=0), *LAYERS]),
}


@pytest.mark.parametrize("name", ODD_RESULTS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_tables_fit_any_stream(name: str, encoding: str, width: int) -> None:
    result = ODD_RESULTS[name]
    text = printed(trace_table(result, full=True), width, encoding)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    if width >= 80:
        for shown in result.layers:
            assert shown.name[-6:] in text


@pytest.mark.parametrize("width", [40, 60, 100])
def test_names_are_told_apart_before_columns_are_kept(width: int) -> None:
    """What a row is about says more than any of its numbers."""
    lines = printed(trace_table(trace_result(many_layers(20))), width).splitlines()
    start = next(row for row, line in enumerate(lines) if line.startswith("layer "))
    rows = [line.split() for line in lines[start + 2 : start + 22]]
    assert len({row[0] for row in rows}) == 20
    assert "100.00" in rows[0]
    assert "trace" in lines[start]


def test_ascii_stays_aligned_and_readable() -> None:
    plain = printed(trace_table(trace_result()), encoding="ascii").splitlines()
    fancy = printed(trace_table(trace_result())).splitlines()
    assert [len(line) for line in plain] == [len(line) for line in fancy]
    assert "trace of the Hessian  1 234 +-56 (95%)" in plain


def test_check_table() -> None:
    text = on_one_line(printed(check_table(check_result()), width=100))
    for words in (
        "pass finite",
        "skip gradient float32 has too few",
        "pass symmetry 3.0e-12 bound 1.0e-09",
        "autodiff mode double-backward · attention kernel math",
        "ruled out by encoder.pool (MaxPool3d)",
        "one full gradient 0.42 s",
        "one full product 1.0 s, 180 MiB",
        "kept examples 12 MiB",
        "trace 64 193 1 min 6 s 700 MiB",
        "trace: for a tolerance of 5%",
    ):
        assert words in text
    assert max(map(len, printed(check_table(check_result()), 80, "ascii").splitlines())) <= 80


def test_figure_shows_every_layer_in_model_order() -> None:
    figure = trace_figure(trace_result())
    bars, dots = figure.axes
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == [shown.name for shown in LAYERS]
    assert bars.yaxis_inverted()
    assert [patch.get_width() for patch in bars.patches] == [480.25, 611.5, 142.4]
    assert {"480 ± 22", "612 ± 31", "142.4 ± 9.3"} <= set(drawn_texts(figure))
    points = [line.get_xdata()[0] for line in dots.lines if line.get_marker() == "o"]
    assert points == [480.25 / 160, 611.5 / 4640, 142.4 / 7850]
    assert dots.get_xscale() == "log"  # 3.0 is more than 30 times 0.018
    title, subtitle = (text.get_text() for text in figure.texts[:2])
    assert title == "Trace of the Hessian: 1 234 ± 56   (95% interval 1 178 to 1 290)"
    assert "model.pt" in subtitle
    assert "4 096 of 60 000 examples" in subtitle
    assert "64 probes" in subtitle
    assert "converged" in subtitle


def test_figure_sums_what_it_leaves_out() -> None:
    layers = many_layers(200)
    figure = trace_figure(trace_result(layers))
    assert len(figure.axes[0].patches) == 60
    kept = sorted((shown.estimate for shown in layers), reverse=True)[:60]
    assert sorted((patch.get_width() for patch in figure.axes[0].patches), reverse=True) == kept
    rest = sum(shown.estimate for shown in layers) - sum(kept)
    assert f"And 140 smaller layers: sum {rest:.0f}." in figure.texts[2].get_text()
    assert figure.get_figheight() < 18


@pytest.mark.parametrize("name", ODD_RESULTS)
def test_nothing_in_the_figure_overlaps_or_is_cut_off(name: str) -> None:
    figure = trace_figure(ODD_RESULTS[name])
    assert_tidy(figure)
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert sum(low <= tick <= high for tick in axes.get_xticks()) > 1
    bars, dots = (axes.get_window_extent() for axes in figure.axes)
    for number in figure.axes[0].texts:
        assert bars.x1 < number.get_window_extent().x0
        assert number.get_window_extent().x1 < dots.x0


def test_encoded_twice_the_bytes_are_the_same() -> None:
    first, second = (encoded(trace_figure(trace_result())) for _ in range(2))
    assert set(first) == {"png", "svg"}
    assert first == second
    with Image.open(io.BytesIO(first["png"])) as image:
        assert image.size[0] == 11 * 160
        assert "Software" not in image.info
    root = ElementTree.fromstring(first["svg"])
    assert root.tag.endswith("svg")
    assert b"<dc:date>" not in first["svg"]


def test_the_users_style_changes_nothing_and_is_left_alone() -> None:
    usual = encoded(trace_figure(trace_result()))["svg"]
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        odd = encoded(trace_figure(trace_result()))["svg"]
        assert dict(matplotlib.rcParams) == before
    assert odd == usual


def test_what_is_not_code_is_packaged_too() -> None:
    """A wheel holds modules by themselves, and other files only where they are named."""
    package = Path(hesscli.__file__).parent
    project = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["hesscli"]
    named = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} == named
    assert any(path.suffix == ".mplstyle" for path in named)


def test_no_pyplot_no_torch() -> None:
    program = (
        "import sys, hesscli.render.figures.trace, hesscli.render.document;"
        "import hesscli.render.tables.trace, hesscli.render.tables.check;"
        "print(*{'matplotlib.pyplot', 'torch'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize(("half_width", "said"), [(0.4, True), (300.0, False), (0.0, False)])
def test_lines_behind_their_dots_are_said_to_be_there(half_width: float, said: bool) -> None:
    """A line is at most 2.1 inches long for what the axis spans, and a dot 5.5 points wide."""
    layers = [layer("a", 900.0, half_width), layer("b", 450.0, half_width)]
    texts = drawn_texts(trace_figure(trace_result(layers)))
    assert any("lie behind" in on_one_line(text) for text in texts) == said
