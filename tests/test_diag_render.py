"""A diagonal as tables and pictures: the right numbers, at any width and any size."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from example_results import (
    DIAGONALS,
    EDGES,
    block,
    diag_result,
    diagonal,
    diagonal_report,
    estimate,
    histogram,
    trace_result,
)
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch
from shown import assert_tidy, drawn_texts, encoded, on_one_line, printed

from hesscli.render import bins
from hesscli.render.bins import axis_marks, cells_for, sparkline
from hesscli.render.figures.diag import block_figure, diag_figure
from hesscli.render.figures.heat_map import heat_map, spread
from hesscli.render.tables.diag import diag_table
from hesscli.results import Histogram, LayerDiagonal

ZERO = diagonal(
    "dead",
    0.0,
    100,
    block=block(between_variance=0.0, within_variance=0.0, noise_variance=None, explained=1.0),
)


def many_layers(number: int) -> list[LayerDiagonal]:
    return [
        diagonal(
            f"transformer.encoder.layers.{index}.self_attention.in_projection",
            10.0 ** (index % 5 - 4),
            1000 + index,
            negative=index,
        )
        for index in range(number)
    ]


ODD_RESULTS = {
    "usual": diag_result(),
    "one": diag_result(DIAGONALS[:1]),
    "scalar": diag_result([diagonal("scale", 0.5, 1, largest=())]),
    "twelve": diag_result(many_layers(12)),
    "many": diag_result(many_layers(70)),
    "negative": diag_result(
        [diagonal("a", -0.2, negative=1000), diagonal("b", -0.003, negative=1000)]
    ),
    "zero": diag_result(
        [ZERO, replace(ZERO, name="dead too")],
        trace=estimate(estimate=0.0, interval=(0.0, 0.0), probe_stderr=0.0),
        diagonal=diagonal_report([ZERO, ZERO], norm=0.0, relative_error=0.0),
    ),
    "some zero": diag_result([*DIAGONALS, ZERO]),
    "no blocks": diag_result([DIAGONALS[1]]),
    "odd names": diag_result([diagonal("[bold]$x_1$[/red]", 0.3), diagonal("", 0.2)]),
    "unknown": diag_result(
        trace=estimate(interval=(-math.inf, math.inf), probe_stderr=math.inf),
        diagonal=diagonal_report(DIAGONALS, relative_error=None, relative_error_bound=None),
        status="interrupted",
    ),
}


def test_the_table_says_it_all() -> None:
    text = on_one_line(printed(diag_table(diag_result()), width=160))
    for words in (
        "model.pt · 12 650 parameters",
        "diagonal of the Hessian norm 12.3, relative error 3.1% (below 3.6% at 95%)",
        "1.5% of 12 650 entries negative",
        "trace of the Hessian 1 234 ± 56 (95%)",
        "Gauss-Newton part 1 200, the rest 34",
        "error budget of the trace",
        "probe noise ± 25 largest; --rtol 1.8% (four times the work) halves it",
        "features.conv1 160 0.210 0.021 0.420 0%",
        "features.norm1 32 0.0135 0.0013 0.0270 3.1%",
        "classifier 7 850 0.00123 0.00012 0.00246 1.5%",
        "spectrum: from -0.032 to 1.0, log scales",
        "AdaHessian's block averages features.conv1 kernel harmful: averaging keeps 43.0%",
        "converged: the relative error is within the tolerance",
        "64 products · the work of 193 full gradients · 12 s · 512 MiB peak memory",
        "64 rademacher probes",
    ):
        assert words in text
    verdicts = text[text.index("AdaHessian") :]
    assert "norm1" not in verdicts  # it has no blocks


@pytest.mark.parametrize(
    ("status", "probes", "words"),
    [
        ("exact", 0, "exact: no probe noise, and every example was used"),
        (
            "budget",
            64,
            "budget: the tolerance was not reached within the limits; --probes 256 and a --budget "
            "that is 38s larger (four times the work) halves the probe noise; or accept 3.6%",
        ),
        ("budget", 0, "within the limits; accept 3.6%"),
        ("data-limited", 64, "data-limited: data noise alone exceeds the tolerance; --examples"),
        ("interrupted", 64, "stopped early; the relative error is that of the work done so far"),
    ],
)
def test_status_in_words(status: str, probes: int, words: str) -> None:
    method = replace(trace_result().method, num_probes=probes)
    text = on_one_line(printed(diag_table(diag_result(status=status, method=method)), width=200))
    assert words in text
    assert ("no probes" in text) == (probes == 0)
    assert ("0 rademacher" in text) is False


def test_an_exact_diagonal_has_no_relative_error() -> None:
    report = diagonal_report(DIAGONALS, relative_error=0.0, relative_error_bound=0.0)
    text = printed(diag_table(diag_result(diagonal=report)), width=120)
    assert "norm 12.3\n" in text
    assert "relative error " not in text[: text.index("layer ")]


def test_shrinkage_is_said() -> None:
    report = diagonal_report(DIAGONALS, shrinkage=(0.9, 0.37, 0.52))
    text = printed(diag_table(diag_result(diagonal=report)), width=120)
    assert "shrunk: 37% to 90% of the noisy part kept" in text


def test_layers_in_full_detail() -> None:
    brief = printed(diag_table(diag_result()), width=120)
    assert "quantiles" not in brief
    full = printed(diag_table(diag_result(), full=True), width=120)
    assert full.count("quantiles") == 3
    text = on_one_line(full)
    for words in (
        "features.conv1 · 160 parameters · trace 33.6 ± 3.4 (converged)",
        "mean 0.210 ± 0.021 · std 0.420 ± 0.041 · negative 0%",
        "5% 0.0210 ± 0.0021 · 25% 0.0840 ± 0.0082 · median 0.147 ± 0.014",
        "features.conv1.weight[3, 0, 1, 2] 1.89 ± 0.41",
        "features.conv1.bias[7] -0.84 ± 0.21",
        "between blocks 4.3e-05 (3.5e-05 to 5.1e-05) · within 5.7e-05 (5.0e-05 to 6.4e-05)",
        "noise of a block's mean 1.2e-06",
        "16 by rule kernel keep 43% (38% to 48%)",
        "negative 1.5% ± 0.20%",
        "nothing to average: one entry per block",
    ):
        assert words in text


def test_few_selected_layers_are_shown_in_detail() -> None:
    text = printed(diag_table(diag_result().only(("classifier",))), width=120)
    assert text.count("quantiles") == 1
    assert "features.conv1" not in text
    assert "norm 12.3" in text
    assert "1 of 3 layers selected, totals are of them all" in text
    layers = many_layers(20)
    shown = tuple(layer.name for layer in layers[:10])
    assert "quantiles" not in printed(diag_table(diag_result(layers).only(shown)), width=120)


def test_many_layers_are_cut_to_the_largest() -> None:
    layers = many_layers(100)
    text = printed(diag_table(diag_result(layers)), width=200)
    rows = text[: text.index("AdaHessian")]
    assert rows.count("in_projection") == 30
    assert "70 smaller layers not listed" in text
    largest = sorted(layers, key=lambda layer: -layer.estimate)[:30]
    assert all(layer.name in rows for layer in largest)
    full = printed(diag_table(diag_result(layers), full=True), width=200)
    assert full.count("quantiles") == 100


def test_narrow_terminals_get_fewer_columns() -> None:
    heads = {}
    for width in (40, 60, 80, 120):
        lines = printed(diag_table(diag_result()), width).splitlines()
        heads[width] = next(line.split() for line in lines if line.startswith("layer"))
    assert heads[40][:2] == ["layer", "mean"]
    assert set(heads[40]) < set(heads[60]) < set(heads[80]) == set(heads[120])
    assert {"entries", "±", "(95%)", "std", "<", "0", "keep"} <= set(heads[80])


@pytest.mark.parametrize("name", ODD_RESULTS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_tables_fit_any_stream(name: str, encoding: str, width: int) -> None:
    result = ODD_RESULTS[name]
    text = printed(diag_table(result, full=True), width, encoding)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    for shown in result.layers:
        assert shown.name[-4:] in text


def test_ascii_stays_aligned() -> None:
    plain = printed(diag_table(diag_result()), encoding="ascii").splitlines()
    fancy = printed(diag_table(diag_result())).splitlines()
    assert [len(line) for line in plain] == [len(line) for line in fancy]
    heights = str.maketrans("▁▂▃▄▅▆▇█", ".:-=+*%#")
    rows = [line.translate(heights) for line in fancy if "█" in line]
    assert len(rows) == 3
    assert set(rows) <= set(plain)


# -- histograms in a line ----------------------------------------------------------------------


@pytest.mark.parametrize("edges", [EDGES, EDGES[14:], EDGES[15:], EDGES[:15], EDGES[14:16]])
def test_cells_hold_every_bin_once_and_one_sign_each(edges: tuple[float, ...]) -> None:
    cells = cells_for(edges)
    assert len(cells) <= 16
    assert [bin for cell in cells for bin in cell.bins] == list(range(len(edges) - 1))
    for cell in cells:
        assert {bins.sign(edges, bin) for bin in cell.bins} == {cell.sign}
    assert len({len(cell.bins) for cell in cells if cell.sign}) <= 3  # outermost ones have less


def test_sparkline_heights_are_logarithms_of_counts() -> None:
    edges = tuple(10.0**power for power in range(-4, 5))
    counts = (0, 1, 3, 7, 15, 63, 127, 255)  # count + 1 is 2 to the power 0, 1, 2, ..., 8
    line = sparkline(Histogram(edges=edges, counts=counts), cells_for(edges))
    assert line.plain == " ▁▂▃▄▆▇█"


def test_the_axis_marks_stand_over_zero_and_the_ends() -> None:
    assert axis_marks(cells_for(EDGES)) == "-      0      +"
    assert axis_marks(cells_for(EDGES[15:])) == "             +"
    assert axis_marks(cells_for(EDGES[:15])) == "-             "
    lines = printed(diag_table(diag_result([*DIAGONALS, ZERO])), width=120).splitlines()
    (marks,) = (line for line in lines if line.startswith("layer"))
    (row,) = (line for line in lines if line.startswith("dead ") and "█" in line)
    assert marks[row.index("█")] == "0"


def test_only_empty_ends_are_cut_off() -> None:
    first, second = Histogram(edges=EDGES, counts=(0,) * 29), histogram(3, 0, 8, 0.5)
    blank, cut = bins.trimmed([first, second])
    taken = [bin for bin, count in enumerate(second.counts) if count]
    assert cut.counts == second.counts[taken[0] : taken[-1] + 1]
    assert cut.edges == blank.edges == EDGES[taken[0] : taken[-1] + 2]
    assert not any(blank.counts)
    assert bins.trimmed([first]) == [Histogram(edges=(), counts=())]


def test_quantiles_of_a_histogram() -> None:
    hundred = Histogram(edges=(-2.0, -1.0, 1.0, 2.0, 4.0), counts=(10, 20, 0, 70))
    assert bins.quantile(hundred, 0.05) == -1.5
    assert bins.quantile(hundred, 0.2) == 0.0  # in the bin around zero nothing else is known
    assert bins.quantile(hundred, 0.65) == 3.0
    assert bins.quantile(hundred, 1.0) == 4.0


# -- pictures ----------------------------------------------------------------------------------


def steps(figure: Figure, axes: int) -> list[StepPatch]:
    return [patch for patch in figure.axes[axes].patches if isinstance(patch, StepPatch)]


def test_the_spectrum_shows_every_layer_in_model_order() -> None:
    figure = diag_figure(diag_result())
    rows, whole = figure.axes
    assert [name.get_text() for name in rows.get_yticklabels()] == [d.name for d in DIAGONALS]
    assert rows.yaxis_inverted()
    assert whole.get_xlim() == rows.get_xlim()
    assert whole.get_yscale() == "log"
    assert whole.get_xscale() == "symlog"
    assert {"8 042 entries", "1.5% negative", "trace 1 234 ± 56"} <= set(drawn_texts(figure))
    assert {"0.210 ± 0.021", "0.0135 ± 0.0013", "3.1%"} <= set(drawn_texts(figure))
    title, subtitle = (text.get_text() for text in figure.texts[:2])
    assert title == "Diagonal of the Hessian: norm 12.3   (relative error 3.1%)"
    assert "model.pt" in subtitle
    assert "64 probes" in subtitle


def test_the_bars_are_the_counts() -> None:
    result = diag_result()
    drawn: dict[tuple[float, float], float] = {}
    for patch in steps(diag_figure(result), 1):
        values, edges, base = patch.get_data()
        assert base == 0.5
        drawn |= {
            (low, high): value
            for low, high, value in zip(edges[:-1], edges[1:], values, strict=True)
            if value != base
        }
    whole = result.diagonal.histogram
    expected = zip(whole.edges[:-1], whole.edges[1:], whole.counts, strict=True)
    assert drawn == {(low, high): count for low, high, count in expected if count}


def test_heights_in_a_row_are_logarithms_up_to_the_rows_own_largest() -> None:
    layers = [
        replace(DIAGONALS[0], name=name, histogram=Histogram(edges=(1.0, 2.0, 4.0, 8.0), counts=c))
        for name, c in (("a", (0, 1, 8)), ("b", (1, 2, 128)))
    ]
    drawn = [patch.get_data() for patch in steps(diag_figure(diag_result(layers)), 0)]
    for (values, _, base), counts in zip(drawn, ((0, 1, 8), (1, 2, 128)), strict=True):
        heights = (base - values) / (base - values).max()
        # From half an entry up, so that one entry is one doubling high.
        doublings = [math.log2(2 * count) if count else 0.0 for count in counts]
        assert heights == pytest.approx([d / doublings[-1] for d in doublings])


def test_quantiles_are_marked() -> None:
    figure = diag_figure(diag_result())
    lines = figure.axes[0].lines
    medians = [line.get_xdata()[0] for line in lines if line.get_marker() == "o"]
    assert medians == [layer.quantiles[2].value for layer in DIAGONALS]
    spans = [tuple(line.get_xdata()) for line in lines if len(set(line.get_ydata())) == 1]
    for layer in DIAGONALS:
        assert (layer.quantiles[0].value, layer.quantiles[-1].value) in spans


def test_positive_entries_alone_have_a_plain_logarithmic_axis() -> None:
    assert diag_figure(diag_result(DIAGONALS[:1])).axes[0].get_xscale() == "log"
    negative = diag_figure(ODD_RESULTS["negative"]).axes[0]
    low, high = negative.get_xlim()
    assert low < -1
    assert 0 < high < 0.001


def test_the_pictures_say_what_they_leave_out() -> None:
    result = diag_result([*many_layers(70), DIAGONALS[1]])
    spectra, shares = diag_figure(result), block_figure(result)
    assert len(spectra.axes[0].get_yticks()) == 60
    (note,) = (on_one_line(text) for text in drawn_texts(spectra) if text.startswith("Heights"))
    assert "11 layers of smaller trace not drawn." in note
    assert len(shares.axes[0].get_yticks()) == 60
    (note,) = (on_one_line(text) for text in drawn_texts(shares) if text.startswith("Kept:"))
    assert "1 layer without blocks not drawn." in note
    assert "10 layers of smaller trace not drawn." in note
    some_zero = drawn_texts(diag_figure(ODD_RESULTS["some zero"]))
    assert any("Grey: within ± 1.0e-06." in on_one_line(text) for text in some_zero)
    assert not any("Grey" in text for text in drawn_texts(diag_figure(diag_result())))


def test_block_shares_are_of_each_layers_own_total() -> None:
    noisy = block(between_variance=2.0, within_variance=5.0, noise_variance=3.0)
    exact = block(between_variance=3e-9, within_variance=1e-9, noise_variance=None)
    below = block(between_variance=-1e-3, within_variance=1.0, noise_variance=1.0)
    blocks = {"noisy": noisy, "exact": exact, "below": below}
    layers = [replace(DIAGONALS[0], name=name, block=b) for name, b in blocks.items()]
    figure = block_figure(diag_result([*layers, DIAGONALS[1], ZERO]))
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    widths = np.reshape([bar.get_width() for bar in bars], (-1, 3))
    assert widths == pytest.approx(
        np.array([[0.2, 0.5, 0.3], [0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 0]])
    )
    assert {"10", "4.0e-09", "2.0", "43% (38% to 48%)", "kernel"} <= set(drawn_texts(figure))
    names = [name.get_text() for name in figure.axes[0].get_yticklabels()]
    assert names == ["noisy", "exact", "below", "dead"]


@pytest.mark.parametrize("name", ODD_RESULTS)
def test_nothing_overlaps_or_is_cut_off(name: str) -> None:
    for draw in (diag_figure, block_figure):
        figure = draw(ODD_RESULTS[name])
        assert_tidy(figure)
        frame = figure.axes[0].get_window_extent()
        rows: dict[float, float] = {}
        for text in figure.axes[0].texts:
            extent = text.get_window_extent()
            assert extent.x0 > rows.get(round(extent.y0), frame.x1)
            rows[round(extent.y0)] = extent.x1
    assert diag_figure(ODD_RESULTS[name]).get_figheight() < 20


def test_names_in_pictures_differ_even_where_they_are_long() -> None:
    figure = diag_figure(diag_result(many_layers(12)))
    names = [name.get_text() for name in figure.axes[0].get_yticklabels()]
    assert names[3] == "…3.self_attention.in_projection"
    assert len(set(names)) == 12


# -- heat maps ---------------------------------------------------------------------------------


def entries(shape: Sequence[int], signed: bool = False) -> np.ndarray:
    rng = np.random.default_rng(5)
    values = 10 ** rng.normal(-3, 1, shape)
    return values * rng.choice([-1, 1], shape) if signed else values


def image(figure: Figure) -> np.ndarray:
    (drawn,) = figure.axes[0].images
    return np.asarray(drawn.get_array())


def test_a_matrix_is_drawn_as_it_is() -> None:
    weight = entries((7, 11))
    figure = heat_map("fc.weight", weight, ("all 100 examples",))
    assert (image(figure) == weight).all()
    title, subtitle = (text.get_text() for text in figure.texts[:2])
    assert title == "Diagonal entries of fc.weight"
    assert subtitle == "7 × 11  ·  all 100 examples"


@pytest.mark.parametrize(
    ("shape", "turned"),
    [
        ((4, 6, 3, 3), False),
        ((6, 4, 3, 3), True),
        ((5, 3, 4), False),
        ((4, 3, 2, 3, 3), True),
        ((8, 5, 1, 1), True),
        ((5, 8, 1, 1), False),
    ],
)
def test_kernels_stand_in_a_grid(shape: tuple[int, ...], turned: bool) -> None:
    """The first dimension runs down, or across where the page would be left half empty."""
    weight = entries(shape)
    tiles = weight.reshape(*shape[:2], -1, shape[-1])
    tiles = tiles.swapaxes(0, 1) if turned else tiles
    down, across = tiles.shape[:2]
    naive = np.block([[tiles[row, column] for column in range(across)] for row in range(down)])
    figure = heat_map("conv.weight", weight)
    names = (figure.axes[0].get_ylabel(), figure.axes[0].get_xlabel())
    assert names[:: -1 if turned else 1] == ("first dimension", "second dimension")
    assert (image(figure) == naive).all()
    # One white line between any two neighbours, and none around 1 × 1 kernels.
    gaps = sum(len(lines.get_paths()) for lines in figure.axes[0].collections)
    assert gaps == (0 if shape[2:] == (1, 1) else shape[0] + shape[1] - 2)


@pytest.mark.parametrize("outputs", [16, 17, 48])
def test_kernels_with_one_input_are_wrapped_in_reading_order(outputs: int) -> None:
    weight = entries((outputs, 1, 2, 3))
    sheet = spread(weight)
    assert 0 <= sheet.down * sheet.across - outputs < sheet.across
    assert 0.8 <= sheet.across / sheet.down <= 6
    for index in range(outputs):
        row, column = divmod(index, sheet.across)
        tile = sheet.cells[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert (tile == weight[index, 0]).all()
    assert np.isfinite(sheet.cells).sum() == weight.size


@pytest.mark.parametrize("shape", [(1100, 3), (513, 1025), (2, 512), (5000,)])
def test_large_tensors_are_averaged_in_blocks(shape: tuple[int, ...]) -> None:
    weight = entries(shape)
    matrix = np.atleast_2d(weight)
    down, across = (math.ceil(length / 512) for length in matrix.shape)
    naive = np.array(
        [
            [matrix[r : r + down, c : c + across].mean() for c in range(0, matrix.shape[1], across)]
            for r in range(0, matrix.shape[0], down)
        ]
    )
    figure = heat_map("fc.weight", weight)
    drawn = image(figure)
    assert max(drawn.shape) <= 512
    wide = drawn.T if matrix.shape[0] > 1.2 * matrix.shape[1] else drawn
    assert wide == pytest.approx(naive)  # sums in another order
    averaged = f"means of {down} × {across} entries" in figure.texts[0].get_text()
    assert averaged == (max(matrix.shape) > 512)


def test_large_kernel_grids_show_the_mean_of_each_kernel() -> None:
    weight = entries((600, 40, 3, 3))
    figure = heat_map("conv.weight", weight)
    means = weight.mean(axis=(2, 3))
    drawn = image(figure).T  # it is turned
    assert drawn == pytest.approx((means[::2] + means[1::2]) / 2)
    assert figure.texts[0].get_text().endswith("means of 2 × 1 kernels")


@pytest.mark.parametrize(
    "shape", [(16, 1, 5, 5), (48, 1, 3, 3), (32, 16, 3, 3), (128, 10), (20, 17), (300, 1)]
)
def test_a_page_is_not_left_half_empty(shape: tuple[int, ...]) -> None:
    """Of the eleven inches margins, the colours and their labels take two and a half."""
    figure = heat_map("conv.weight", entries(shape))
    frame = figure.axes[0].get_position()
    assert frame.width * 11 > 5.5
    assert figure.get_figheight() < 9


@pytest.mark.parametrize("signed", [True, False])
def test_colours_have_zero_in_the_middle_only_where_signs_differ(signed: bool) -> None:
    weight = entries((9, 9), signed)
    (drawn,) = heat_map("fc.weight", weight).axes[0].images
    assert isinstance(drawn.norm, SymLogNorm)
    assert drawn.norm(0.0) == pytest.approx(0.5 if signed else 0.0)
    assert drawn.norm(np.abs(weight).max()) == pytest.approx(1.0)
    red, _, blue, _ = drawn.to_rgba(np.array([-0.01]))[0]
    assert (red > blue) == signed


@pytest.mark.parametrize(
    "values",
    [
        entries((16, 1, 3, 3)),
        entries((64, 32, 3, 3), signed=True),
        entries((3000, 64)),
        entries((10, 512), signed=True),
        entries((2, 3)),
        entries((40,)),
        np.array(0.3),
        np.zeros((8, 8)),
        np.full((4, 4), -2e-30),
    ],
    ids=lambda values: str(values.shape),
)
def test_heat_maps_are_tidy(values: np.ndarray) -> None:
    figure = heat_map("features.0.block.conv.weight", values, ("model.pt", "all 2 000 examples"))
    assert_tidy(figure)
    frame, bar = (axes.get_window_extent() for axes in figure.axes)
    assert frame.x1 < bar.x0
    assert figure.axes[1].get_visible() == bool(values.any())


def test_encoded_twice_the_bytes_are_the_same() -> None:
    for draw in (
        lambda: diag_figure(diag_result()),
        lambda: block_figure(diag_result()),
        lambda: heat_map("w", entries((4, 3, 3, 3), signed=True)),
    ):
        assert encoded(draw()) == encoded(draw())


def test_no_pyplot_no_torch() -> None:
    program = (
        "import sys, hesscli.render.tables.diag, hesscli.render.figures.diag;"
        "import hesscli.render.figures.diag, hesscli.render.figures.heat_map;"
        "print(*{'matplotlib.pyplot', 'torch'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert run.stdout.split() == []


def test_a_table_needs_no_matplotlib() -> None:
    program = (
        "import sys, hesscli.render.tables.diag;print(*{'matplotlib', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert run.stdout.split() == []
