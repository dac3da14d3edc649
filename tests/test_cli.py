"""The program as people and scripts meet it: messages, exit codes, streams and files."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from program import HESSCLI, SPEC, SUNSPOTS, environment, hesscli_run, hesscli_warm, three_lines
from safetensors.numpy import load_file

import hesscli
from hesscli.cli.app import explain, main
from hesscli.errors import ExitCode

ESCAPE = "\x1b["


# What is typed wrongly.

MISUSES = [
    ("trac model.pt", "no such command 'trac'", "trace"),
    ("nonsense", "no such command 'nonsense'", "hesscli --help"),
    ("--verison", "no such option: --verison", "--version"),
    ("trace --lyer x", "no such option: --lyer", "--layer"),
    ("trace -x", "no such option: -x", "hesscli trace --help"),
    ("trace --rtol", "option '--rtol' requires an argument", "hesscli trace --help"),
    ("trace a.pt b.pt", "got unexpected extra argument(s) (b.pt)", "hesscli trace --help"),
    ("trace --trust=yes", "option '--trust' does not take a value", "hesscli trace --help"),
    ("init", "missing argument 'CHECKPOINT'", "hesscli init --help"),
    ("trace --rtol 5", "--rtol must be", "--rtol 5%"),
    ("trace --atol 0", "--atol must be", "--atol 0.1"),
    ("trace --confidence 100%", "--confidence must be", "--confidence 95%"),
    ("trace --budget 10x", "--budget must be", "--budget 10m"),
    ("trace --probes 8:4", "--probes must be", "--probes 64"),
    ("trace --examples some", "--examples must be", "--examples all"),
    ("trace --seed -1", "--seed must be", "--seed 0"),
    ("trace --device gpu", "--device must be", "--device auto"),
    ("trace --dtype float16", "--dtype must be float32, float64 or bfloat16", "--dtype bfloat16"),
    ("trace --matrix gnn", "--matrix must be hessian, ggn, fisher or", "--matrix ggn"),
    ("trace --mode finite", "--mode must be", "--mode finite-difference"),
    ("trace --out yaml", "--out must be table or json", "--out table"),
    ("trace --weight-decay -1", "--weight-decay must be", "--weight-decay 1e-4"),
    ("check --batch-size 0", "--batch-size must be", "--batch-size 64"),
]


@pytest.mark.parametrize(("line", "what", "hint"), MISUSES)
def test_misuse_is_told_in_three_lines(line, what, hint, capsys) -> None:
    assert main(line.split()) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    first, got, third = three_lines(printed.err)
    assert first.startswith(what)
    assert line.split()[-1] in got
    assert hint in third


def test_misuse_exits_2(tmp_path: Path) -> None:
    run = hesscli_run("trace", "--rtol", "0%", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert three_lines(run.stderr)[1] == "'0%'"


@pytest.mark.parametrize(
    "command", ["check", "init", "trace", "diag", "ihvp", "spectrum", "symmetry", "prune", "schema"]
)
def test_every_command_explains_itself_with_examples(command, capsys) -> None:
    assert main([command, "-h"]) == 0
    brief = capsys.readouterr().out
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out == brief
    assert f"hesscli {command} " in brief.partition("Examples:")[2]
    assert main([]) == 0
    assert command in capsys.readouterr().out


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hesscli {hesscli.__version__}\n"


def test_shells_can_complete_names(tmp_path: Path) -> None:
    completion = environment(
        _HESSCLI_COMPLETE="complete_bash", COMP_WORDS="hesscli trace --matrix ", COMP_CWORD="3"
    )
    run = subprocess.run(HESSCLI, cwd=tmp_path, env=completion, capture_output=True, text=True)
    assert run.stdout.split() == ["hessian", "ggn", "fisher", "empirical-fisher"]


# What goes wrong inside.


def test_a_bug_asks_for_a_report_and_shows_its_traceback_only_if_asked() -> None:
    try:
        raise ValueError("first line\nsecond line")
    except ValueError as error:
        brief = explain(error, [], verbose=False)
        full = explain(error, [], verbose=True)
    assert brief.exit_code == ExitCode.UNEXPECTED
    what, got, hint = str(brief).splitlines()
    assert "ValueError" in what
    assert "first line" in got
    assert "-v" in hint
    assert hesscli.__version__ in hint
    assert "Traceback (most recent call last)" in str(full)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
)
def test_too_little_memory_is_no_bug(error: Exception) -> None:
    known = explain(error, [], verbose=False)
    assert known.exit_code == ExitCode.UNSOUND
    assert "--batch-size" in known.hint


# The two streams.


@pytest.mark.parametrize("args", [["schema"], ["--version"]])
def test_a_closed_pipe_is_silent(args: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        run = subprocess.run(
            [*HESSCLI, *args],
            stdout=writing,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=environment(),
        )
    finally:
        os.close(writing)
    assert run.stderr == b""
    assert run.returncode == 0


def test_a_missing_stdout_is_no_error(tmp_path: Path) -> None:
    run = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *HESSCLI, "schema"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_a_full_disk_under_stdout_is_told(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [*HESSCLI, "schema"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment(),
        )
    assert run.returncode == 2
    assert three_lines(run.stderr)[0] == "the disk is full"


def test_no_color_wins_over_force_color(tmp_path: Path) -> None:
    line = ["trace", "--rtol", "0%"]
    plain = hesscli_run(*line, cwd=tmp_path)
    forced = hesscli_run(*line, cwd=tmp_path, FORCE_COLOR="1")
    neither = hesscli_run(*line, cwd=tmp_path, FORCE_COLOR="1", NO_COLOR="1")
    assert ESCAPE not in plain.stderr
    assert ESCAPE in forced.stderr
    assert neither.stderr == plain.stderr


def test_schema_is_one_valid_document(tmp_path: Path) -> None:
    run = hesscli_run("schema", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    jsonschema.Draft202012Validator.check_schema(json.loads(run.stdout))


# Runs. The sunspot network is smooth, so that its trace needs probes, and small.


def test_trace_as_a_person_runs_it(tmp_path: Path) -> None:
    run = hesscli_run("trace", SUNSPOTS, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert ESCAPE not in run.stdout + run.stderr
    assert "trace of the Hessian" in run.stdout
    folder = Path("hesscli-out", "sunspots-model")
    wrote = [line for line in run.stderr.splitlines() if line.startswith("wrote ")]
    assert wrote == [f"wrote {folder / name}" for name in ("trace.json", "trace.png", "trace.svg")]
    assert sorted(path.name for path in (tmp_path / folder).iterdir()) == [
        "trace.json",
        "trace.ledger",
        "trace.png",
        "trace.svg",
    ]
    assert (tmp_path / folder / "trace.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / folder / "trace.json").read_text())
    assert document["files"] == {
        kind: str(folder / f"trace.{kind}") for kind in ("json", "png", "svg")
    }


def test_json_on_stdout_is_one_document_that_keeps_the_schema(tmp_path: Path, capsys) -> None:
    run = hesscli_run("trace", SUNSPOTS, "--out", "json", "-q", "--dir", "-", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    document = json.loads(run.stdout)
    main(["schema"])
    jsonschema.validate(document, json.loads(capsys.readouterr().out))
    assert document["command"] == "trace"
    assert document["status"] in ("converged", "exact")
    low, high = document["trace"]["interval"]
    assert low <= document["trace"]["estimate"] <= high
    assert [layer["name"] for layer in document["layers"]] == ["hidden1", "hidden2", "head"]
    assert document["files"] == {}


def test_check_as_a_script_runs_it(tmp_path: Path) -> None:
    run = hesscli_warm("check", SUNSPOTS, "--out", "json", "--dir", "here", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (tmp_path / "here" / "check.json").read_text()
    document = json.loads(run.stdout)
    assert document["command"] == "check"
    assert document["files"] == {"json": str(Path("here", "check.json"))}
    assert "trace" in [planned["command"] for planned in document["plan"]["commands"]]


DIAG_FILES = (
    "diag.json",
    "diag.safetensors",
    "diag_stderr.safetensors",
    "diag.png",
    "diag.svg",
    "diag_blocks.png",
    "diag_blocks.svg",
    "diag_heatmap.png",
    "diag_heatmap.svg",
)


def test_diag_as_a_script_runs_it(tmp_path: Path, capsys) -> None:
    run = hesscli_run("diag", SUNSPOTS, "--out", "json", "--dir", "here", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [f"wrote {Path('here', name)}" for name in DIAG_FILES]
    assert run.stdout == (tmp_path / "here" / "diag.json").read_text()
    document = json.loads(run.stdout)
    main(["schema"])
    jsonschema.validate(document, json.loads(capsys.readouterr().out))
    assert document["files"]["tensors"] == str(Path("here", "diag.safetensors"))
    assert "entries" not in document
    entries = load_file(tmp_path / "here" / "diag.safetensors")
    errors = load_file(tmp_path / "here" / "diag_stderr.safetensors")
    shapes = {p["name"]: p["shape"] for layer in document["layers"] for p in layer["parameters"]}
    for tensors in (entries, errors):
        assert {name: list(t.shape) for name, t in tensors.items()} == shapes
    total = sum(float(t.sum()) for t in entries.values())
    assert total == pytest.approx(document["trace"]["estimate"], rel=0.05)


def test_diag_layer_runs_as_it_stands_in_a_sample(tmp_path: Path) -> None:
    """Literally the words of the README: no checkpoint, and --layer last."""
    run = hesscli_warm("diag", "--layer", "--dir", tmp_path, cwd=SUNSPOTS.parent)
    assert run.returncode == 0, run.stderr
    for name in ("hidden1", "hidden2", "head"):
        assert f"{name} ·" in run.stdout
    for word in ("quantiles", "largest", "blocks"):
        assert word in run.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layer", "hiden1"], "hidden1"),
        (["--heatmap", "hidden1.bias"], "hidden1.weight"),
        (["--block", "head:x"], "head:4"),
        (["--block", "head:7"], "rows of 1, 4, 18"),
        (["--method", "exact"], "tanh"),
        (["--method", "exct"], "exact"),
    ],
)
def test_diag_refuses_in_three_lines(options: list[str], words: str, tmp_path: Path) -> None:
    run = hesscli_warm("diag", SUNSPOTS, *options, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert words in " ".join(three_lines(run.stderr))


def test_layers_restrict_the_report_but_not_the_total(tmp_path: Path) -> None:
    line = ["trace", SUNSPOTS, "--out", "json", "--dir", "-", "--probes", 8]
    whole = json.loads(hesscli_warm(*line, cwd=tmp_path).stdout)
    chosen = json.loads(
        hesscli_warm(*line, "--layer", "hidden*", "--layer", "*.bias", cwd=tmp_path).stdout
    )
    assert chosen["trace"] == whole["trace"]
    assert chosen["layers"] == whole["layers"]
    chosen = json.loads(hesscli_warm(*line, "--layer", "head", cwd=tmp_path).stdout)
    assert chosen["layers"] == [whole["layers"][-1]]


def test_a_bare_layer_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    run = hesscli_warm("trace", "--layer", SUNSPOTS, "--probes", 8, "--dir", "-", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for name in ("hidden1", "hidden2", "head"):
        assert name in run.stdout


@pytest.mark.parametrize(
    ("pattern", "code", "words"),
    [("hiden1", 2, "hidden1"), ("models.pt", 3, "file not found")],
)
def test_a_pattern_without_a_layer(pattern: str, code: int, words: str, tmp_path: Path) -> None:
    run = hesscli_warm("trace", SUNSPOTS, "--layer", pattern, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (code, "")
    assert words in " ".join(three_lines(run.stderr))
    assert list(tmp_path.iterdir()) == []


def test_an_unreached_tolerance_that_was_asked_for_exits_5(tmp_path: Path) -> None:
    line = ["trace", SUNSPOTS, "--out", "json", "--dir", "-", "--examples", "64"]
    asked = hesscli_warm(*line, "--atol", "1e-9", cwd=tmp_path)
    assert asked.returncode == 5, asked.stderr
    assert json.loads(asked.stdout)["status"] == "data-limited"
    fixed = hesscli_warm(*line, "--probes", 2, cwd=tmp_path)
    assert fixed.returncode == 0, fixed.stderr
    assert json.loads(fixed.stdout)["method"]["num_probes"] == 2


def test_no_spec_shows_one_to_copy(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    checkpoint.write_bytes(SUNSPOTS.read_bytes())
    run = hesscli_warm("trace", checkpoint, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (3, "")
    assert "no spec" in run.stderr
    assert "[data]" in run.stderr
    assert "hesscli init" in run.stderr


def test_a_missing_checkpoint_exits_3(tmp_path: Path) -> None:
    run = hesscli_warm("trace", "nothing.pt", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (3, "")
    assert "nothing.pt" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("folder", ["taken", "/proc/self/net/hesscli"])
def test_an_unwritable_folder_is_told_before_the_work(folder: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    run = hesscli_warm("trace", SUNSPOTS, "--dir", folder, "-v", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert folder in run.stderr
    assert "--dir" in run.stderr
    assert "probing" not in run.stderr


def test_what_the_users_code_prints_stays_off_stdout(tmp_path: Path) -> None:
    for name in ("model.pt", "net.py", "sunspots.safetensors", "hesscli.toml"):
        (tmp_path / name).write_bytes((SUNSPOTS.parent / name).read_bytes())
    with (tmp_path / "net.py").open("a") as net:
        net.write("\nimport warnings\nprint('from the user')\nwarnings.warn('be careful')\n")
    run = hesscli_warm("trace", "--out", "json", "--probes", 2, "--dir", "-", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    json.loads(run.stdout)
    assert "from the user" in run.stderr
    assert "warning: be careful" in run.stderr.splitlines()


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    run = hesscli_run(
        *("trace", SUNSPOTS, "--probes", 8, "--dir", "-"),
        cwd=tmp_path,
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONIOENCODING="",
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.isascii()
    assert "hidden1" in run.stdout


def test_plans_are_held_against_the_budget_that_was_typed(tmp_path: Path) -> None:
    """And not against what the start of a process, which loads torch, has left of it."""
    long = ("--method", "hutchinson", "--rtol", "0.0001%", "--budget", "20s")
    run = hesscli_run("check", SUNSPOTS, *long, "--out", "json", "--dir", "-", cwd=tmp_path)
    notes = {p["command"]: p["note"] for p in json.loads(run.stdout)["plan"]["commands"]}
    assert "beyond --budget 20s" in notes["trace"]


@pytest.mark.parametrize("line", [["trace", "--help"], ["schema"]])
def test_a_reader_that_leaves_early_is_no_error(line: list[str]) -> None:
    with subprocess.Popen(
        [*HESSCLI, *line],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        told = run.stderr.read()
    assert (run.returncode, told) == (0, "")


def heed_signals() -> None:
    """Background jobs inherit ignored signals, and the suite may run as one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_to_end_print_the_result_so_far(tmp_path: Path, number: int, code: int) -> None:
    line = [
        "trace",
        str(SUNSPOTS),
        *SPEC,
        "--method",
        "hutchinson",
        "--rtol",
        "0.0001%",
        "--budget",
        "none",
        "--out",
        "json",
        "-v",
    ]
    with subprocess.Popen(
        [*HESSCLI, *line],
        cwd=tmp_path,
        env=environment(PYTHONUTF8="1"),
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_signals,
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        for said in run.stderr:
            if "probing" in said and "±" in said:  # the first estimate with an error bar
                break
        run.send_signal(number)
        document, rest = run.stdout.read(), run.stderr.read()
    assert run.returncode == code, rest
    assert "Traceback" not in rest
    assert json.loads(document)["status"] == "interrupted"
    assert document == (tmp_path / "hesscli-out" / "sunspots-model" / "trace.json").read_text()


def test_a_second_ctrl_c_quits_at_once(tmp_path: Path) -> None:
    (tmp_path / "hesscli.toml").write_text(
        'checkpoint = "model.pt"\n[model]\nfactory = "stubborn:net"\n'
        '[data]\nfactory = "stubborn:data"\n[loss]\nname = "mse"\n'
    )
    (tmp_path / "model.pt").write_bytes(SUNSPOTS.read_bytes())
    (tmp_path / "stubborn.py").write_text(
        "while True:\n"
        "    try:\n"
        "        print('waiting', flush=True)\n"
        "        while True: pass\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
    )
    with subprocess.Popen(
        [*HESSCLI, "trace"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    ) as run:
        assert run.stderr is not None
        for _ in range(2):
            assert run.stderr.readline() == "waiting\n"
            run.send_signal(signal.SIGINT)
        assert run.stderr.read() == ""
    assert run.returncode == 130


def test_progress_is_drawn_on_a_terminal_and_wiped(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    line = ["trace", str(SUNSPOTS), *SPEC, "--probes", "64", "--dir", "-", "--out", "json"]
    with subprocess.Popen(
        [*HESSCLI, *line],
        cwd=tmp_path,
        env=environment(TERM="xterm", LC_ALL="C.UTF-8"),
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as run:
        os.close(theirs)
        drawn = b"".join(iter(lambda: _read(ours), b"")).decode()
        assert run.stdout is not None
        document = run.stdout.read()
    os.close(ours)
    assert run.returncode == 0, drawn[-500:]
    assert json.loads(document)["status"]
    assert "reading data" in drawn
    assert drawn.endswith("\x1b[2K")  # the line is erased at the end


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_init_writes_a_spec_once(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    checkpoint.write_bytes(SUNSPOTS.read_bytes())
    spec = tmp_path / "model.toml"
    printed = hesscli_warm("init", checkpoint, "--stdout", cwd=tmp_path)
    assert (printed.returncode, spec.exists()) == (0, False)
    run = hesscli_warm("init", checkpoint, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "")
    assert spec.read_text() == printed.stdout
    assert f"wrote {spec}" in run.stderr.splitlines()
    again = hesscli_warm("init", checkpoint, cwd=tmp_path)
    assert again.returncode == 2
    assert "--force" in three_lines(again.stderr)[2]
    spec.write_text("old")
    assert hesscli_warm("init", checkpoint, "--force", "-q", cwd=tmp_path).stderr == ""
    assert spec.read_text() == printed.stdout


def test_init_takes_the_name_of_a_network(tmp_path: Path) -> None:
    run = hesscli_warm("init", "timm:resnet18", cwd=tmp_path)
    assert run.returncode == 0
    assert "to fill in: line 10 (factory)" in run.stderr.splitlines()
    text = (tmp_path / "resnet18.toml").read_text()
    assert 'factory = "timm:create_model"\nkwargs = { model_name = "resnet18" }' in text
    assert text.splitlines()[9].startswith('factory = "REPLACE:REPLACE"')
    refused = hesscli_warm("init", str(SUNSPOTS), "--model", "resnet18", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--model timm:" in three_lines(refused.stderr)[2]


def test_completion_is_shown_without_a_word_of_its_own() -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run(
        [sys.executable, "-m", "hesscli", "--show-completion", "bash"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "complete " in shown.stdout
