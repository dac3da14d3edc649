"""What people get to see of a result, for tests of it."""

from __future__ import annotations

import io
from itertools import combinations, pairwise
from typing import Literal

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console, RenderableType

from hesscli.render.figures.canvas import encoders


def printed(
    content: RenderableType, width: int = 80, encoding: str = "utf-8", terminal: bool = False
) -> str:
    """What a stream of that encoding receives; a glyph that it cannot carry raises."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    colours: Literal["256"] | None = "256" if terminal else None
    Console(file=stream, width=width, force_terminal=terminal, color_system=colours).print(content)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def encoded(figure: Figure) -> dict[str, bytes]:
    """The contents of a figure's files, by kind."""
    contents = {}
    for kind, encode in encoders(figure).items():
        stream = io.BytesIO()
        encode(stream)
        contents[kind] = stream.getvalue()
    return contents


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def drawn_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def assert_tidy(figure: Figure) -> None:
    """Nothing is cut off at the page's edge, and no two labels or texts of axes overlap."""
    figure.draw_without_rendering()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= drawn.x0 <= drawn.x1 <= width
    assert 0 <= drawn.y0 <= drawn.y1 <= height
    for axes in figure.axes:
        assert_labels_apart(axes)
        assert_texts_apart(axes)
        assert_scale_is_named(axes)


def assert_scale_is_named(axes: Axes) -> None:
    """A label says how far an axis is logarithmic: one through zero is linear about it."""
    label, scale = axes.get_xlabel(), axes.get_xscale()
    assert ("log scale" in label) == (bool(label) and scale != "linear")
    assert ("beyond" in label) == (bool(label) and scale == "symlog")
    if "beyond" in label:
        threshold = axes.xaxis.get_transform().linthresh
        said = label.partition("± ")[2].partition(":")[0]
        assert float(said) == pytest.approx(threshold, rel=0.05)


def assert_texts_apart(axes: Axes) -> None:
    written = [text for text in axes.texts if text.get_visible() and text.get_text().strip()]
    places = [(text.get_text(), text.get_window_extent()) for text in written]
    for (one, here), (other, there) in combinations(places, 2):
        wide = min(here.x1, there.x1) - max(here.x0, there.x0)
        high = min(here.y1, there.y1) - max(here.y0, there.y0)
        assert min(wide, high) < 1, (one, other)  # a pixel of the room around the letters


def assert_labels_apart(axes: Axes) -> None:
    low, high = axes.get_xlim()
    labels = axes.get_xticklabels() or []  # none where the panel below has them
    ticks = sorted(
        (tick, label.get_window_extent())
        for tick, label in zip(axes.get_xticks(), labels, strict=bool(labels))
        if low <= tick <= high
    )
    for (_, left), (_, right) in pairwise(ticks):
        assert left.x1 < right.x0
    names = [label for label in axes.get_yticklabels() if label.get_visible()]
    heights = sorted((name.get_window_extent() for name in names), key=lambda extent: extent.y0)
    for below, above in pairwise(heights):
        assert below.y1 <= above.y0
