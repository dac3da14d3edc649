"""Checkpoints: every format that people have, strict names, and nothing run untrusted."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import fractions
import hashlib
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Net, same_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from hesscli.errors import ExitCode, InputError
from hesscli.problem.checkpoint import read_checkpoint
from hesscli.problem.precision import as_wide


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


class Payload:
    """What a hostile pickle does: run code while it is read. Here it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pathlib.Path.touch, (self.target,)


def _refusal(path: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read_checkpoint(path, **options)
    assert caught.value.exit_code == ExitCode.INPUT
    assert path.name in caught.value.got
    return caught.value


def chosen_key(error: InputError) -> str:
    """What the line of a hint, put into a spec, would choose."""
    line = next(part for part in error.hint.split(": ") if "checkpoint_keys" in part)
    key: str = tomllib.loads(line)["checkpoint_keys"]["key"]
    return key


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.ckpt"])
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_torch_files(tmp_path: Path, net: Net, name: str, as_zip: bool) -> None:
    path = tmp_path / name
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=as_zip)
    read = read_checkpoint(path)
    assert same_weights(read, net)
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (read.path, read.module, read.notes) == (path, None, ())


def test_a_packed_zip_is_not_mapped(tmp_path: Path, net: Net) -> None:
    """Compressed members, mapped as they lie, would load as noise without any error."""
    torch.save(net.state_dict(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert same_weights(read_checkpoint(tmp_path / "b.pt"), net)


def test_the_state_outlives_its_file(tmp_path: Path, net: Net) -> None:
    path = tmp_path / "m.pt"
    torch.save(net.state_dict(), path)
    read = read_checkpoint(path)
    path.unlink()
    assert same_weights(read, net)


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "loss": torch.tensor(0.5)},
        lambda state: {"model_state": state},
        lambda state: {"model_state_dict": state, "rng_state": torch.get_rng_state()},
        lambda state: {"net": state, "norm": {"mean": torch.zeros(3)}},
        lambda state: {"network": {"state_dict": state, "step": torch.tensor(4)}},
        lambda state: {"params": state, "weights_only": True},
        lambda state: {"my_classifier": state},
        lambda state: {"module": state, "lr_scheduler": {"base": torch.zeros(2)}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {name.replace("conv.", "conv._orig_mod."): v for name, v in state.items()},
    ],
)
def test_nested_and_prefixed(tmp_path: Path, net: Net, nest: Callable[[Any], Any]) -> None:
    torch.save(nest(net.state_dict()), tmp_path / "m.pt")
    assert same_weights(read_checkpoint(tmp_path / "m.pt"), net)


def test_optimizer_tensors_are_not_the_model(tmp_path: Path, net: Net) -> None:
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    # Under a telling name, and under one that tells nothing.
    for extra in ({"optimizer": state}, {"second": state}, {"optim_states": {"adam": state}}):
        torch.save({"weird_name": net.state_dict(), **extra}, tmp_path / "m.pt")
        assert same_weights(read_checkpoint(tmp_path / "m.pt"), net)
    torch.save({"optimizer": state}, tmp_path / "m.pt")
    assert "holds no named tensors" in _refusal(tmp_path / "m.pt").what


def test_averages_are_never_chosen(tmp_path: Path, net: Net) -> None:
    other = Net().state_dict()
    for name in ("ema", "model_ema", "ema_state_dict", "params_ema", "swa.model"):
        torch.save({name: other, "model": net.state_dict()}, tmp_path / "m.pt")
        read = read_checkpoint(tmp_path / "m.pt")
        assert same_weights(read, net)
        assert read.notes == (f"averaged weights left aside: {name}",)
    torch.save({"ema": other}, tmp_path / "m.pt")
    error = _refusal(tmp_path / "m.pt")
    assert "only averaged" in error.what
    read = read_checkpoint(tmp_path / "m.pt", key=chosen_key(error))
    assert all(torch.equal(read.state[name], value) for name, value in other.items())


def test_several_models_are_not_chosen_between(tmp_path: Path, net: Net) -> None:
    torch.save({"generator": net.state_dict(), "critic": net.state_dict()}, tmp_path / "m.pt")
    error = _refusal(tmp_path / "m.pt")
    assert "several sets of weights" in error.what
    assert "generator, critic" in error.got


@pytest.mark.parametrize("key", ["state_dict_ema", "average.model", "net.G"])
def test_a_set_of_weights_goes_by_its_name(tmp_path: Path, net: Net, key: str) -> None:
    payload: dict[str, Any] = {"state_dict": Net().state_dict()}
    inner = payload
    *outer, last = key.split(".") if key != "net.G" else [key]
    for part in outer:
        inner = inner.setdefault(part, {})
    inner[last] = net.state_dict()
    torch.save(payload, tmp_path / "m.pt")
    read = read_checkpoint(tmp_path / "m.pt", key=key)
    assert same_weights(read, net)
    assert read.notes == ()
    error = _refusal(tmp_path / "m.pt", key=key + "x")
    assert chosen_key(error) == key


def test_a_file_of_one_set_takes_no_key(tmp_path: Path, net: Net) -> None:
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    assert "one set" in _refusal(tmp_path / "m.safetensors", key="model").what


def test_dictionaries_that_share_dictionaries_are_seen_once(tmp_path: Path, net: Net) -> None:
    """A thousand keys for one dictionary, three deep: a thousand million places, in 40 KB."""
    held: Any = net.state_dict()
    for _ in range(3):
        held = dict.fromkeys(map(str, range(1000)), held)
    torch.save(held, tmp_path / "m.pt")
    assert same_weights(read_checkpoint(tmp_path / "m.pt"), net)


def test_plain_values_beside_the_weights(tmp_path: Path, net: Net) -> None:
    history = collections.defaultdict(list)
    history["loss"].append(np.float32(0.5))
    plain = {
        "args": argparse.Namespace(lr=0.1, out=Path("runs"), device=torch.device("cpu")),
        "paths": [pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:/b")],
        "when": [
            datetime.datetime.now(datetime.UTC),
            datetime.date(2024, 1, 2),
            datetime.timedelta(seconds=3),
        ],
        "history": history,
        "counts": collections.Counter("aab"),
        "numpy": [np.float64(1.5), np.int64(3), np.arange(6.0).reshape(2, 3), np.dtype("f4")],
        "rng": np.random.RandomState(0).get_state(),
        "dtype": np.float32,
        "names": np.array(["a", "b"], dtype=object),
    }
    for as_zip in (True, False):
        path = tmp_path / f"{as_zip}.pt"
        torch.save(
            {"model": net.state_dict(), **plain}, path, _use_new_zipfile_serialization=as_zip
        )
        assert same_weights(read_checkpoint(path), net)


def test_other_globals_are_refused_by_name(tmp_path: Path, net: Net) -> None:
    for value, name in ((fractions.Fraction(1, 2), "fractions.Fraction"), (os.getpid, "getpid")):
        torch.save({"model": net.state_dict(), "x": value}, tmp_path / "m.pt")
        error = _refusal(tmp_path / "m.pt")
        assert name in error.what
        assert "--trust" in error.hint
    torch.save(net, tmp_path / "m.pt")
    assert "networks.Net" in _refusal(tmp_path / "m.pt").what
    torch.save({"model": net.state_dict()}, tmp_path / "m.pt", pickle_protocol=5)
    assert "full unpickling" in _refusal(tmp_path / "m.pt").what
    assert read_checkpoint(tmp_path / "m.pt", trust=True).module is None


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_a_planted_pickle_does_not_run(tmp_path: Path, net: Net, as_zip: bool) -> None:
    path, marker = tmp_path / "m.pt", tmp_path / "marker"
    content = {"model": net.state_dict(), "x": Payload(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    _refusal(path)
    assert not marker.exists()
    read_checkpoint(path, trust=True)
    assert marker.exists(), "the payload must work, or its absence above proves nothing"


def test_a_bare_pickle_does_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "m.pt", tmp_path / "marker"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(Payload(marker), protocol=protocol))
        _refusal(path)
        assert not marker.exists()


def test_a_trusted_module_is_the_model(tmp_path: Path, net: Net) -> None:
    torch.save({"model": net, "epoch": 3}, tmp_path / "m.pt")
    read = read_checkpoint(tmp_path / "m.pt", trust=True)
    assert isinstance(read.module, Net)
    assert same_weights(read, net)


def test_a_trusted_module_whose_class_is_gone(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom torch import nn\nclass Gone(nn.Linear): pass\n"
        "torch.save(Gone(2, 2), sys.argv[1])"
    )
    path = tmp_path / "m.pt"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    with pytest.raises(InputError, match="Gone") as caught:
        read_checkpoint(path, trust=True)
    assert "state_dict" in caught.value.hint


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "m.pt")
    for trust in (False, True):
        error = _refusal(tmp_path / "m.pt", trust=trust)
        assert "TorchScript" in error.what
        assert "torch.jit.load('m.pt').state_dict()" in error.hint


BATCH = {"x": {0: torch.export.Dim("batch")}}


def _export(path: Path, net: Net, shapes: Any = BATCH) -> None:
    x = torch.zeros(4, 1, 8, 8)
    torch.export.save(torch.export.export(net.eval(), (x,), dynamic_shapes=shapes), path)


def test_a_trusted_program_is_the_model(tmp_path: Path, net: Net) -> None:
    path, x = tmp_path / "m.pt2", torch.randn(7, 1, 8, 8)
    _export(path, net)
    read = read_checkpoint(path, trust=True)
    assert read.module is not None
    assert torch.equal(read.module(x), net(x))
    assert read.state.keys() == net.state_dict().keys()
    assert "--trust" in _refusal(path).hint


def test_a_program_with_a_planted_payload_does_not_run(tmp_path: Path, net: Net) -> None:
    marker = tmp_path / "marker"
    _export(tmp_path / "good.pt2", net)
    torch.save((Payload(marker),), tmp_path / "payload")
    # Under its own name and under one that promises weights alone.
    for name in ("bad.pt2", "bad.pt"):
        with (
            zipfile.ZipFile(tmp_path / "good.pt2") as source,
            zipfile.ZipFile(tmp_path / name, "w") as target,
        ):
            for member in source.namelist():
                planted = "sample_inputs" in member
                data = (tmp_path / "payload").read_bytes() if planted else source.read(member)
                target.writestr(member, data)
        assert "can run code" in _refusal(tmp_path / name).what
        assert not marker.exists()
    # What the payload gives in place of inputs may be of no use to torch.
    with contextlib.suppress(InputError):
        read_checkpoint(tmp_path / "bad.pt2", trust=True)
    assert marker.exists(), "the payload must work, or its absence above proves nothing"


def test_a_fixed_batch_is_refused_with_the_line_to_use(tmp_path: Path, net: Net) -> None:
    _export(tmp_path / "m.pt2", net, shapes=None)
    error = _refusal(tmp_path / "m.pt2", trust=True)
    assert 'dynamic_shapes={"x": {0: torch.export.Dim("batch")}}' in error.hint
    assert "x [4, 1, 8, 8]" in error.got


def test_broken_programs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.pt2").write_bytes(b"nothing")
    assert "not a zip" in _refusal(tmp_path / "a.pt2", trust=True).got
    with zipfile.ZipFile(tmp_path / "b.pt2", "w") as archive:
        archive.writestr("b/archive_format", "pt2")
    with pytest.raises(InputError, match="cannot be loaded"):
        read_checkpoint(tmp_path / "b.pt2", trust=True)
    assert "Traceback" not in capfd.readouterr().err


def test_safetensors(tmp_path: Path, net: Net) -> None:
    path = tmp_path / "m.safetensors"
    save_file(net.state_dict(), path)
    assert same_weights(read_checkpoint(path), net)
    assert read_checkpoint(tmp_path).path == path
    path.rename(tmp_path / "m.pt")  # the content decides
    assert same_weights(read_checkpoint(tmp_path / "m.pt"), net)
    (tmp_path / "m.safetensors").write_bytes((tmp_path / "m.pt").read_bytes()[:-5])
    assert "not a whole" in _refusal(tmp_path / "m.safetensors").what


def _save_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    parts = {"b.safetensors": {}, "a.safetensors": {}}
    for place, (name, value) in enumerate(state.items()):
        parts[["b.safetensors", "a.safetensors"][place % 2]][name] = value
    for name, part in parts.items():
        save_file(part, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f for f in parts for n in parts[f]}}))
    return index


def test_shards(tmp_path: Path, net: Net) -> None:
    index = _save_shards(tmp_path, net.state_dict())
    read = read_checkpoint(tmp_path)
    assert (read.path, read.state.keys()) == (index, net.state_dict().keys())
    assert same_weights(read_checkpoint(index), net)
    files = (index, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    expected = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert read.sha256 == expected
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard .* is missing(.|\n)*b\.safetensors"):
        read_checkpoint(index)


def test_shards_of_torch_files(tmp_path: Path, net: Net) -> None:
    state = net.state_dict()
    files = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        part = {name: value for name, value in state.items() if files[name] == file}
        torch.save(part, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    for path in (tmp_path, index):
        assert same_weights(read_checkpoint(path), net)
    payload = Payload(tmp_path / "marker")
    torch.save({"conv.bias": payload}, tmp_path / files["conv.bias"])
    with pytest.raises(InputError, match="needs code"):
        read_checkpoint(index)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "[" + "1," * 500_000 + "1]", "9" * 10_000]
)
def test_an_index_that_would_exhaust_its_reader(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "not an index" in _refusal(tmp_path / "model.safetensors.index.json").what


def test_bad_indices(tmp_path: Path, net: Net) -> None:
    index = _save_shards(tmp_path, net.state_dict())
    weights = json.loads(index.read_text())["weight_map"]
    for outside in ("../b.safetensors", str(tmp_path / "b.safetensors")):
        index.write_text(json.dumps({"weight_map": {**weights, "conv.bias": outside}}))
        assert "outside its folder" in _refusal(index).what
    index.write_text(json.dumps({"weight_map": {**weights, "ghost": "b.safetensors"}}))
    with pytest.raises(InputError, match="ghost"):
        read_checkpoint(index)
    for text in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        assert "not an index" in _refusal(index).what


def test_folders(tmp_path: Path, net: Net) -> None:
    (tmp_path / "notes.txt").touch()
    assert "notes.txt" in _refusal(tmp_path).got
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    save_file(net.state_dict(), tmp_path / "b.safetensors")
    assert "a.safetensors, b.safetensors" in _refusal(tmp_path).got


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (bytes(range(255, 127, -1)) * 9, "begins with"),
        (b"\x80" + bytes(range(256)), "torch.save did not write"),
        (b"PK\x03\x04" + bytes(500), "cut short"),
        (b"\n<!DOCTYPE html><html></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (pickle.dumps({"a": 1}, protocol=2), "torch.save did not write"),
        (pickle.dumps([1.5] * 9, protocol=4), "torch.save did not write"),
        (b"\x0a\x00\x00\x00\x00\x00\x00\x00{not json}", "not a whole .safetensors"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    assert words in str(_refusal(path))
    with pytest.raises(InputError):  # perhaps in other words
        read_checkpoint(path, trust=True)


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", a=np.zeros(3))
    assert "a.npy" in _refusal(tmp_path / "m.npz").got


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_truncated(tmp_path: Path, net: Net, as_zip: bool) -> None:
    path = tmp_path / "m.pt"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=as_zip)
    whole = path.read_bytes()
    for kept in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        _refusal(path)
        with pytest.raises(InputError):
            read_checkpoint(path, trust=True)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_indices_out_of_bounds_are_refused(tmp_path: Path, layout: torch.layout) -> None:
    """Made dense, such a tensor would write to memory that is not its own."""
    inside, outside = torch.tensor([0]), torch.tensor([10**9])
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        if layout is torch.sparse_coo:
            place = torch.stack([outside, inside])
            bad = torch.sparse_coo_tensor(place, torch.ones(1), (3, 6), is_coalesced=True)
        else:
            rows = torch.tensor([0, 1, 1, 1])
            bad = torch.sparse_csr_tensor(rows, outside, torch.ones(1), (3, 6))
        torch.save({"weight": bad, "bias": torch.zeros(3)}, tmp_path / "m.pt")
    _refusal(tmp_path / "m.pt")


# What torch.save wrote has checksums.


def test_a_flipped_bit_is_found(tmp_path: Path, net: Net) -> None:
    """In what is stored of every member, wherever; its checksum comes from the zip format."""
    path = tmp_path / "m.pt"
    torch.save(net.state_dict(), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    draw = np.random.default_rng(0)
    for member in members:
        # The local header has 30 bytes, then the name and what else it keeps, of these lengths.
        name, extra = struct.unpack_from("<HH", whole, member.header_offset + 26)
        start = member.header_offset + 30 + name + extra
        broken = bytearray(whole)
        broken[start + int(draw.integers(member.file_size))] ^= 1 << int(draw.integers(8))
        path.write_bytes(broken)
        assert "CRC" in _refusal(path).got
        assert "damaged" in _refusal(path, trust=True).what


def test_a_file_without_checksums_is_said_to_be_one(tmp_path: Path, net: Net) -> None:
    path = tmp_path / "m.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(net.state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    read = read_checkpoint(path)
    assert same_weights(read, net)
    assert "without checksums" in read.notes[0]


@pytest.mark.parametrize(
    ("mark", "offset", "value"),
    [
        (b"PK\x01\x02", 6, 64),  # a version of the format that is to come
        (b"PK\x01\x02", 8, 1),  # encrypted
        (b"PK\x01\x02", 10, 99),  # packed in no known way
        (b"PK\x03\x04", 2, 9),  # no local header
        (b"PK\x01\x02", 42, 77),  # which is elsewhere
        (b"PK\x06\x07", 4, 9),  # on another disk
        (b"PK\x06\x07", 16, 9),  # one of several
    ],
)
def test_a_damaged_directory_is_no_bug(
    tmp_path: Path, net: Net, mark: bytes, offset: int, value: int
) -> None:
    path = tmp_path / "m.pt"
    torch.save(net.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[content.index(mark) + offset] = value
    path.write_bytes(content)
    for trust in (False, True):
        _refusal(path, trust=trust)


def test_what_unpacks_to_far_more_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 25)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert (tmp_path / "b.pt").stat().st_size < 1 << 20
    assert "packed too tightly" in _refusal(tmp_path / "b.pt").what


def test_missing(tmp_path: Path) -> None:
    (tmp_path / "model_final.pt").touch()
    error = _refusal(tmp_path / "modelfinal.pt")
    assert error.what == "checkpoint not found"
    assert "model_final.pt" in error.hint
    assert "no folder" in _refusal(tmp_path / "nowhere" / "m.pt").hint


def test_the_type_to_analyse_weights_in(net: Net) -> None:
    state = net.state_dict()
    assert as_wide(state.values()) == torch.float32
    assert as_wide(net.half().state_dict().values()) == torch.float32
    double = dict(net.double().state_dict())
    assert as_wide(double.values()) == torch.float64
    assert as_wide([*double.values(), torch.zeros(2)]) == torch.float64
    assert as_wide([]) == torch.float32
