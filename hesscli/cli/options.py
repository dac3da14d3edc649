"""The options that commands share: how each is written, read and refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hesscli.cli import reading
from hesscli.errors import UsageError

MATRICES = ("hessian", "ggn", "fisher", "empirical-fisher")
METHODS = ("auto", "exact", "split", "deflated", "stratified", "hutchinson")
MODES = ("auto", "double-backward", "forward-over-reverse", "finite-difference")
DTYPES = ("float32", "float64")
WINDOW_DTYPES = ("float32", "bfloat16", "float64")
OUTPUTS = ("table", "json")

_HALF = ("bfloat16", "float32")
ALIASES = {
    **dict.fromkeys(("gauss-newton", "generalized-gauss-newton", "gn", "gauss"), ("ggn",)),
    **dict.fromkeys(("fim", "natural", "true-fisher"), ("fisher",)),
    **dict.fromkeys(("ef", "emp-fisher", "efisher"), ("empirical-fisher",)),
    **dict.fromkeys(("fp64", "f64", "double", "torch-float64", "64"), ("float64",)),
    **dict.fromkeys(("fp32", "f32", "single", "float", "torch-float32", "32"), ("float32",)),
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "f16", "half", "float16", "16"), _HALF),
    **dict.fromkeys(("reverse-over-reverse", "double-backprop"), ("double-backward",)),
    **dict.fromkeys(("forward", "jvp"), ("forward-over-reverse",)),
}
"""What else the choices are called, the first of those that an option has being meant."""

PROBLEM, ACCURACY, COMPUTE, OUTPUT = "Problem", "Accuracy", "Computation", "Output"
WINDOW = "Window of gradients"


def relative_tolerance(rtol: float | None, atol: float | None, usual: float = 0.05) -> float | None:
    """As usual unless one was asked for; an absolute one alone is the only one that counts."""
    return usual if rtol is None and atol is None else rtol


def _option(
    *flags: str, read: Callable[[str], Any], must: str, example: str, **settings: Any
) -> Any:
    """An option whose refusal says what it must be and shows one that works."""

    def parse(value: Any) -> Any:
        if not isinstance(value, str):  # a default, which is a value already
            return value
        try:
            return read(value.strip())
        except ValueError:
            raise UsageError(f"{flags[0]} must be {must}", repr(value), example) from None

    return typer.Option(*flags, parser=parse, show_default=False, **settings)


def _choice(*flags: str, choices: Sequence[str], **settings: Any) -> Any:
    """An option that takes one of a few names, which shells complete and refusals suggest."""

    def parse(value: Any) -> Any:
        if value is None or value in choices:
            return value
        raise UsageError(
            f"{flags[0]} must be {_listed(choices)}",
            repr(value),
            f"{flags[0]} {_meant(str(value), choices)}",
        )

    return typer.Option(
        *flags,
        parser=parse,
        autocompletion=lambda: list(choices),
        metavar="NAME",
        show_default=False,
        **settings,
    )


def _meant(text: str, choices: Sequence[str]) -> str:
    """The choice that is probably meant: by another name, by its beginning, or nearly spelled."""
    folded = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    names = [folded, *(name for name in ALIASES.get(folded, ()))]
    known = [name for name in names if name in choices]
    begun = [choice for choice in choices if folded and choice.startswith(folded)]
    return (known or begun or difflib.get_close_matches(folded, choices) or choices)[0]


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _path(*flags: str, **settings: Any) -> Any:
    return typer.Option(*flags, show_default=False, **settings)


Checkpoint = Annotated[
    Path | None,
    typer.Argument(
        metavar="CHECKPOINT",
        show_default=False,
        help="A .pt, .pth, .safetensors or .pt2 file; may be left out where the spec names one.",
    ),
]
Spec = Annotated[
    Path | None,
    _path(
        "--spec",
        metavar="FILE",
        rich_help_panel=PROBLEM,
        help="The spec: model, data and loss; the code that it names is run. Default: "
        "CHECKPOINT's name with .toml, else hesscli.toml beside it (inside the working folder) "
        "or here.",
    ),
]
Matrix = Annotated[
    str,
    _choice(
        "--matrix",
        choices=MATRICES,
        rich_help_panel=PROBLEM,
        help=f"{_listed(MATRICES)}. Default: hessian.",
    ),
]
Examples = Annotated[
    str,
    _option(
        "--examples",
        read=reading.examples,
        must="a number of examples, all, or first:N",
        example="--examples 4096, --examples all or --examples first:1000",
        metavar="N|all|first:N",
        rich_help_panel=PROBLEM,
        help="How many examples to keep, drawn by the seed. Default: 4096.",
    ),
]
WeightDecay = Annotated[
    float | None,
    _option(
        "--weight-decay",
        read=reading.non_negative,
        must="a number, 0 or more",
        example="--weight-decay 1e-4",
        metavar="X",
        rich_help_panel=PROBLEM,
        help="Add X/2 times the squared parameters to the loss. Default: as the spec says.",
    ),
]
BatchSize = Annotated[
    int | None,
    _option(
        "--batch-size",
        read=reading.count,
        must="a whole number, 1 or more",
        example="--batch-size 64",
        metavar="N",
        rich_help_panel=PROBLEM,
        help="Examples in a batch. Default: as the spec says.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        rich_help_panel=PROBLEM,
        help="Run code in the checkpoint, and the code that a spec found outside the working "
        "folder names. Only for files whose maker you trust.",
    ),
]
DiagonalTolerance = Annotated[
    float | None,
    _option(
        "--rtol",
        read=reading.fraction,
        must="a percentage, or a fraction, above 0",
        example="--rtol 10% or --rtol 0.1",
        metavar="PERCENT",
        rich_help_panel=ACCURACY,
        help="Stop once the norm of the error is this small beside that of the diagonal; exit 5 "
        "if that was not reached. Default: 10%, and no exit 5.",
    ),
]
RelativeTolerance = Annotated[
    float | None,
    _option(
        "--rtol",
        read=reading.fraction,
        must="a percentage, or a fraction, above 0",
        example="--rtol 5% or --rtol 0.05",
        metavar="PERCENT",
        rich_help_panel=ACCURACY,
        help="Stop once the error bar is this small beside the estimate; exit 5 if that was "
        "not reached. Default: 5%, and no exit 5.",
    ),
]
AbsoluteTolerance = Annotated[
    float | None,
    _option(
        "--atol",
        read=reading.positive,
        must="a number above 0",
        example="--atol 0.1",
        metavar="X",
        rich_help_panel=ACCURACY,
        help="Stop once the error bar is this small; exit 5 if that was not reached.",
    ),
]
Confidence = Annotated[
    float,
    _option(
        "--confidence",
        read=reading.confidence,
        must="a percentage, or a fraction, between 0 and 1",
        example="--confidence 95% or --confidence 0.95",
        metavar="PERCENT",
        rich_help_panel=ACCURACY,
        help="How often the intervals hold. Default: 95%.",
    ),
]
Budget = Annotated[
    float | None,
    _option(
        "--budget",
        read=reading.duration,
        must="a time, or none",
        example="--budget 10m, --budget 90s, --budget 1h30m or --budget none",
        metavar="TIME",
        rich_help_panel=ACCURACY,
        help="Stop after this long with what there is. Default: 10m.",
    ),
]
Probes = Annotated[
    reading.ProbeRange | None,
    _option(
        "--probes",
        read=reading.probes,
        must="a number of probes, or a range a:b with a below b",
        example="--probes 64 or --probes 64:128",
        metavar="N|a:b",
        rich_help_panel=ACCURACY,
        help="Use exactly these random probes, whatever the tolerance. Default: as many as it "
        "takes.",
    ),
]
Method = Annotated[
    str,
    _choice(
        "--method",
        choices=METHODS,
        rich_help_panel=COMPUTE,
        help="How it is estimated: auto takes the Gauss-Newton part without probes where the loss "
        "allows it, and probes for the rest. exact, split, deflated, stratified or hutchinson "
        "insist. Default: auto.",
    ),
]
Block = Annotated[
    str,
    _option(
        "--block",
        read=reading.block,
        must="auto, row, kernel, channel, head:N or a number of entries",
        example="--block 32 or --block head:4",
        autocompletion=lambda: ["auto", "row", "kernel", "channel"],
        metavar="NAME|head:N|N",
        rich_help_panel=COMPUTE,
        help="AdaHessian's blocks: auto (kernels of convolutions, 32 entries of a matrix's row), "
        "row, kernel, channel, head:N or N entries. Default: auto.",
    ),
]
PredictionTolerance = Annotated[
    float | None,
    _option(
        "--rtol",
        read=reading.fraction,
        must="a percentage, or a fraction, above 0",
        example="--rtol 20% or --rtol 0.2",
        metavar="PERCENT",
        rich_help_panel=ACCURACY,
        help="Stop once two standard errors of every predicted loss change are this small beside "
        "its terms; exit 5 if that was not reached. Default: 20%, and no exit 5.",
    ),
]
Rows = Annotated[
    str,
    _option(
        "--rows",
        read=reading.rows,
        must="auto, sampled, example or microbatch:N",
        example="--rows sampled or --rows microbatch:32",
        autocompletion=lambda: ["auto", "sampled", "example", "microbatch:"],
        metavar="KIND",
        rich_help_panel=WINDOW,
        help="What a row of the window is: sampled (an example's gradient for labels drawn from "
        "the model; its mean square is the Gauss-Newton matrix), example (for its own label) or "
        "microbatch:N (the mean of N). Default: auto, sampled where the loss allows it.",
    ),
]
Window = Annotated[
    int | None,
    _option(
        "--window",
        read=reading.count,
        must="a number of rows, 1 or more",
        example="--window 512",
        metavar="N",
        rich_help_panel=WINDOW,
        help="How many gradients the window holds. Default: 512, fewer where a quarter of the free "
        "memory holds fewer.",
    ),
]
WindowDtype = Annotated[
    str,
    _choice(
        "--window-dtype",
        choices=WINDOW_DTYPES,
        rich_help_panel=WINDOW,
        help=f"{_listed(WINDOW_DTYPES)}. Default: float32.",
    ),
]
WindowFile = Annotated[
    Path | None,
    _path(
        "--window-file",
        metavar="FILE",
        rich_help_panel=WINDOW,
        help="Keep the window in this file instead of memory; it is removed at the end.",
    ),
]
Blocks = Annotated[
    str,
    _option(
        "--blocks",
        read=reading.blocks,
        must="auto, whole, layer or a number of entries",
        example="--blocks 64",
        autocompletion=lambda: ["auto", "whole", "layer"],
        metavar="RULE",
        rich_help_panel=WINDOW,
        help="Diagonal blocks of the matrix that is inverted: auto (a quarter as many entries as "
        "rows), whole, layer or N entries. Default: auto.",
    ),
]
Damping = Annotated[
    reading.DampingValue,
    _option(
        "--damping",
        read=reading.damping,
        must="a number above 0, or abs: and a number above 0",
        example="--damping 1e-3 or --damping abs:1e-5",
        metavar="X|abs:X",
        rich_help_panel=WINDOW,
        help="λ in F̂ + λI, in units of tr F̂ / d, or abs: in its own. Default: 1e-3.",
    ),
]
Vector = Annotated[
    str | None,
    typer.Option(
        "--vector",
        metavar="gradient|FILE",
        show_default=False,
        rich_help_panel=COMPUTE,
        help="Only solve, for the loss's gradient or a .safetensors FILE with tensors named as in "
        "the checkpoint, and write the direction.",
    ),
]
Refine = Annotated[
    float | None,
    _option(
        "--refine",
        read=reading.fraction,
        must="a relative residual between 0 and 1",
        example="--refine 1e-3",
        metavar="RESIDUAL",
        rich_help_panel=COMPUTE,
        help="Go on by conjugate gradients with the matrix itself, the window as preconditioner, "
        "until the residual is this small.",
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        rich_help_panel=ACCURACY,
        help="Apply every change to the weights, measure the loss, and draw predicted against "
        "measured.",
    ),
]
HeatMap = Annotated[
    str | None,
    typer.Option(
        "--heatmap",
        metavar="TENSOR",
        show_default=False,
        rich_help_panel=OUTPUT,
        help="The matrix or kernel tensor whose entries are drawn as a map. Default: the one with "
        "the largest entry.",
    ),
]
EigenvalueTolerance = Annotated[
    float | None,
    _option(
        "--rtol",
        read=reading.fraction,
        must="a percentage, or a fraction, above 0",
        example="--rtol 1% or --rtol 0.01",
        metavar="PERCENT",
        rich_help_panel=ACCURACY,
        help="End the first run once each of the --k largest eigenvalues has an error bar this "
        "small beside it; exit 5 if that was not reached. Default: all steps, 1% called known, "
        "and no exit 5.",
    ),
]
Eigenvalues = Annotated[
    int,
    _option(
        "--k",
        read=reading.count,
        must="a number of eigenvalues, 1 or more",
        example="--k 10",
        metavar="N",
        rich_help_panel=ACCURACY,
        help="How many eigenvalues to list from either end of the spectrum. Default: 10.",
    ),
]
Steps = Annotated[
    int | None,
    _option(
        "--steps",
        read=reading.count,
        must="a number of steps, 1 or more",
        example="--steps 64",
        metavar="N",
        rich_help_panel=ACCURACY,
        help="Products from the first start vector; each keeps a vector of 8 bytes a parameter. "
        "Default: 64, or as many as --rtol takes.",
    ),
]
StartVectors = Annotated[
    int,
    _option(
        "--probes",
        read=reading.count,
        must="a number of start vectors, 1 or more",
        example="--probes 5",
        metavar="N",
        rich_help_panel=ACCURACY,
        help="Random start vectors. Those after the first take a quarter of its steps; without "
        "them sums over all eigenvalues have no error bar. Default: 5.",
    ),
]
Bandwidth = Annotated[
    float | None,
    _option(
        "--bandwidth",
        read=reading.bandwidth,
        must="auto, or a percentage or fraction above 0",
        example="--bandwidth auto or --bandwidth 10%",
        autocompletion=lambda: ["auto"],
        metavar="auto|PERCENT",
        rich_help_panel=ACCURACY,
        help="Width of the density's kernels beside the size of an eigenvalue. Default: auto, what "
        "one start vector resolves.",
    ),
]
RelativeDamping = Annotated[
    float,
    _option(
        "--damping",
        read=reading.positive,
        must="a number above 0",
        example="--damping 1e-3",
        metavar="X",
        rich_help_panel=COMPUTE,
        help="What the condition number of ggn, fisher and empirical-fisher adds to every "
        "eigenvalue, in units of their mean. Default: 1e-3.",
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        rich_help_panel=COMPUTE,
        help="Form the dense matrix of a small model as well, and draw its spectrum beneath.",
    ),
]
ExactLimit = Annotated[
    int,
    _option(
        "--exact-limit",
        read=reading.count,
        must="a number of parameters, 1 or more",
        example="--exact-limit 5000",
        metavar="N",
        rich_help_panel=COMPUTE,
        help="Refuse --exact for more parameters than this: it takes a product for each. "
        "Default: 5000.",
    ),
]
Vectors = Annotated[
    bool,
    typer.Option(
        "--vectors",
        rich_help_panel=OUTPUT,
        help="Write the eigenvectors of the listed eigenvalues to spectrum_vectors.safetensors.",
    ),
]
Seed = Annotated[
    int,
    _option(
        "--seed",
        read=reading.whole,
        must="a whole number, 0 or more",
        example="--seed 0",
        metavar="N",
        rich_help_panel=ACCURACY,
        help="Names the random probes and the examples kept. Default: 0.",
    ),
]
Device = Annotated[
    str,
    _option(
        "--device",
        read=reading.device,
        must="auto, cpu, cuda or cuda:NUMBER",
        example="--device auto",
        autocompletion=lambda: ["auto", "cpu", "cuda"],
        metavar="auto|cpu|cuda:N",
        rich_help_panel=COMPUTE,
        help="Where to compute. Default: auto, a GPU where there is one.",
    ),
]
Dtype = Annotated[
    str | None,
    _choice(
        "--dtype",
        choices=DTYPES,
        rich_help_panel=COMPUTE,
        help=f"{_listed(DTYPES)}. Default: the model's own.",
    ),
]
Mode = Annotated[
    str,
    _choice(
        "--mode",
        choices=MODES,
        rich_help_panel=COMPUTE,
        help=f"How products are differentiated: {_listed(MODES)}. Default: auto, the cheapest "
        "that passes its checks.",
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="GLOB",
        show_default=False,
        rich_help_panel=OUTPUT,
        help="Report only matching layers; may be repeated. Without GLOB: every layer, in full "
        "detail.",
    ),
]
Out = Annotated[
    str,
    _choice(
        "--out",
        choices=OUTPUTS,
        rich_help_panel=OUTPUT,
        help="What stdout carries: table or json. Default: table.",
    ),
]
Directory = Annotated[
    Path | None,
    _path(
        "--dir",
        metavar="FOLDER",
        rich_help_panel=OUTPUT,
        help="Where files go; - writes none. Default: a folder for the checkpoint under "
        "hesscli-out.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", rich_help_panel=OUTPUT, help="Say nothing but results and errors."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", rich_help_panel=OUTPUT, help="Say each step; show tracebacks of bugs."
    ),
]
