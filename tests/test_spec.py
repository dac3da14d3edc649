"""Specs: found by convention, read strictly, refused in plain words."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from hesscli.errors import ExitCode, InputError
from hesscli.problem.factory import call_user, load_factory
from hesscli.problem.spec import Spec, describe_example, read_spec
from hesscli.problem.spec_places import find_spec

GOOD = """
[model]
factory = "net:Net"
kwargs = { width = 16, deep = { a = [1, 2] } }
[data]
file = "sub/data.safetensors"
inputs = ["x", "y"]
targets = "t"
[loss]
name = "cross_entropy"
class_weights = [1, 2.5]
weight_decay = 0
"""


def _write(folder: Path, text: str) -> Spec:
    path = folder / "hesscli.toml"
    path.write_text(text, encoding="utf-8")
    return read_spec(path)


def _refusal(folder: Path, text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        _write(folder, text)
    assert caught.value.exit_code == ExitCode.INPUT
    assert str(folder / "hesscli.toml") in caught.value.got
    assert "pydantic" not in str(caught.value).lower()
    return caught.value


def test_values_defaults_and_paths(tmp_path: Path) -> None:
    spec = _write(tmp_path, 'checkpoint = "../a/model.pt"\n' + GOOD)
    assert spec.path == tmp_path / "hesscli.toml"
    assert spec.checkpoint == tmp_path / "../a/model.pt"
    assert spec.model is not None
    assert (spec.model.kwargs["deep"], spec.model.training) == ({"a": [1, 2]}, False)
    assert spec.data.file == tmp_path / "sub/data.safetensors"
    assert (spec.data.inputs, spec.data.batch_size) == (["x", "y"], None)
    assert (spec.loss.class_weights, spec.loss.weight_decay) == ([1.0, 2.5], 0.0)
    assert spec.held_out is None


def test_absolute_paths_stay(tmp_path: Path) -> None:
    spec = _write(tmp_path, f'checkpoint = "{Path("/elsewhere/m.pt")}"\n' + GOOD)
    assert spec.checkpoint == Path("/elsewhere/m.pt")


def test_the_example_is_a_spec(tmp_path: Path) -> None:
    assert _write(tmp_path, describe_example()).loss.name == "cross_entropy"


def test_samples_are_specs() -> None:
    specs = sorted((Path(__file__).parents[1] / "samples").glob("*/hesscli.toml"))
    assert specs
    for path in specs:
        checkpoint = read_spec(path).checkpoint
        assert checkpoint is not None
        assert checkpoint.is_file()


def _data(line: str) -> str:
    return f'[data]\nfactory = "d:f"\n{line}\n[loss]\nname = "mse"\n'


def _loss(lines: str) -> str:
    return f'[data]\nfactory = "d:f"\n[loss]\n{lines}\n'


@pytest.mark.parametrize(
    ("text", "what", "got"),
    [
        (_data('batch_size = "many"'), "[data] batch_size must be a whole number", "'many'"),
        (_data("batch_size = 2.5"), "[data] batch_size must be a whole number", "2.5"),
        (_data("batch_size = true"), "[data] batch_size must be a whole number", "true"),
        (_data("batch_size = 0"), "[data] batch_size must be at least 1", "0"),
        (_data("unseen = 1"), "[data] unseen must be true or false", "1"),
        (_data("kwargs = 3"), "[data] kwargs must be a table", "3"),
        (_data('inputs = "x"'), "[data] has inputs, which only file uses", "factory is set"),
        (_data('file = "a.safetensors"'), "[data] needs exactly one of", "factory and file"),
        ('[data]\n[loss]\nname = "mse"', "[data] needs exactly one of", "none of them"),
        ('[data]\nfile = "a"\n[loss]\nname = "mse"', "[data] needs inputs", "file = "),
        (
            '[data]\nfile = "a"\ninputs = [1]\n[loss]\nname = "mse"',
            "[data] inputs must be a tensor's name or a list of names",
            "[1]",
        ),
        ("checkpoint = 3\n" + GOOD, "checkpoint must be a path in quotes", "3"),
        ("model = 3\n" + _loss('name = "mse"'), "[model] must be a table", "3"),
        ("[model]\n" + _loss('name = "mse"'), "[model] factory is missing", "no such key"),
        ('[data]\nfactory = "d:f"', "[loss] is missing", "no such table"),
        (_loss('name = "mae"'), "[loss] name must be 'cross_entropy', 'mse'", "'mae'"),
        (_loss('name = "mse"\nstep = "a:b"'), "[loss] needs exactly one of", "name and step"),
        (_loss('name = "mse"\nlabel_smoothing = 0.1'), "[loss] has label_smoothing", "mse"),
        (_loss('name = "nll"\nlabel_smoothing = 0.1'), "[loss] has label_smoothing", "nll"),
        (_loss('step = "a:b"\npos_weight = [1]'), "[loss] has pos_weight", "step"),
        (_loss('name = "mse"\nkwargs = {a = 1}'), "[loss] has kwargs", "'mse'"),
        (_loss('name = "mse"\nweight_decay = -1'), "[loss] weight_decay must be at least 0", "-1"),
        (_loss('name = "mse"\nweight_decay = nan'), "[loss] weight_decay must be", "nan"),
        (_loss('name = "nll"\nclass_weights = [1, "a"]'), "[loss] class_weights[1] must be", "'a'"),
        (_loss('name = "nll"\nclass_weights = []'), "[loss] class_weights must not be empty", "[]"),
        (_loss('name = "mse"') + 'path = "x"', "[loss] path is not a key", "'path'"),
        ('path = "x"\n' + GOOD, "path is not a key", "'path'"),
    ],
)
def test_refusals(tmp_path: Path, text: str, what: str, got: str) -> None:
    error = _refusal(tmp_path, text)
    assert error.what.startswith(what)
    assert got in error.got


@pytest.mark.parametrize(
    ("text", "close"),
    [
        (_data("batchsize = 3"), "batch_size"),
        (GOOD + '[held_uot]\nfactory = "d:f"', "held_out"),
        ('[modle]\nfactory = "d:f"\n' + _loss('name = "mse"'), "model"),
        ('[model]\nfactry = "d:f"\n' + _loss('name = "mse"'), "factory"),
    ],
)
def test_mistyped_keys_come_first_and_name_the_near_one(
    tmp_path: Path, text: str, close: str
) -> None:
    error = _refusal(tmp_path, text)
    assert "is not a key" in error.what
    assert f"did you mean '{close}'?" in error.hint


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    error = _refusal(tmp_path, _data('batch_size = "a"\nunseen = 3\nbatchsize = 1'))
    assert "2 more: [data] batch_size must be a whole number; [data] unseen must" in error.got


def test_every_option_goes_with_a_loss(tmp_path: Path) -> None:
    for lines in (
        'name = "cross_entropy"\nlabel_smoothing = 0.1\nignore_index = -1\nclass_weights = [1]',
        'name = "nll"\nignore_index = 0\nclass_weights = [1]',
        'name = "language_model"\nlabel_smoothing = 0.1',
        'name = "bce_with_logits"\npos_weight = [3]',
        'factory = "losses:fn"\nkwargs = { margin = 1 }',
        'name = "huggingface"\nweight_decay = 1e-2',
    ):
        assert _write(tmp_path, _loss(lines))


def test_syntax_errors_have_a_line(tmp_path: Path) -> None:
    error = _refusal(tmp_path, '[data]\nfactory = d:f"\n')
    assert error.what == "the spec is not valid TOML"
    assert "line 2, column 11" in error.got


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000,
        "a = " + "{b = " * 3000,
        "a." * 5000 + "a = 1",
        "[" + "a ." * 5000 + "a]",
        '"a". ' * 5000 + "a = 1",
        "'a,'." * 5000 + "a = 1",
    ],
)
def test_depth_without_end_is_refused_before_it_costs_anything(tmp_path: Path, text: str) -> None:
    tracemalloc.start()
    assert "nested too deeply" in _refusal(tmp_path, text).what
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20  # it was 100 MB for the square of 5,000 references


def test_dots_that_are_no_keys_are_no_depth(tmp_path: Path) -> None:
    dots = "." * 100
    lines = f"kwargs = {{ a = \"{dots}\", b = '{dots}', c = [{'1.5, ' * 100}] }}  # {dots}\n"
    spec = _write(tmp_path, GOOD.replace("kwargs = { width = 16, deep = { a = [1, 2] } }", lines))
    assert spec.model is not None
    assert len(spec.model.kwargs["c"]) == 100


@pytest.mark.parametrize("text", ["a = " + "9" * 5000, "x" * (2 << 20), "a = 1979-99-99"])
def test_what_the_parser_cannot_read_is_no_bug(tmp_path: Path, text: str) -> None:
    _refusal(tmp_path, text)


@pytest.mark.parametrize("line", ["ignore_index", "batch_size", "kwargs = { deep = { a"])
def test_numbers_that_do_not_fit_are_named(tmp_path: Path, line: str) -> None:
    table = "model" if "kwargs" in line else "data" if "batch" in line else "loss"
    closing = " } }" if "kwargs" in line else ""
    text = GOOD.replace("kwargs = { width = 16, deep = { a = [1, 2] } }", "")
    text = text.replace(f"[{table}]\n", f"[{table}]\n{line} = {2**63}{closing}\n")
    error = _refusal(tmp_path, text)
    assert "too large" in error.what
    assert str(2**63) in error.got


def test_the_home_of_nobody_is_named(tmp_path: Path) -> None:
    error = _refusal(tmp_path, GOOD.replace("sub/data", "~nosuchuser/data"))
    assert "~nosuchuser" in error.got


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "hesscli.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text"):
        read_spec(path)


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    beside.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    checkpoint = beside / "epoch.3.pt"
    checkpoint.touch()
    named = tmp_path / "named.toml"
    places = [named, beside / "epoch.3.toml", beside / "hesscli.toml", Path("hesscli.toml")]
    for place in places:
        place.touch()
    assert find_spec(checkpoint, named) == named
    for place in places[1:]:
        assert find_spec(checkpoint, None, trust=True) == place
        place.unlink()
    (here / "hesscli.toml").touch()
    assert find_spec(None, None) == Path("hesscli.toml")


def test_none_found_shows_one_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").touch()
    with pytest.raises(InputError) as caught:
        find_spec(Path("model.pt"), None)
    assert "model.toml, hesscli.toml" in caught.value.got
    assert "hesscli init model.pt" in caught.value.hint
    assert all(line in caught.value.hint for line in describe_example().splitlines())


def test_a_mistyped_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "run.toml").touch()
    (tmp_path / "model.pt").touch()
    with pytest.raises(InputError, match=r"spec not found(.|\n)*run\.toml"):
        find_spec(None, tmp_path / "rum.toml")
    with pytest.raises(InputError, match=r"checkpoint not found(.|\n)*model\.pt"):
        find_spec(tmp_path / "modle.pt", None)


def _folder(parent: Path, name: str, **files: str) -> Path:
    folder = parent / name
    folder.mkdir()
    for stem, text in files.items():
        (folder / f"{stem}.py").write_text(text)
    return folder


def test_each_folder_has_its_own_modules(tmp_path: Path) -> None:
    text = "import layers_t1\nclass Net:\n    kind = layers_t1.KIND\n"
    a = _folder(tmp_path, "a", net_t1=text, layers_t1="KIND = 'a'", only_a_t1="def f(): pass")
    b = _folder(tmp_path, "b", net_t1=text, layers_t1="KIND = 'b'", lazy_t1="import only_a_t1")
    before = list(sys.path)
    kinds = [load_factory("net_t1:Net.kind.upper", at, "[model] factory")() for at in (a, b, a)]
    assert kinds == ["A", "B", "A"]
    assert len(sys.path) <= len(before) + 2
    load_factory("only_a_t1:f", a, "[model] factory")
    with pytest.raises(InputError) as caught:  # what only the other folder has is not there
        load_factory("lazy_t1:f", b, "[model] factory")
    assert "only_a_t1" in caught.value.got


def test_a_module_of_the_same_folder_is_loaded_once(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "a", net_t2="class Net: pass\ndef data(): return Net()")
    first = load_factory("net_t2:Net", folder, "[model] factory")
    assert isinstance(load_factory("net_t2:data", folder, "[data] factory")(), first)


def test_installed_modules_are_found_after_the_folder(tmp_path: Path) -> None:
    import torch

    assert load_factory("torch.nn:Linear", tmp_path, "[model] factory") is torch.nn.Linear


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("net_t3", "does not name a callable"),
        ("net_t3:", "does not name a callable"),
        ("net t3:Net", "does not name a callable"),
        ("nett3:Net", "did you mean 'net_t3'"),
        ("net_t3:Ned", "did you mean 'Net'"),
        ("net_t3:width", "cannot be called"),
        ("net_t3.inner:Net", "names a module that is not there"),
        ("broken_t3:Net", "broken_t3.py:2 in <module>"),
        ("syntax_t3:Net", "syntax_t3.py:2 in <module>"),
        ("lacking_t3:Net", "No module named 'no_such_thing'"),
        ("leaving_t3:Net", "SystemExit: 3"),
    ],
)
def test_bad_references(tmp_path: Path, reference: str, words: str) -> None:
    folder = _folder(
        tmp_path,
        "a",
        net_t3="class Net: pass\nwidth = 3",
        broken_t3="x = 1\nraise ValueError('no weights here')",
        syntax_t3="x = 1\nif x\n",
        lacking_t3="import no_such_thing",
        leaving_t3="import sys\nsys.exit(3)",
    )
    with pytest.raises(InputError) as caught:
        load_factory(reference, folder, "[model] factory")
    assert words in str(caught.value)
    assert caught.value.what.startswith("[model] factory")


def test_calls_show_the_users_frames_only(tmp_path: Path) -> None:
    text = "import torch\ndef make(width=3):\n    return inner(width)\n"
    text += "def inner(width):\n    return torch.zeros(width).reshape(7)\n"
    make = load_factory("net_t4:make", _folder(tmp_path, "a", net_t4=text), "[model] factory")
    with pytest.raises(InputError) as caught:
        call_user(make, where="[model] factory", width=5)
    assert [frame.split("net_t4.py")[1] for frame in caught.value.frames] == [
        ":3 in make\n    return inner(width)",
        ":5 in inner\n    return torch.zeros(width).reshape(7)",
    ]
    with pytest.raises(InputError) as caught:
        call_user(make, where="[model] factory", widht=5)
    assert "unexpected keyword argument 'widht'" in caught.value.got
    assert "make(width=3)" in caught.value.hint
    assert caught.value.frames == ()


def test_ctrl_c_passes_through() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_user(interrupted, where="[data] factory")


def test_reading_a_spec_needs_no_torch() -> None:
    """`find_spec` and `read_spec` answer before the slow import."""
    code = "import sys, hesscli.problem.spec_places; sys.exit('torch' in sys.modules)"
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )
