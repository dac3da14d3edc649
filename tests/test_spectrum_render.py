"""Spectra as people see them: the table, four pictures, the document."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from example_results import ENVIRONMENT, problem, trace_result
from jsonschema import Draft202012Validator
from matplotlib.figure import Figure
from shown import assert_tidy, drawn_texts, on_one_line, printed

from hesscli.render.document import schema, to_json
from hesscli.render.figures.spectrum import (
    convergence_figure,
    density_figure,
    participation_figure,
    staircase_figure,
)
from hesscli.render.tables.spectrum import spectrum_table
from hesscli.results import (
    Condition,
    ConvergencePoint,
    DenseSpectrum,
    Eigenvalue,
    LayerSpectrum,
    MethodReport,
    Outliers,
    ParameterReport,
    SpectralDensity,
    SpectralFunction,
    SpectralFunctions,
    SpectrumResult,
)

FIGURES = (density_figure, staircase_figure, participation_figure, convergence_figure)
TOP, BOTTOM = (83.609, 39.858, 29.15, 20.15), (-0.12, -0.2185)
CONTRACT = {"eigenvalues", "density", "negative_mass", "status", "problem", "method", "cost"}


def eigenvalue(value: float, end: Any = "top", **changes: Any) -> Eigenvalue:
    usual: dict[str, Any] = {
        "residual": 1.3e-4,
        "settled": True,
        "copies": 1,
        "vector_error": 1e-5,
    }
    return Eigenvalue(value=value, end=end, **(usual | changes))


def density(top: tuple[float, ...] = TOP, size: int = 12650) -> SpectralDensity:
    """A bulk about zero, and the eigenvalues above it one by one."""
    bulk = np.array([-0.2, -0.01, 1e-4, 0.003, 0.02, 0.4])
    shares = np.array([0.01, 0.1, 0.5, 0.2, 0.15, 0.04]) * (1 - len(top) / size)
    grid = np.linspace(-1, 100, 50)
    return SpectralDensity(
        grid=tuple(grid.tolist()),
        values=tuple((np.ones(50) / 101).tolist()),
        bandwidth=0.3,
        scale=5e-4,
        nodes=(*bulk.tolist(), *reversed(top)),
        weights=(*shares.tolist(), *[1 / size] * len(top)),
        isolated=(*[False] * 6, *[True] * len(top)),
    )


def function(value: float | None, stderr: float | None = 1.0, change: float | None = 0.0) -> Any:
    interval = None
    if value is not None and stderr is not None:
        interval = (value - 2.776 * stderr, value + 2.776 * stderr)  # Student's, of 5 starts
    return SpectralFunction(value=value, stderr=stderr, depth_change=change, interval=interval)


FUNCTIONS = SpectralFunctions(
    trace=function(279.65, 1.17),
    squared_norm=function(10565.0, 0.33),
    negative_mass=function(0.0628, None, 0.0069),
    stable_rank=function(1.5114, 4.7e-5),
    effective_rank=function(54.5, 7.0),
)


def layer(name: str, explored: bool = False, shares: int = 6) -> LayerSpectrum:
    return LayerSpectrum(
        name=name,
        num_parameters=1000,
        parameters=(ParameterReport(name=f"{name}.weight", shape=(100, 10)),),
        participation=tuple(0.1 * (i % 4) for i in range(shares)),
        status="converged" if explored else None,
        eigenvalues=(eigenvalue(9.5), eigenvalue(-0.1, "bottom")) if explored else None,
        density=density((9.5,), 1000) if explored else None,
        functions=FUNCTIONS if explored else None,
        exact=None,
    )


def spectrum_result(**changes: Any) -> SpectrumResult:
    like = trace_result()
    listed = (*map(eigenvalue, TOP), *(eigenvalue(value, "bottom") for value in BOTTOM))
    usual: dict[str, Any] = {
        "status": "converged",
        "problem": problem(),
        "method": MethodReport(
            name="lanczos",
            seed=0,
            probe_distribution="gaussian",
            probe_design="shared",
            num_probes=5,
            looks=1,
            mode="double-backward",
            attention_kernel="math",
            note="64 steps, then 4 × 16 without what it had counted",
        ),
        "cost": like.cost,
        "steps": 64,
        "eigenvalues": listed,
        "density": density(),
        "negative_mass": 0.0628,
        "functions": FUNCTIONS,
        "outliers": Outliers(count=1, ratio=2.098, classes=10, class_ratio=1.303),
        "condition": None,
        "convergence": tuple(
            ConvergencePoint(steps=s, values=TOP[:s], residuals=(10.0**-s,) * min(s, 4))
            for s in range(1, 20)
        ),
        "exact": None,
        "layers": (layer("features.conv1"), layer("features.conv2"), layer("classifier")),
        "environment": ENVIRONMENT,
        "hesscli_version": "0.1.0",
        "files": {"json": "hesscli-out/fashion-model/spectrum.json"},
    }
    return SpectrumResult(**(usual | changes))


UNSETTLED = replace(
    eigenvalue(0.05, "bottom"), residual=0.3, settled=False, copies=1, vector_error=None
)
HARD = {
    "explored": spectrum_result(layers=(layer("one", True), layer("a" * 90, True))),
    "exact": spectrum_result(
        exact=DenseSpectrum(eigenvalues=tuple(np.linspace(-0.3, 80, 300)), distance=0.004)
    ),
    "one eigenvalue": spectrum_result(
        eigenvalues=(eigenvalue(2.0),),
        layers=(layer("only", shares=1),),
        density=density((2.0,)),
        convergence=(ConvergencePoint(steps=1, values=(2.0,), residuals=(0.0,)),),
        outliers=Outliers(count=0, ratio=None, classes=2, class_ratio=None),
    ),
    "steps side by side": spectrum_result(
        density=density(tuple(100 / i for i in range(1, 31)), 12650),
        outliers=Outliers(count=10, ratio=2.1, classes=12, class_ratio=1.1),
    ),
    "steps at the end": spectrum_result(
        density=density(tuple(100 / i for i in range(1, 31)), 12650),
        outliers=Outliers(count=29, ratio=2.1, classes=31, class_ratio=1.1),
    ),
    "nothing settled": spectrum_result(
        eigenvalues=(replace(UNSETTLED, end="top"), UNSETTLED),
        layers=(layer("only", shares=2),),
        density=density(()),
        outliers=Outliers(count=0, ratio=None, classes=None, class_ratio=None),
        status="interrupted",
    ),
    "zero": spectrum_result(
        eigenvalues=(eigenvalue(0.0, residual=0.0),),
        layers=(layer("only", shares=1),),
        density=SpectralDensity(
            grid=(-1.0, 0.0, 1.0),
            values=(0.0, 1.0, 0.0),
            bandwidth=0.1,
            scale=1.0,
            nodes=(0.0,),
            weights=(1.0,),
            isolated=(True,),
        ),
        convergence=(ConvergencePoint(steps=1, values=(0.0,), residuals=(0.0,)),),
        functions=SpectralFunctions(
            **dict.fromkeys(FUNCTIONS.__dataclass_fields__, function(None, None, None))
        ),
        negative_mass=None,
        outliers=Outliers(count=0, ratio=None, classes=None, class_ratio=None),
    ),
    "many": spectrum_result(
        layers=tuple(layer(f"encoder.blocks.{i}.attention.projection") for i in range(80))
    ),
    "copies": spectrum_result(eigenvalues=(eigenvalue(3.0, copies=2), eigenvalue(1.0))),
    "condition": spectrum_result(
        condition=Condition(damping=0.01, relative_damping=1e-3, interval=(400.0, math.inf))
    ),
}


@pytest.mark.parametrize("result", HARD.values(), ids=HARD.keys())
@pytest.mark.parametrize("draw", FIGURES)
def test_pictures_are_tidy(draw: Any, result: SpectrumResult) -> None:
    figure: Figure = draw(result)
    assert_tidy(figure)


@pytest.mark.parametrize("result", HARD.values(), ids=HARD.keys())
@pytest.mark.parametrize("width", [40, 80, 160])
def test_tables_fit(result: SpectrumResult, width: int) -> None:
    text = printed(spectrum_table(result, full=True), width=width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert printed(spectrum_table(result), encoding="ascii").isascii()


@pytest.mark.parametrize("result", HARD.values(), ids=HARD.keys())
def test_documents_keep_the_schema(result: SpectrumResult) -> None:
    document = json.loads(to_json(result))
    assert list(Draft202012Validator(schema()).iter_errors(document)) == []
    assert set(document) >= CONTRACT
    assert {"value", "residual"} <= set(document["eigenvalues"][0])
    assert {"grid", "values", "bandwidth"} <= set(document["density"])


def test_the_table_says_it_all() -> None:
    text = on_one_line(printed(spectrum_table(spectrum_result()), width=160))
    for words in (
        "largest eigenvalue of the Hessian 83.6090 ± 0.00013",
        "1 eigenvalue stands apart: it is 2.1 times the next",
        "10 classes: eigenvalue 9 is 1.3 times the next",
        "1 83.6090 0.00013",
        "-1 -0.21850 0.00013",
        "trace 279.6 ± 3.2",
        "no error bar: the last half of the steps changed it by 0.0069",
        "± 95%, between 5 start vectors",
        "converged: the bar of each largest eigenvalue is within the tolerance",
        "lanczos · 5 start vectors",
    ):
        assert words in text, words


def test_what_is_not_known_is_said() -> None:
    text = on_one_line(printed(spectrum_table(HARD["nothing settled"]), width=160))
    assert "no eigenvalue stands apart" in text
    assert "-: the vector is not known" in text
    assert "?: others may lie between" in text


@pytest.mark.parametrize("width", [40, 60, 100])
def test_blocks_of_layers_keep_their_names(width: int) -> None:
    lines = printed(spectrum_table(HARD["explored"]), width=width).splitlines()
    start = next(row for row, line in enumerate(lines) if line.startswith("block of"))
    assert [line[0] for line in lines[start + 2 : start + 4]] == ["o", "a"]


def test_layers_are_restricted() -> None:
    text = printed(spectrum_table(spectrum_result().only(("classifier",))), width=160)
    assert "classifier" in text
    assert "features.conv1" not in text


def test_shares_of_chosen_layers_are_not_said_to_sum_to_all() -> None:
    whole, chosen = spectrum_result(), spectrum_result().only(("classifier",))
    notes = [" ".join(drawn_texts(participation_figure(result))) for result in (whole, chosen)]
    assert ["sum to 100% over all layers." in note for note in notes] == [False, True]


def test_what_pictures_say() -> None:
    density_texts = " ".join(drawn_texts(density_figure(HARD["exact"])))
    assert "Grey: the dense matrix." in density_texts
    assert "trace 279.6 ± 3.2" in density_texts
    staircase = " ".join(drawn_texts(staircase_figure(spectrum_result())))
    assert "widest step" in staircase
    parts = " ".join(drawn_texts(participation_figure(spectrum_result())))
    assert "features.conv2" in parts
    assert "30%" in parts
    assert "1 layer" in " ".join(drawn_texts(density_figure(_many_blocks())))


def _many_blocks() -> SpectrumResult:
    return spectrum_result(layers=tuple(layer(f"block{i}", True) for i in range(15)))
