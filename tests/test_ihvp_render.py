"""Sensitivities as tables and pictures: the right numbers, at any width and any size."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
from example_ihvp import (
    SWEEP,
    WINDOW,
    ihvp_result,
    many_sensitivities,
    perturbation,
    ranking,
    saliency,
    sensitivities,
    sensitivity,
)
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Annotation
from shown import assert_tidy, drawn_texts, encoded, on_one_line, printed

from hesscli.render.figures import canvas
from hesscli.render.figures.ihvp import saliency_figure, sensitivity_figure
from hesscli.render.figures.ihvp_checks import calibration_figure, sweep_figure
from hesscli.render.tables.ihvp import ihvp_table
from hesscli.render.words import change_name
from hesscli.results import IhvpResult, Refinement, ResidualReport

SOLVE = ihvp_result().solve


def refined(**changes: object) -> IhvpResult:
    usual = {
        "tolerance": 1e-3,
        "iterations": 23,
        "residual": 8.7e-4,
        "converged": True,
        "negative_curvature": None,
    }
    refinement = Refinement(**(usual | changes))  # type: ignore[arg-type]
    return ihvp_result(
        status="converged" if refinement.converged else "budget",
        solve=replace(SOLVE, refinement=refinement),
        residual=ResidualReport(window=0.71, operator=refinement.residual, operator_name="hessian"),
    )


ZERO = sensitivity(
    "dead",
    100,
    1e-5,
    saliency=replace(
        saliency(1e-5, 0, 0.0),
        mean=0.0,
        stderr=0.0,
        quantiles=tuple(replace(q, value=0.0, stderr=0.0) for q in saliency(1e-5, 0, 0).quantiles),
    ),
    leverage=0.0,
    rank=2,
    above_next=None,
    half_correlation=None,
    magnitude_correlation=None,
    perturbations=(perturbation(0.0, 0.0, cubic=0.0, stderr=0.0),),
)
VECTOR = ihvp_result(
    [], solve=replace(SOLVE, vector="influence.pt", vector_norm=1.2, norm=3.4), ranking=None
)

WITH_LAYERS = {
    "usual": ihvp_result(),
    "not verified": ihvp_result(sensitivities(verify=False)),
    "one": ihvp_result(sensitivities()[:1]),
    "many": ihvp_result(many_sensitivities(40)),
    "zero": ihvp_result([replace(sensitivities()[1], above_next=0.99), ZERO]),
    "all zero": ihvp_result([replace(ZERO, rank=1), replace(ZERO, name="dead too")]),
    "odd names": ihvp_result(
        [sensitivity("[bold]$x_1$[/red]", 300, 1e-5), sensitivity("", 20, 1e-6, rank=2)]
    ),
    "negative": ihvp_result(
        [
            sensitivity(
                "steep",
                50,
                1e-5,
                perturbations=(perturbation(-0.3, 0.02), perturbation(-2e-3, 1e-5, level=8.0)),
            )
        ]
    ),
    "unknown": ihvp_result(
        [sensitivity("a", 9, 1e-5, relative_stderr=math.inf, verify=False, half_correlation=None)],
        status="interrupted",
        sweep=(),
        residual=ResidualReport(window=None, operator=None, operator_name="hessian"),
    ),
}
MORE = ihvp_result(many_sensitivities(71, verify=False))
ODD_RESULTS = WITH_LAYERS | {
    "vector": VECTOR,
    "refined": refined(),
    "stuck": refined(converged=False, residual=0.2, negative_curvature=-0.013),
    "nothing predicted": ihvp_result(
        [sensitivity("a", 9, 1e-5, perturbations=())], status="interrupted"
    ),
    "on disk": ihvp_result(window=replace(WINDOW, file="rows.bin", row_kind="microbatch:4")),
}
VERIFIED = [
    name
    for name, result in WITH_LAYERS.items()
    if any(c.measured is not None for layer in result.layers for c in layer.perturbations)
]


def table(result: IhvpResult, width: int = 160, **options: bool) -> str:
    return on_one_line(printed(ihvp_table(result, **options), width=width))


# -- the table ---------------------------------------------------------------------------------


def test_the_table_says_it_all() -> None:
    text = table(ihvp_result())
    for words in (
        "model.pt · 19 418 parameters",
        "window 512 sampled rows, damping 3.20e-07 (0.001 of its mean diagonal)",
        "gradients of sampled labels, for the Gauss-Newton matrix",
        "in diagonal blocks of at most 128 entries · float32 · 40 MiB",
        "(window + damping) y = gradient ‖y‖ 34.5, ‖gradient‖ 0.0123",
        "window + damping 2.3e-07 rounding alone",
        "Hessian + damping 0.83 large: --refine 1e-3 would solve with the Hessian itself",
        "a ranking, not a loss change",
        "1 norm1 32 7.56e-04 8.9e-05 >99% 99% data 0.93 0.74",
        "3 norm2 64 4.1e-05 3.6e-05 99% 87% data 0.61 0.74",
        "6 conv3 13 824 1.89e-07 2.2e-08 - 31% magnitude - 0.98",
        "conv3: leverage below 50%, this ranking is magnitude |w|",
        "over all weights, half-windows agree to 0.91",
        "predicted change of the loss (0.2314) where one layer is rounded or pruned",
        "!: off by more than 10% of |linear| + |quadratic|",
        "0.001 (run) 3.2e-07 62% 0.71 81% 1.00 0.83",
        "1e-06 3.2e-10 67% - >99% 0.95 13",
        "converged: each prediction is within the tolerance",
        "64 products · the work of 193 full gradients · 12 s · 512 MiB peak memory",
        "mfac · double-backward mode · seed 0",
    ):
        assert words in text


def test_layers_are_listed_by_rank() -> None:
    text = printed(ihvp_table(ihvp_result()), width=120)
    names = [line.split()[1] for line in text.splitlines() if line[:1].isdigit() and line[1] == " "]
    assert names == 2 * ["norm1", "conv1", "norm2", "conv2", "head", "conv3"]


def test_predicted_changes_stand_beside_measured_ones() -> None:
    near = perturbation(1e-4, 0.02, cubic=-1e-4)
    far = perturbation(0.0, 0.3, cubic=-0.11, kind="prune", level=0.5, granularity="weight")
    coarse = perturbation(0.0, 0.7, cubic=0.0, granularity="tensor")
    layer = sensitivity("conv1", 400, 1e-5, perturbations=(coarse, near, far))
    text = printed(ihvp_table(ihvp_result([layer])), width=80)
    (row,) = (line for line in text.splitlines() if "0.020" in line)
    # Rounding with one grid a channel, then pruning, which is off by more than 10% of 0.3.
    assert row.split() == ["1", "conv1", "0.020", "0.020", "0.30", "0.19!"]


def test_unmeasured_changes_have_no_column_for_it() -> None:
    for full in (False, True):
        text = table(WITH_LAYERS["not verified"], full=full)
        assert "measured" not in text
        assert "!:" not in text
    assert "holds" not in text


def test_a_small_or_unknown_residual_calls_for_nothing() -> None:
    small = ResidualReport(window=1e-8, operator=0.04, operator_name="hessian")
    assert "--refine" not in table(ihvp_result(residual=small))
    unknown = ResidualReport(window=None, operator=None, operator_name="hessian")
    text = table(ihvp_result(residual=unknown))
    assert "--refine" not in text
    assert "Hessian + damping unknown" in text


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (refined(), "refined to 0.0010 in 23 iterations of conjugate gradients"),
        (
            refined(converged=False, residual=0.2),
            "budget: the tolerance was not reached within the limits; a --budget that is 38s "
            "larger (four times as long); or accept --refine 2.0e-01",
        ),
        (
            refined(converged=False, residual=0.2, negative_curvature=-0.013),
            "ended after 23 iterations · the matrix + damping curves downwards there (-0.013)",
        ),
        (
            refined(converged=False, residual=0.2, negative_curvature=-0.013),
            "with a larger --damping, or --matrix ggn, the solve can go on",
        ),
        (
            ihvp_result(status="budget"),
            "a --budget that is 38s larger (four times as long); or accept --rtol 4.0%",
        ),
        (
            ihvp_result(status="interrupted"),
            "stopped early; each prediction is that of the work done",
        ),
        (VECTOR, "converged: solved with the window"),
        (replace(refined(), layers=()), "converged: the residual is within the tolerance"),
    ],
)
def test_how_it_ended_in_words(result: IhvpResult, words: str) -> None:
    assert words in table(result, 200)


def test_with_a_vector_there_is_the_solve_alone() -> None:
    text = table(VECTOR)
    assert "(window + damping) y = influence.pt ‖y‖ 3.40, ‖influence.pt‖ 1.20" in text
    assert "what other dampings make of it" in text
    for words in ("saliency:", "predicted change", "leverage: median share", "selected"):
        assert words not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row_kind": "example"}, "gradients of single examples, for the empirical Fisher matrix"),
        ({"row_kind": "microbatch:4"}, "mean gradients of a few examples"),
        ({"largest_block": 19418}, "in one block"),
        ({"file": "rows.bin"}, "40 MiB on disk"),
    ],
)
def test_the_window_is_described(changes: dict[str, object], words: str) -> None:
    assert words in table(ihvp_result(window=replace(WINDOW, **changes)))  # type: ignore[arg-type]


def test_layers_in_full_detail() -> None:
    assert "quadratic" not in table(ihvp_result()).replace("|linear| + |quadratic|", "")
    text = table(ihvp_result(), full=True)
    assert text.count("change linear quadratic sum ± (95%) HAWQ measured holds order") == 6
    for words in (
        "conv3 · 13 824 weights · rank 6 · leverage 31%: this ranking is magnitude",
        "mean saliency 5.49e-05 ± 6.5e-06 · half-windows agree to 0.93",
        "rank correlation with |w| 0.98",
        "median 6.10e-06 ± 7.2e-07",
    ):
        assert words in text
    (layer,) = (layer for layer in ihvp_result().layers if layer.name == "conv2")
    for change in layer.perturbations:
        assert f"{change_name(change)} " in text
    assert "prune 50% 6.2e-06 0.056 0.056 0.0022 0.049 0.046 no 3.0" in text


def test_selected_layers_keep_their_rank() -> None:
    text = printed(ihvp_table(ihvp_result().only(("head",))), width=120)
    assert any(line.startswith("5  head") for line in text.splitlines())
    assert "conv1" not in text
    assert "1 of 6 layers selected" in text


def test_many_layers_are_cut_to_the_highest() -> None:
    result = MORE
    short = printed(ihvp_table(result), width=120)
    assert short.count("in_projection") == 60  # saliencies and changes
    assert "41 lower layers not listed: see the JSON" in short
    assert "layers: leverage below 50%, this ranking is magnitude" in short
    full = printed(ihvp_table(result, full=True), width=120)
    assert full.count("in_projection") == 3 * 71
    assert "not listed" not in full


@pytest.mark.parametrize("width", [60, 80, 120])
def test_long_names_differ_before_columns_are_kept(width: int) -> None:
    text = printed(ihvp_table(WITH_LAYERS["many"]), width=width)
    rows = [line.split() for line in text.splitlines() if "projection" in line]
    for part in (rows[:40], rows[40:]):
        assert [row[0] for row in part] == [str(rank) for rank in range(1, 41)]
        assert len({row[1] for row in part}) == 40


ENCODINGS, WIDTHS = ("utf-8", "ascii", "cp1252"), (40, 80, 120)
STREAMS = [
    (name, ENCODINGS[(number + step) % 3], width)
    for number, name in enumerate(ODD_RESULTS)
    for step, width in enumerate(WIDTHS)
]
"""Each result at all widths and in all encodings, and each width in all of them."""


@pytest.mark.parametrize(("name", "encoding", "width"), STREAMS)
def test_tables_fit_any_stream(name: str, encoding: str, width: int) -> None:
    result = ODD_RESULTS[name]
    text = printed(ihvp_table(result, full=True), width, encoding)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    for shown in result.layers:
        assert shown.name[-4:] in text


@pytest.mark.parametrize("name", ["usual", "vector", "refined"])
def test_nothing_but_remarks_is_broken_at_80(name: str) -> None:
    """At a terminal's usual width a table's row is a line, and so is the window."""
    text = printed(ihvp_table(ODD_RESULTS[name]), width=80)
    assert len(printed(ihvp_table(ODD_RESULTS[name]), width=300).splitlines()) > 20
    (line,) = (line for line in text.splitlines() if line.startswith("window "))
    assert line.rstrip().endswith("mean diagonal)")
    for heading in ("± (95%)", "above", "leverage", "spread", "4 bit", "measured", "residual"):
        assert name == "vector" or heading in text


# -- pictures ----------------------------------------------------------------------------------


def markers(axes: Axes, marker: str) -> list[tuple[float, str]]:
    """Where the marks of a kind are, and their colours."""
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return [(x, to_hex(line.get_color())) for line in lines for x in line.get_xdata()]


def test_saliencies_are_drawn_from_the_highest_mean_down() -> None:
    figure = saliency_figure(ihvp_result())
    (rows,) = figure.axes
    names = [name.get_text() for name in rows.get_yticklabels()]
    assert names == ["norm1", "conv1", "norm2", "conv2", "head", "conv3"]
    assert rows.yaxis_inverted()
    assert rows.get_xscale() == "log"
    assert figure.texts[0].get_text() == (
        "Saliency of weights: norm1 ranks highest   (probability >99%)"
    )
    assert "512 sampled rows" in figure.texts[1].get_text()
    assert {"4.1e-05 ± 3.6e-05", ">99%", "58%", "31%", "magnitude"} <= set(drawn_texts(figure))
    ordered = sorted(sensitivities(), key=lambda layer: layer.rank)
    assert [x for x, _ in markers(rows, "o")] == [x.saliency.quantiles[2].value for x in ordered]
    assert [x for x, _ in markers(rows, "D")] == [x.saliency.mean for x in ordered]


def test_bars_are_logarithms_of_counts_and_pale_where_damping_decides() -> None:
    figure = saliency_figure(ihvp_result())
    steps = [patch for patch in figure.axes[0].patches if isinstance(patch, StepPatch)]
    ordered = sorted(sensitivities(), key=lambda layer: layer.rank)
    for patch, layer in zip(steps, ordered, strict=True):
        tops, edges, base = patch.get_data()
        heights = dict(zip(edges[:-1], base - tops, strict=True))
        histogram = layer.saliency.histogram
        full = max(histogram.counts)
        for edge, count in zip(histogram.edges[:-1], histogram.counts, strict=True):
            # From half a weight up, so that one weight is seen.
            share = math.log(2 * count) / math.log(2 * full) if count else 0.0
            assert heights.get(edge, 0.0) / max(heights.values()) == pytest.approx(share)
        colour = canvas.PALE if layer.leverage < 0.5 else canvas.ACCENT
        assert to_hex(patch.get_facecolor()) == colour
    (note,) = (on_one_line(text) for text in drawn_texts(figure) if text.startswith("Heights"))
    assert "damping and not data decides: this ranking is magnitude |w|" in note
    confident = ihvp_result([sensitivity("a", 30, 1e-5)])
    assert not any("magnitude" in text for text in drawn_texts(saliency_figure(confident)))


def test_saliency_pictures_say_what_they_leave_out() -> None:
    (note,) = (t for t in drawn_texts(saliency_figure(MORE)) if "Heights" in t)
    assert "11 lower layers not drawn" in on_one_line(note)
    (note,) = (t for t in drawn_texts(saliency_figure(WITH_LAYERS["zero"])) if "Heights" in t)
    assert "100 weights of zero saliency not drawn" in on_one_line(note)


def test_changes_lie_at_the_sum_of_both_terms() -> None:
    result = ihvp_result()
    figure = sensitivity_figure(result)
    rounding, pruning = figure.axes
    assert [name.get_text() for name in rounding.get_yticklabels()] == [
        layer.name for layer in result.layers
    ]
    assert rounding.get_xscale() == "symlog"  # one predicted change is negative
    assert pruning.get_xscale() == "log"
    changes = [change for layer in result.layers for change in layer.perturbations]
    for axes, kind in ((rounding, "round"), (pruning, "prune")):
        drawn = [change for change in changes if change.kind == kind]
        discs = [x for x, _ in markers(axes, "o")]
        assert sorted(discs) == sorted(change.linear + change.quadratic for change in drawn)
        bars = {
            tuple(line.get_xdata())
            for line in axes.lines
            if to_hex(line.get_color()) == canvas.AMBER
        }
        assert bars == {(c.quadratic, c.linear + c.quadratic) for c in drawn}
        discs_texts = (text.get_text().split() for text in axes.texts)
        written = [word for words in discs_texts if words[0].isdecimal() for word in words]
        levels = [100 * c.level if kind == "prune" else c.level for c in drawn]
        assert sorted(map(int, written)) == sorted(map(round, levels))
        for x, colour in markers(axes, "^"):
            (found,) = {c.holds for c in drawn if c.measured == x}
            assert colour == (canvas.INK if found else canvas.NEGATIVE)
        assert len(markers(axes, "^")) == len(drawn)


def on_discs(axes: Axes) -> list[Annotation]:
    texts = (text for text in axes.texts if isinstance(text, Annotation))
    return [text for text in texts if text.get_text().split()[0].isdecimal()]


@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.01, 0.03, 0.1, 0.3])
def test_discs_that_would_touch_are_one(spread: float) -> None:
    """Numbers never lie on each other, and run as their changes do, however alike these are."""
    levels = (8.0, 6.0, 4.0, 3.0, 2.0)
    sizes = [0.01 * 10 ** (spread * step) for step in range(len(levels))]
    alike = tuple(
        perturbation(0.0, size, level=level, kind=kind, granularity=granularity)
        for size, level in zip(sizes, levels, strict=True)
        for kind, granularity in (("round", "channel"), ("round", "tensor"))
    )
    shares = zip(sizes, (0.1, 0.5, 0.9), strict=False)
    pruned = tuple(
        perturbation(0.0, size, level=level, kind="prune", granularity="weight")
        for size, level in shares
    )
    far = sensitivity("far", 100, 1e-5, rank=2, perturbations=(perturbation(0.0, 10.0),))
    layer = sensitivity("near", 100, 1e-5, perturbations=alike + pruned)
    figure = sensitivity_figure(ihvp_result([layer, far]))
    figure.draw_without_rendering()
    for axes in figure.axes:
        texts = on_discs(axes)
        for one, other in combinations((text.get_window_extent() for text in texts), 2):
            assert not one.overlaps(other)
        lanes: dict[float, list[str]] = {}
        for text in sorted(texts, key=lambda text: text.get_window_extent().x0):
            lanes.setdefault(text.xy[1], []).extend(text.get_text().split())
        for numbers in lanes.values():
            assert numbers in (["8", "6", "4", "3", "2"], ["10", "50", "90"], ["4"])


def test_grids_of_a_channel_and_of_a_tensor_are_told_apart() -> None:
    layer = sensitivity(
        "a",
        100,
        1e-5,
        perturbations=(
            perturbation(0.0, 0.01, granularity="channel"),
            perturbation(0.0, 0.03, granularity="tensor"),
        ),
    )
    rounding = sensitivity_figure(ihvp_result([layer])).axes[0]
    assert markers(rounding, "o") == [(0.01, canvas.ACCENT), (0.03, canvas.PALE)]


def test_errors_and_the_loss_are_drawn() -> None:
    unsure = perturbation(0.0, 0.1, stderr=0.02)
    layer = sensitivity("a", 100, 1e-5, perturbations=(unsure, perturbation(0.0, 0.9, level=2.0)))
    rounding = sensitivity_figure(ihvp_result([layer])).axes[0]
    spans = [line.get_xdata() for line in rounding.lines if to_hex(line.get_color()) == canvas.INK]
    assert any(
        tuple(span) == pytest.approx((0.1 - 1.96 * 0.02, 0.1 + 1.96 * 0.02)) for span in spans
    )
    assert "the loss, 0.231" in {text.get_text() for text in rounding.texts}


def test_unmeasured_changes_have_no_marks() -> None:
    figure = sensitivity_figure(WITH_LAYERS["not verified"])
    assert not any(markers(axes, "^") for axes in figure.axes)
    assert not any("measured" in text or "hold" in text for text in drawn_texts(figure))
    assert "37 of 78 hold" in sensitivity_figure(ihvp_result()).texts[0].get_text()


def test_the_layers_of_largest_changes_are_drawn_in_model_order() -> None:
    result = WITH_LAYERS["many"]
    figure = sensitivity_figure(result)
    by_size = sorted(
        result.layers, key=lambda layer: max(change.size() for change in layer.perturbations)
    )
    kept = [layer.name for layer in result.layers if layer in by_size[10:]]
    drawn = [name.get_text().lstrip("…") for name in figure.axes[0].get_yticklabels()]
    assert len(drawn) == 30
    assert all(name.endswith(end) for name, end in zip(kept, drawn, strict=True))
    (note,) = (on_one_line(text) for text in drawn_texts(figure) if text.startswith("Discs"))
    assert "10 layers of smaller changes not drawn." in note


def test_calibration_shows_every_measurement_twice() -> None:
    result = ihvp_result()
    both, misses = calibration_figure(result).axes
    changes = [change for layer in result.layers for change in layer.perturbations]
    for marker, scale in (("o", 1.0), ("^", 0.5), ("s", 0.25)):
        found = [scaled for c in changes for scaled in c.changes if scaled.scale == scale]
        points = [
            point
            for line in both.lines
            if line.get_marker() == marker
            for point in zip(line.get_xdata(), line.get_ydata(), strict=True)
        ]
        assert sorted(points) == sorted((s.predicted, s.measured) for s in found)
        assert len(markers(misses, marker)) == len(found)
    red = [x for x, colour in markers(both, "o") if colour == canvas.NEGATIVE]
    assert sorted(red) == sorted(c.changes[0].predicted for c in changes if c.holds is False)
    assert both.get_xlim() == both.get_ylim()
    lines = [line for line in both.lines if line.get_linestyle() != "None"]
    assert all((line.get_xdata() == line.get_ydata()).all() for line in lines)
    assert len(lines) == 1


def test_the_legend_counts_what_holds_at_each_scale() -> None:
    # Of |linear| + |quadratic| the error is 0.18 at full size, 0.09 at half and 0.045 at a quarter;
    # where the terms cancel, their sum is no measure of it.
    quadratic = perturbation(0.0, 1.0, cubic=0.18)
    cancelling = perturbation(-1.0, 1.01, cubic=0.15)
    layer = sensitivity("a", 100, 1e-5, perturbations=(quadratic, cancelling))
    figure = calibration_figure(ihvp_result([layer]))
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert labels == [
        "full size: 1 of 2 within 10%",
        "half: 2 of 2 within 10%",
        "a quarter: 2 of 2 within 10%",
        "full size, does not hold",
    ]
    assert figure.texts[0].get_text() == "1 of 2 predicted loss changes hold to 10%"
    assert "a, 4 bit channel: predicted 1.0, measured 1.2, off by 18%" in drawn_texts(figure)
    assert "do not hold at full size: 1" in drawn_texts(figure)


def test_misses_are_listed_from_the_largest() -> None:
    changes = tuple(perturbation(0.0, 1.0, cubic=0.11 + step / 50) for step in range(9))
    figure = calibration_figure(ihvp_result([sensitivity("a", 9, 1e-5, perturbations=changes)]))
    listed = [text for text in drawn_texts(figure) if "off by" in text]
    assert [text.rpartition(" ")[2] for text in listed] == [
        "27%", "25%", "23%", "21%", "19%", "17%",
    ]  # fmt: skip
    assert "do not hold at full size: the largest 6 of 9" in drawn_texts(figure)


def test_the_sweep_draws_what_is_known() -> None:
    figure = sweep_figure(ihvp_result())
    shares, residual = figure.axes
    drawn = {tuple(line.get_ydata()) for line in shares.lines if len(line.get_xdata()) > 2}
    ascending = SWEEP[::-1]
    assert drawn == {
        tuple(point.leverage for point in ascending),
        tuple(point.span_share for point in ascending),
        tuple(point.cosine for point in ascending if point.cosine is not None),
        tuple(point.rank_correlation for point in ascending),
    }
    (line,) = (line for line in residual.lines if len(line.get_xdata()) > 2)
    assert tuple(line.get_ydata()) == tuple(point.operator_residual for point in ascending)
    assert shares.get_xscale() == residual.get_xscale() == residual.get_yscale() == "log"
    assert "this run: 0.001" in drawn_texts(figure)
    for axes in figure.axes:
        assert any(list(line.get_xdata()) == [1e-3, 1e-3] for line in axes.lines)


ALONE = replace(
    SWEEP[0], span_share=None, cosine=None, rank_correlation=None, operator_residual=None
)
SWEEPS = {
    "usual": ihvp_result(),
    "between": ihvp_result(window=replace(WINDOW, relative_damping=3e-2)),
    "beyond": ihvp_result(window=replace(WINDOW, relative_damping=20.0)),
    "one": ihvp_result(sweep=SWEEP[:1]),
    "alone": ihvp_result(sweep=(ALONE,)),
    "alike": ihvp_result(
        sweep=tuple(
            replace(p, leverage=1.0, span_share=1.0, cosine=1.0, rank_correlation=1.0)
            for p in SWEEP
        )
    ),
    "small": ihvp_result(
        sweep=tuple(
            replace(p, leverage=0.0, span_share=0.0, cosine=-0.1, rank_correlation=-0.3)
            for p in SWEEP
        )
    ),
    "steady": ihvp_result(sweep=tuple(replace(p, operator_residual=0.999) for p in SWEEP)),
    "vector": VECTOR,
}


def assert_texts_apart(axes: Axes) -> None:
    """Of the words beside and above a panel no two overlap; those on discs are left out."""
    frame = axes.get_window_extent()
    extents = [text.get_window_extent() for text in axes.texts]
    outside = [box for box in extents if box.x0 >= frame.x1 or box.y0 >= frame.y1]
    for one, other in combinations(outside, 2):
        assert not one.overlaps(other)


def assert_headings_apart(figure: Figure) -> None:
    extents = [text.get_window_extent() for text in figure.texts if text.get_text()]
    extents += [legend.get_window_extent() for legend in figure.legends]
    extents += [axes.get_tightbbox() for axes in figure.axes]
    for one, other in combinations(extents, 2):
        assert not one.overlaps(other)


DRAWN: list[tuple[Callable[[IhvpResult], Figure], IhvpResult]] = [
    *((saliency_figure, result) for result in WITH_LAYERS.values()),
    *((sensitivity_figure, result) for result in WITH_LAYERS.values()),
    *((calibration_figure, WITH_LAYERS[name]) for name in VERIFIED),
    *((sweep_figure, result) for result in SWEEPS.values()),
]
DRAWN_NAMES = [
    *(f"saliency {name}" for name in WITH_LAYERS),
    *(f"sensitivity {name}" for name in WITH_LAYERS),
    *(f"calibration {name}" for name in VERIFIED),
    *(f"sweep {name}" for name in SWEEPS),
]


@pytest.mark.parametrize(("draw", "result"), DRAWN, ids=DRAWN_NAMES)
def test_nothing_overlaps_or_is_cut_off(
    draw: Callable[[IhvpResult], Figure], result: IhvpResult
) -> None:
    figure = draw(result)
    assert_tidy(figure)
    assert_headings_apart(figure)
    for axes in figure.axes:
        assert_texts_apart(axes)
    assert figure.get_figheight() < 20


def test_discs_of_one_layer_keep_to_its_row() -> None:
    figure = sensitivity_figure(WITH_LAYERS["many"])
    figure.draw_without_rendering()
    for axes in figure.axes:
        for line in axes.lines:
            if line.get_marker() in ("o", "^") and len(line.get_xdata()):
                assert abs(line.get_ydata()[0] - round(line.get_ydata()[0])) < 0.5
        # One lane's disc ends above the next lane's: half a disc is 5.25 points high.
        unit = axes.get_window_extent().height / abs(axes.get_ylim()[1] - axes.get_ylim()[0])
        assert 0.48 * unit * 72 / figure.dpi > 10.5


@pytest.mark.parametrize(
    "draw", [saliency_figure, sensitivity_figure, calibration_figure, sweep_figure]
)
def test_encoded_twice_the_bytes_are_the_same(draw: Callable[[IhvpResult], Figure]) -> None:
    assert encoded(draw(ihvp_result())) == encoded(draw(ihvp_result()))


def test_a_ranking_of_some_layers_keeps_its_title_honest() -> None:
    low = [layer for layer in sensitivities() if layer.rank > 3]
    figure = saliency_figure(ihvp_result(low, ranking=ranking(sensitivities())))
    assert figure.texts[0].get_text() == "Saliency of weights, by layer"


def test_no_pyplot_no_torch() -> None:
    program = (
        "import sys, hesscli.render.tables.ihvp, hesscli.render.figures.ihvp;"
        "import hesscli.render.figures.ihvp, hesscli.render.figures.ihvp_checks;"
        "import hesscli.render.figures.ihvp_checks;"
        "print(*{'matplotlib.pyplot', 'torch'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert run.stdout.split() == []


def test_a_table_needs_no_matplotlib() -> None:
    program = (
        "import sys, hesscli.render.tables.ihvp;print(*{'matplotlib', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert run.stdout.split() == []
