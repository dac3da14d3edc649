"""Documents keep the published schema and the promised keys, and hold no NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from example_ihvp import ihvp_result, perturbation, sensitivities, sensitivity
from example_results import (
    DIAGONALS,
    LAYERS,
    block,
    check_result,
    diag_result,
    diagonal_report,
    estimate,
    problem,
    trace_result,
)
from jsonschema import Draft202012Validator

from hesscli.render.document import schema, to_json
from hesscli.results import (
    CheckResult,
    DiagResult,
    IhvpResult,
    Refinement,
    TraceResult,
)


def keys(names: str) -> dict[str, Any]:
    return {name: {} for name in names.split()}


# What tests outside this repository rely on: keys may come, none may go.
TRACE_CONTRACT: dict[str, Any] = {
    **keys("schema_version command hesscli_version status files sha256 warnings"),
    "problem": {
        "checkpoint": keys("path sha256"),
        **keys("num_parameters num_unreached num_examples total_weight loss accuracy"),
        **keys("gradient_norm dtype device matrix manifest_sha256"),
    },
    "method": keys("name seed probe_design mode"),
    "cost": keys("products gradients seconds peak_bytes"),
    "trace": {
        **keys("estimate probe_stderr data_stderr label_stderr degrees_of_freedom interval"),
        **keys("population_interval confidence gauss_newton residual rounding_error"),
    },
    "layers": [
        {
            **keys("name num_parameters status estimate probe_stderr data_stderr interval"),
            "parameters": [keys("name shape")],
        }
    ],
    "environment": keys("python torch device_name threads tf32"),
}

DIAG_CONTRACT: dict[str, Any] = {
    **TRACE_CONTRACT,
    "diagonal": keys("norm relative_error relative_error_bound negative_fraction histogram"),
    "layers": [
        {
            **TRACE_CONTRACT["layers"][0],
            **keys("mean mean_stderr std std_stderr negative_fraction negative_stderr"),
            "quantiles": [keys("level value stderr")],
            "histogram": keys("edges counts"),
            "largest": [keys("parameter index estimate stderr")],
            "block": {
                **keys("rule count between_variance between_interval within_variance"),
                **keys("within_interval noise_variance explained explained_interval verdict"),
            },
        }
    ],
}

IHVP_CONTRACT: dict[str, Any] = {
    **{key: TRACE_CONTRACT[key] for key in ("problem", "cost", "environment")},
    **keys("schema_version command hesscli_version status files sha256 warnings"),
    "method": keys("name seed mode"),
    "window": keys("rows row_kind damping relative_damping blocks dtype"),
    "solve": keys("vector vector_norm norm refinement"),
    "residual": keys("window operator operator_name"),
    "ranking": keys("layers above half_correlation"),
    "sweep": [keys("relative absolute span_share cosine leverage rank_correlation")],
    "layers": [
        {
            **keys("name num_parameters leverage rank above_next half_correlation"),
            "parameters": [keys("name shape")],
            "saliency": {
                **keys("mean stderr"),
                "quantiles": [keys("level value stderr")],
                "histogram": keys("edges counts"),
            },
            "perturbations": [
                {
                    **keys("kind level granularity linear quadratic hawq measured stderr holds"),
                    "changes": [keys("scale predicted measured")],
                }
            ],
        }
    ],
}

REFINED = Refinement(
    tolerance=1e-3, iterations=23, residual=0.41, converged=False, negative_curvature=-0.02
)

INFINITE = (-math.inf, math.inf)
NOISELESS = block(noise_variance=None, noise_reduction=None, within_interval=INFINITE)


def strictly(text: str) -> Any:
    """Read JSON as the standard has it: Python's own NaN and Infinity are refused."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in a document")

    return json.loads(text, parse_constant=refuse)


def assert_has(document: Any, contract: Any) -> None:
    if isinstance(contract, list):
        assert document
        for item in document:
            assert_has(item, contract[0])
    elif contract:
        assert set(contract) <= set(document)
        for key, inner in contract.items():
            assert_has(document[key], inner)


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(schema())
    return Draft202012Validator(schema())


@pytest.mark.parametrize(
    "result",
    [
        trace_result(),
        trace_result(problem=problem(checkpoint=None, accuracy=None, num_examples_available=None)),
        trace_result(trace=estimate(data_stderr=None, gauss_newton=1200.0, residual=34.15)),
        trace_result(trace=estimate(interval=INFINITE, population_interval=(0.5, math.inf))),
        trace_result(layers=[replace(LAYERS[0], interval=INFINITE)], status="interrupted"),
        check_result(),
        diag_result(),
        diag_result(diagonal=diagonal_report(DIAGONALS, shrinkage=(0.4, 0.9, 1.0))),
        diag_result([replace(DIAGONALS[0], block=NOISELESS)]),
        ihvp_result(),
        ihvp_result(sensitivities(verify=False)),
        ihvp_result([], solve=replace(ihvp_result().solve, refinement=REFINED)),
        ihvp_result([sensitivity("a", 10, 1e-5, perturbations=(), above_next=None)], sweep=()),
    ],
)
def test_documents_keep_the_schema(
    validator: Draft202012Validator, result: TraceResult | CheckResult | DiagResult | IhvpResult
) -> None:
    assert [error.message for error in validator.iter_errors(strictly(to_json(result)))] == []


def without(document: dict[str, Any], *path: str) -> None:
    for key in path[:-1]:
        document = document[key]
    del document[path[-1]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: without(document, "status"),
        lambda document: without(document, "warnings"),
        lambda document: without(document, "schema_version"),
        lambda document: without(document, "trace", "population_interval"),
        lambda document: without(document, "problem", "checkpoint", "sha256"),
        lambda document: document.update(command="check"),
        lambda document: document.update(command="guess"),
        lambda document: document.update(schema_version=2),
        lambda document: document.update(status="fine"),
        lambda document: document["trace"].update(estimate=None),
        lambda document: document["trace"].update(estimate="1234"),
        lambda document: document["trace"].update(interval=[1.0]),
        lambda document: document["trace"].update(interval=[1.0, 2.0, 3.0]),
        lambda document: document["layers"][1].update(interval=["low", "high"]),
        lambda document: document["layers"][0]["parameters"][0].update(shape="3x3"),
        lambda document: document["problem"].update(num_examples=1.5),
    ],
)
def test_broken_documents_do_not(
    validator: Draft202012Validator, spoil: Callable[[dict[str, Any]], None]
) -> None:
    document = json.loads(to_json(trace_result()))
    spoil(document)
    assert not validator.is_valid(document)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.update(command="spectrum"),
        lambda document: without(document, "diagonal"),
        lambda document: document["layers"][0].pop("estimate"),
        lambda document: document["layers"][0].pop("block"),
        lambda document: document["layers"][0]["block"].update(explained=None),
        lambda document: document["layers"][0]["histogram"].update(counts=[0.5]),
        lambda document: document["layers"][0]["largest"][0].update(index=3),
    ],
)
def test_broken_diagonals_do_not(
    validator: Draft202012Validator, spoil: Callable[[dict[str, Any]], None]
) -> None:
    document = json.loads(to_json(diag_result()))
    spoil(document)
    assert not validator.is_valid(document)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: without(document, "ranking"),
        lambda document: without(document, "window", "damping"),
        lambda document: document["residual"].update(window="small"),
        lambda document: document["ranking"]["above"][0].append("?"),
        lambda document: document["layers"][0].pop("leverage"),
        lambda document: document["layers"][0].update(rank=1.5),
        lambda document: document["layers"][0]["perturbations"][0].pop("measured"),
        lambda document: document["layers"][0]["perturbations"][0].update(kind="drop"),
        lambda document: document["layers"][0]["perturbations"][0].update(holds="maybe"),
        lambda document: document["layers"][0]["perturbations"][0]["changes"][0].clear(),
    ],
)
def test_broken_sensitivities_do_not(
    validator: Draft202012Validator, spoil: Callable[[dict[str, Any]], None]
) -> None:
    document = json.loads(to_json(ihvp_result()))
    spoil(document)
    assert not validator.is_valid(document)


@pytest.mark.parametrize(
    "result",
    [trace_result(), check_result(), diag_result(), ihvp_result()],
    ids=lambda r: r.command,
)
def test_the_schema_describes_every_key(result: TraceResult) -> None:
    strict = schema()
    for definition in strict["$defs"].values():
        definition["additionalProperties"] = False
    assert Draft202012Validator(strict).is_valid(json.loads(to_json(result)))


def test_a_check_says_whether_it_passed() -> None:
    checks = json.loads(to_json(check_result()))["preflight"]["checks"]
    assert [check["passed"] for check in checks] == [True, False, True]


def test_new_keys_may_come(validator: Draft202012Validator) -> None:
    document = json.loads(to_json(trace_result()))
    document["trace"]["median"] = 3.0
    document["ledger"] = []
    assert validator.is_valid(document)


def test_promised_keys() -> None:
    assert_has(json.loads(to_json(trace_result())), TRACE_CONTRACT)
    assert_has(json.loads(to_json(diag_result())), DIAG_CONTRACT)
    assert_has(json.loads(to_json(ihvp_result())), IHVP_CONTRACT)


@pytest.mark.parametrize(
    ("result", "names"),
    [(diag_result(), ("entries", "stderr")), (ihvp_result(), ("saliency", "direction"))],
)
def test_arrays_are_left_to_files(result: DiagResult | IhvpResult, names: tuple[str, str]) -> None:
    weight = {"features.conv1.weight": np.ones((16, 1, 3, 3))}
    assert to_json(replace(result, **dict.fromkeys(names, weight))) == to_json(result)
    described = schema()["$defs"][type(result).__name__]
    assert not set(names) & {*described["properties"], *described["required"]}


def test_what_was_not_measured_is_null() -> None:
    unmeasured = perturbation(1e-3, 2e-3)
    layer = sensitivity("a", 10, 1e-5, perturbations=(unmeasured,))
    (written,) = strictly(to_json(ihvp_result([layer])))["layers"][0]["perturbations"]
    assert (written["measured"], written["order"], written["holds"]) == (None, None, None)
    assert written["changes"] == []
    assert written["linear"] == 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(value: float) -> None:
    trace = estimate(probe_stderr=value, interval=(value, 2.0), population_interval=(1.0, value))
    document = strictly(to_json(trace_result(trace=trace, problem=problem(loss=value))))
    assert document["problem"]["loss"] is None
    assert document["trace"]["probe_stderr"] is None
    assert document["trace"]["interval"] == [None, 2.0]
    assert document["trace"]["population_interval"] == [1.0, None]


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_numpy_numbers_are_written_as_pythons(kind: type[np.floating[Any]]) -> None:
    trace = estimate(
        estimate=kind(0.1),
        probe_stderr=kind(math.nan),
        data_stderr=kind(math.inf),
        interval=(kind(-math.inf), kind(math.inf)),
        population_interval=(kind(-1), kind(math.inf)),
    )
    counts = problem(num_examples=np.int64(2**53 + 1), training_mode=np.bool_(True), loss=kind(1))
    document = strictly(to_json(trace_result(trace=trace, problem=counts)))
    assert document["trace"]["estimate"] == float(kind(0.1))
    assert document["trace"]["probe_stderr"] is None
    assert document["trace"]["data_stderr"] is None
    assert document["trace"]["interval"] is None
    assert document["trace"]["population_interval"] == [-1.0, None]
    assert document["problem"]["num_examples"] == 2**53 + 1
    assert document["problem"]["training_mode"] is True
    assert document["problem"]["loss"] == 1.0


def test_numbers_and_names_survive() -> None:
    result = trace_result(
        layers=[replace(LAYERS[0], name="größe\n\udc80", estimate=0.1 + 0.2, probe_stderr=5e-324)]
    )
    text = to_json(result)
    text.encode("ascii")
    (written,) = json.loads(text)["layers"]
    assert written["name"] == "größe\n\udc80"
    assert written["estimate"] == 0.1 + 0.2
    assert written["probe_stderr"] == 5e-324
    assert written["parameters"] == [{"name": "features.conv1.weight", "shape": [16, 10]}]


def test_form() -> None:
    text = to_json(trace_result())
    assert text.endswith("}\n")
    assert not text.endswith("\n\n")
    assert text.splitlines()[1].startswith('  "')
    assert list(json.loads(text)) == [
        *("schema_version", "command", "hesscli_version", "status", "problem", "method", "cost"),
        *("trace", "layers", "environment", "files", "sha256", "warnings"),
    ]


def test_schema_describes_every_command() -> None:
    described = schema()
    commands = [
        described["$defs"][entry["$ref"].rpartition("/")[2]] for entry in described["oneOf"]
    ]
    assert {command["properties"]["command"]["const"] for command in commands} == {
        "check",
        "trace",
        "diag",
        "ihvp",
        "spectrum",
        "symmetry",
        "prune",
    }
    for definition in described["$defs"].values():
        assert definition["description"]
        assert definition["required"] == list(definition["properties"])
    strictly(json.dumps(described))
