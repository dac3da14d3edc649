"""The table of options, of which each command picks its rows."""

from __future__ import annotations

from pathlib import Path

import typer

from hesscli.cli import parsing
from hesscli.cli.usage import Option, Panel, listed
from hesscli.vocabulary import (
    DTYPES,
    MATRICES,
    METHODS,
    MODES,
    PRUNING_DAMPING,
    SPELLED,
    USUAL_BUDGET,
    USUAL_CONFIDENCE,
    USUAL_RTOL,
    USUAL_SPARSITY,
    WINDOW_DTYPES,
    BlockRule,
    Pattern,
    RowKind,
    Selection,
    WindowBlocks,
)

_MATRICES, _MODES, _OUTPUTS = tuple(MATRICES), ("auto", *MODES), ("table", "json")

_PROBLEM, _ACCURACY, _COMPUTE = Panel("Problem"), Panel("Accuracy"), Panel("Computation")
_FOLDER, _PRUNING = Panel("Hugging Face folder"), Panel("Pruning")
_WINDOW, _OUTPUT = Panel("Window of gradients"), Panel("Output")


# -- Which problem ---------------------------------------------------------------------------------


CHECKPOINT = Option(
    name="checkpoint",
    declared=typer.Argument(
        metavar="CHECKPOINT",
        show_default=False,
        help="A .pt, .pth, .safetensors or .pt2 file, which may be left out where the spec names "
        "one; or with --data a Hugging Face folder.",
    ),
    type=Path | None,
)
LATER = Option(
    name="later",
    declared=typer.Argument(
        metavar="[LATER]...",
        show_default=False,
        help="Later checkpoints of the same run, whose charges are matched one by one.",
    ),
    type=list[str] | None,
)
SPEC = _PROBLEM.text(
    "--spec",
    "FILE",
    help="The spec: model, data and loss; the code that it names is run. Default: CHECKPOINT's "
    "name with .toml, else hesscli.toml beside it (inside the working folder) or here.",
)
MATRIX = _PROBLEM.choice(
    "--matrix", _MATRICES, default="hessian", help=f"{listed(_MATRICES)}. Default: hessian."
)
MATRIX_OF_PRUNING = _PROBLEM.choice(
    "--matrix",
    _MATRICES,
    default="hessian",
    help=f"By which the change of the loss is foreseen: {listed(_MATRICES)}. It does not decide "
    "which weights go: that is up to the window, see --rows. Default: hessian.",
)
PARAMS = _PROBLEM.text(
    "--params",
    "GLOB",
    type=list[str],
    help="Restrict the matrix to matching parameters or modules; others count as frozen. May be "
    "repeated, and '!GLOB' leaves some out. Default: all trainable ones.",
)
EXAMPLES = _PROBLEM.value(
    "--examples",
    parsing.examples,
    Selection.spelled,
    "--examples 4096, --examples all or --examples first:1000",
    metavar="N|all|first:N",
    default=str(Selection.usual),
    help="How many examples to keep, drawn by the seed. Default: 4096.",
)
WEIGHT_DECAY = _PROBLEM.value(
    "--weight-decay",
    parsing.non_negative,
    "a number, 0 or more",
    "--weight-decay 1e-4",
    metavar="X",
    help="Add X/2 times the squared parameters to the loss. Default: as the spec says.",
)
BATCH_SIZE = _PROBLEM.value(
    "--batch-size",
    parsing.count,
    "a whole number, 1 or more",
    "--batch-size 64",
    metavar="N",
    help="Examples in a batch. Default: as the spec says.",
)
TRUST = _PROBLEM.switch(
    "--trust",
    help="Run code in the checkpoint, and the code that a spec found outside the working folder "
    "names. Only for files whose maker you trust.",
)


# -- What a Hugging Face folder is shown -----------------------------------------------------------


DATA = _FOLDER.text(
    "--data",
    "PATH",
    type=str,
    help="A .txt, .jsonl, .csv or .parquet file, a folder of images by class, or what `datasets` "
    "saved or has in its cache (NAME:SPLIT). CHECKPOINT is then a folder that save_pretrained "
    "wrote, or its name in the cache; no spec is needed.",
)
TEXT = _FOLDER.text(
    "--text",
    "COLUMN",
    type=list[str],
    help="The column that holds the text; twice for a classifier of pairs. Default: text, or the "
    "only one that can be.",
)
LABELS = _FOLDER.text(
    "--labels",
    "COLUMN",
    type=str,
    help="The column that holds classes or answers. Default: labels or label.",
)
SEQUENCE = _FOLDER.value(
    "--sequence",
    parsing.count,
    "a number of tokens, 1 or more",
    "--sequence 512",
    metavar="N",
    help="Tokens of an example at most. Default: 512, fewer where the model takes fewer.",
)


# -- How precisely ---------------------------------------------------------------------------------


def _tolerance(examples: tuple[str, str], help: str, usual: float | None) -> Option:
    """``--rtol``, which means something else to each command."""
    return _ACCURACY.value(
        "--rtol",
        parsing.fraction,
        "a percentage, or a fraction, above 0",
        " or ".join(f"--rtol {amount}" for amount in examples),
        metavar="PERCENT",
        usual=usual,
        help=help,
    )


RTOL = _tolerance(
    ("5%", "0.05"),
    "Stop once the error bar is this small beside the estimate; exit 5 if that was not reached. "
    f"Default: {USUAL_RTOL['trace']:.0%}, and no exit 5.",
    usual=USUAL_RTOL["trace"],
)
RTOL_OF_PLANS = _tolerance(
    ("5%", "0.05"),
    "Plan trace and diag to this tolerance. Default: the usual one of each, "
    f"{USUAL_RTOL['trace']:.0%} and {USUAL_RTOL['diag']:.0%}.",
    usual=None,
)
RTOL_OF_DIAGONAL = _tolerance(
    ("10%", "0.1"),
    "Stop once the norm of the error is this small beside that of the diagonal; exit 5 if that "
    f"was not reached. Default: {USUAL_RTOL['diag']:.0%}, and no exit 5.",
    usual=USUAL_RTOL["diag"],
)
RTOL_OF_CHANGES = _tolerance(
    ("20%", "0.2"),
    "Stop once two standard errors of every predicted loss change are this small beside its "
    f"terms; exit 5 if that was not reached. Default: {USUAL_RTOL['ihvp']:.0%}, and no exit 5.",
    usual=USUAL_RTOL["ihvp"],
)
RTOL_OF_EIGENVALUES = _tolerance(
    ("1%", "0.01"),
    "End the first run once each of the --k largest eigenvalues has an error bar this small "
    "beside it; exit 5 if that was not reached. Default: all steps, 1% called known, and no exit "
    "5.",
    usual=None,
)
ATOL = _ACCURACY.value(
    "--atol",
    parsing.positive,
    "a number above 0",
    "--atol 0.1",
    metavar="X",
    help="Stop once the error bar is this small; exit 5 if that was not reached.",
)
CONFIDENCE = _ACCURACY.value(
    "--confidence",
    parsing.confidence,
    "a percentage, or a fraction, between 0 and 1",
    "--confidence 95% or --confidence 0.95",
    metavar="PERCENT",
    default=USUAL_CONFIDENCE,
    help=f"How often the intervals hold. Default: {USUAL_CONFIDENCE:.0%}.",
)
BUDGET = _ACCURACY.value(
    "--budget",
    parsing.duration,
    "a time, or none",
    "--budget 10m, --budget 90s, --budget 1h30m or --budget none",
    metavar="TIME",
    default=USUAL_BUDGET,
    help="Stop after this long with what there is, start-up and loading included. "
    f"Default: {USUAL_BUDGET / 60:.0f}m.",
)
PROBES = _ACCURACY.value(
    "--probes",
    parsing.probes,
    "a number of probes, or a range a:b with a below b",
    "--probes 64 or --probes 64:128",
    metavar="N|a:b",
    help="Use exactly so many random probes, whatever the tolerance, or those from number a up to "
    "b: a part of a run, for `hesscli join`. Default: as many as it takes.",
)
BATCHES = _ACCURACY.value(
    "--batches",
    parsing.numbers,
    "a range a:b of batches with a below b",
    "--batches 0:8",
    metavar="a:b",
    help="Measure only the batches from number a up to b: a part of a run, for `hesscli join`. "
    "Default: all.",
)
VERIFY = _ACCURACY.switch(
    "--verify",
    help="Apply every change to the weights, measure the loss, and draw predicted against "
    "measured.",
)
EIGENVALUES = _ACCURACY.value(
    "--k",
    parsing.count,
    "a number of eigenvalues, 1 or more",
    "--k 10",
    metavar="N",
    default=10,
    help="How many eigenvalues to list from either end of the spectrum. Default: 10.",
)
STEPS = _ACCURACY.value(
    "--steps",
    parsing.count,
    "a number of steps, 1 or more",
    "--steps 64",
    metavar="N",
    help="Products from the first start vector; each keeps a vector of 4 bytes a parameter, in "
    "float64 of 8. Default: 64, fewer where memory or --budget has no room for them; or as many as "
    "--rtol takes.",
)
START_VECTORS = _ACCURACY.value(
    "--probes",
    parsing.count,
    "a number of start vectors, 1 or more: no range, since later ones need the first",
    "--probes 5",
    metavar="N",
    default=5,
    help="Random start vectors. Those after the first take a quarter of its steps; without them "
    "sums over all eigenvalues have no error bar. Default: 5.",
)
BANDWIDTH = _ACCURACY.value(
    "--bandwidth",
    parsing.bandwidth,
    "auto, or a percentage or fraction above 0",
    "--bandwidth auto or --bandwidth 10%",
    words=("auto",),
    metavar="auto|PERCENT",
    help="Width of the density's kernels beside the size of an eigenvalue. Default: auto, what "
    "one start vector resolves.",
)
SEED = _ACCURACY.value(
    "--seed",
    parsing.whole,
    "a whole number, 0 or more",
    "--seed 0",
    metavar="N",
    default=0,
    help="Names the random probes and the examples kept. Default: 0.",
)


# -- How much is to go -----------------------------------------------------------------------------


SPARSITY = _PRUNING.value(
    "--sparsity",
    parsing.confidence,
    "a percentage, or a fraction, between 0 and 1",
    "--sparsity 90% or --sparsity 0.9",
    metavar="PERCENT",
    help="Share of the weights that are to be zero, biases and other vectors left out. Default: "
    f"that of --pattern, else {USUAL_SPARSITY:.0%}.",
)
PATTERN = _PRUNING.value(
    "--pattern",
    parsing.pattern,
    Pattern.spelled,
    "--pattern 2:4",
    metavar="N:M|RxC",
    help="Of each M weights for consecutive inputs no more than N stay, and every choice is tried; "
    "or blocks of R outputs by C inputs go or stay whole, as many as --sparsity says. Tensors that "
    "no such group fits stay whole. Default: any weight may go.",
)
PRUNING_STEPS = _PRUNING.value(
    "--steps",
    parsing.count,
    "a number of steps, 1 or more",
    "--steps 16",
    metavar="N",
    default=1,
    help="In how many steps they go, each through a new window of gradients and by the same share "
    "of what is left. Default: 1.",
)
PER_LAYER = _PRUNING.switch(
    "--per-layer", help="The same sparsity in each layer, and not in all of them together."
)


# -- Through which window of gradients -------------------------------------------------------------


ROWS = _WINDOW.value(
    "--rows",
    parsing.rows,
    RowKind.spelled,
    "--rows sampled or --rows microbatch:32",
    words=("auto", *RowKind.named, "microbatch:"),
    metavar="KIND",
    default="auto",
    help="What a row of the window is: sampled (an example's gradient for labels drawn from the "
    "model; its mean square is the Gauss-Newton matrix), example (for its own label) or "
    "microbatch:N (the mean of N). Default: auto, sampled where the loss allows it.",
)
WINDOW = _WINDOW.value(
    "--window",
    parsing.count,
    "a number of rows, 1 or more",
    "--window 512",
    metavar="N",
    help="How many gradients the window holds. Default: 512, fewer where 1.5 GiB or a quarter of "
    "the free memory hold fewer.",
)
WINDOW_DTYPE = _WINDOW.choice(
    "--window-dtype",
    WINDOW_DTYPES,
    default="float32",
    help=f"{listed(WINDOW_DTYPES)}. Default: float32.",
)
WINDOW_FILE = _WINDOW.text(
    "--window-file",
    "FILE",
    help="Keep the window in this file instead of memory; it is removed at the end.",
)
BLOCKS = _WINDOW.value(
    "--blocks",
    parsing.blocks,
    WindowBlocks.spelled,
    "--blocks 64",
    words=WindowBlocks.named,
    metavar="RULE",
    default="auto",
    help="Diagonal blocks of the matrix that is inverted: auto (a quarter as many entries as "
    "rows), whole, layer or N entries. Default: auto.",
)


def _damping(usual: float) -> Option:
    """``--damping``, whose usual value is each command's own."""
    told = f"{usual:.0e}".replace("e-0", "e-")
    return _WINDOW.value(
        "--damping",
        parsing.damping,
        "a number above 0, or abs: and a number above 0",
        f"--damping {told} or --damping abs:1e-5",
        metavar="X|abs:X",
        default=parsing.DampingValue(usual),
        help=f"λ in F̂ + λI, in units of tr F̂ / d, or abs: in its own. Default: {told}.",
    )


DAMPING = _damping(1e-3)
DAMPING_OF_PRUNING = _damping(PRUNING_DAMPING)


# -- How it is computed ----------------------------------------------------------------------------


METHOD = _COMPUTE.choice(
    "--method",
    METHODS,
    default="auto",
    help="How it is estimated: auto takes the Gauss-Newton part without probes where the loss "
    "allows it, and probes for the rest. exact, split, deflated, stratified or hutchinson insist. "
    "Default: auto.",
)
BLOCK = _COMPUTE.value(
    "--block",
    parsing.block,
    BlockRule.spelled,
    "--block 32 or --block head:4",
    words=BlockRule.named,
    metavar="NAME|head:N|N",
    default="auto",
    help="AdaHessian's blocks: auto (kernels of convolutions, 32 entries of a matrix's row), image "
    "(kernels alone), row, kernel, channel, head:N or N entries. Default: auto.",
)
VECTOR = _COMPUTE.text(
    "--vector",
    "gradient|FILE",
    type=str,
    help="Only solve, for the loss's gradient or a .safetensors FILE with tensors named as in the "
    "checkpoint, and write the direction.",
)
REFINE = _COMPUTE.value(
    "--refine",
    parsing.fraction,
    "a relative residual between 0 and 1",
    "--refine 1e-3",
    metavar="RESIDUAL",
    help="Go on by conjugate gradients with the matrix itself, the window as preconditioner, "
    "until the residual is this small.",
)
RELATIVE_DAMPING = _COMPUTE.value(
    "--damping",
    parsing.positive,
    "a number above 0",
    "--damping 1e-3",
    metavar="X",
    default=1e-3,
    help="What the condition number of ggn, fisher and empirical-fisher adds to every eigenvalue, "
    "in units of their mean. Default: 1e-3.",
)
EXACT = _COMPUTE.switch(
    "--exact", help="Form the dense matrix of a small model as well, and draw its spectrum beneath."
)
EXACT_LIMIT = _COMPUTE.value(
    "--exact-limit",
    parsing.count,
    "a number of parameters, 1 or more",
    "--exact-limit 5000",
    metavar="N",
    default=5000,
    help="Refuse --exact for more parameters than this: it takes a product for each. Default: "
    "5000.",
)
DEVICE = _COMPUTE.value(
    "--device",
    parsing.device,
    "auto, cpu, cuda or cuda:NUMBER",
    "--device auto",
    words=("auto", "cpu", "cuda"),
    metavar="auto|cpu|cuda:N",
    default="auto",
    help="Where to compute. Default: auto, a GPU where there is one.",
)
DTYPE = _COMPUTE.choice(
    "--dtype",
    DTYPES,
    help=f"{listed(DTYPES)}; the last for products alone, what it does to them being in the bars. "
    "Default: the model's own, float32 for half types.",
)
MODE = _COMPUTE.choice(
    "--mode",
    _MODES,
    default="auto",
    help=f"How products are differentiated: {listed(_MODES)}. Default: auto, the cheapest that "
    "passes its checks.",
)
CHECKPOINT_ACTIVATIONS = _COMPUTE.switch(
    "--checkpoint-activations",
    help="Keep of each repeated block of the model what it is given, and run it again for the "
    "rest: less memory, a forward pass more for a gradient, one and a way back for a product. "
    "Passes over single examples keep theirs.",
)


TRAINED_WITH = _COMPUTE.value(
    "--trained-with",
    parsing.training,
    SPELLED,
    "--trained-with lr=0.1,wd=5e-4,momentum=0.9,updates=log.safetensors",
    metavar="KEY=X,...",
    help="How LATER came from CHECKPOINT: lr, wd, momentum, dampening, nesterov (yes or no) and "
    "optimizer (sgd, adam, adamw or other), default what the log or the optimizer's state in LATER "
    "says (lr, once typed, is of every step); and updates=FILE, a .safetensors log of what each "
    "step added to each parameter, or steps=N, their number alone. Charges are then predicted.",
)


SYMMETRY = _COMPUTE.switch(
    "--symmetry",
    help="Try the products on null directions that the model's own symmetries give.",
)


# -- What is shown ---------------------------------------------------------------------------------


LAYERS = _OUTPUT.text(
    "--layer",
    "GLOB",
    name="layers",
    type=list[str],
    help="Report only matching layers; may be repeated. Without GLOB: every layer, in full detail.",
)
HEATMAP = _OUTPUT.text(
    "--heatmap",
    "TENSOR",
    type=str,
    help="The matrix or kernel tensor whose entries are drawn as a map. Default: the one with the "
    "largest entry.",
)
VECTORS = _OUTPUT.switch(
    "--vectors",
    help="Write the eigenvectors of the listed eigenvalues to spectrum_vectors.safetensors.",
)
OUT = _OUTPUT.choice(
    "--out", _OUTPUTS, default="table", help="What stdout carries: table or json. Default: table."
)
DIRECTORY = _OUTPUT.text(
    "--dir",
    "FOLDER",
    name="directory",
    help="Where files go, of one run at a time; - writes none. Default: a folder for the "
    "checkpoint under hesscli-out.",
)
RESUME = _OUTPUT.switch(
    "--resume",
    help="Go on with the run that was cut off, or finish one to a smaller tolerance, from its "
    "ledger in FOLDER; begin anew where there is none.",
)
QUIET = _OUTPUT.switch("--quiet", "-q", help="Say nothing but results and errors.")
VERBOSE = _OUTPUT.switch("--verbose", "-v", help="Say each step; show tracebacks of bugs.")


# -- Rows that go together -------------------------------------------------------------------------


FOLDER = (DATA, TEXT, LABELS, SEQUENCE)
"""Of a model that needs no spec."""
LOADED = (
    SPEC,
    *FOLDER,
    PARAMS,
    EXAMPLES,
    WEIGHT_DECAY,
    BATCH_SIZE,
    TRUST,
    SEED,
    DEVICE,
    DTYPE,
    CHECKPOINT_ACTIVATIONS,
    BUDGET,
)
"""How a problem is loaded; seed and budget are of its measurement as well."""
SHOWN = (LAYERS, OUT, DIRECTORY, RESUME, QUIET, VERBOSE)
"""What happens to a result."""
_WHERE, _WHAT = (CHECKPOINT, SPEC, *FOLDER), (PARAMS, EXAMPLES, WEIGHT_DECAY, BATCH_SIZE, TRUST)
PROBLEM = (*_WHERE, MATRIX, *_WHAT)
PROBLEM_OF_PRUNING = (*_WHERE, MATRIX_OF_PRUNING, *_WHAT)
COMPUTE = (SEED, DEVICE, DTYPE, MODE, CHECKPOINT_ACTIVATIONS)
OUTPUT = (OUT, DIRECTORY, QUIET, VERBOSE)
RESULT = (*OUTPUT, RESUME)
"""Of what takes work that may be cut off."""
