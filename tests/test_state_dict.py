"""From a checkpoint's names to a model's: what fits, nearly fits, is left aside, or is refused."""

from __future__ import annotations

import collections
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from networks import Net, Tied, same_weights
from safetensors.torch import save_file
from torch import Tensor, nn

import hesscli
from hesscli.errors import InputError, UnsoundError
from hesscli.problem.checkpoint import Checkpoint, read_checkpoint
from hesscli.problem.state_dict import load_state


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def _checkpoint(state: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(Path("m.pt"), "", state)


def test_loading_copies(net: Net) -> None:
    state = {name: value.clone() for name, value in net.state_dict().items()}
    model = Net()
    load_state(model, _checkpoint(state))
    assert same_weights(_checkpoint(state), model)
    model.head.weight.data.zero_()
    assert state["head.weight"].abs().sum() > 0


def test_loading_keeps_the_models_precision(net: Net) -> None:
    half = {name: v.half() if v.is_floating_point() else v for name, v in net.state_dict().items()}
    model = Net().double()
    load_state(model, _checkpoint(half))
    assert torch.equal(model.head.weight, half["head.weight"].double())


def test_wrapped_models_take_plain_weights(net: Net) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Net()

    wrapped = Wrapper()
    load_state(wrapped, _checkpoint(net.state_dict()))
    assert same_weights(_checkpoint(net.state_dict()), wrapped.module)


def test_every_mismatch_is_named(net: Net) -> None:
    state = dict(net.state_dict())
    state["head.weight"] = torch.zeros(3, 80)
    state["head.bias"] = torch.zeros(3, dtype=torch.int64)
    state["extra"] = torch.zeros(2)
    del state["conv.weight"]
    with pytest.raises(InputError) as caught:
        load_state(Net(), _checkpoint(state))
    for words in (
        "1 missing: conv.weight [2, 1, 3, 3]",
        "1 unexpected: extra [2]",
        "2 misshapen: head.weight float32 [3, 80], expected float32 [3, 72]",
        "head.bias int64 [3], expected float32 [3]",
    ):
        assert words in caught.value.got


def test_long_lists_are_cut() -> None:
    layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    with pytest.raises(
        InputError, match=r"12 missing: 0\.weight .*, 2\.weight \[2, 2\] and 7 more"
    ):
        load_state(layers, _checkpoint({}))


def _cure(error: InputError) -> dict[str, Any]:
    """What the line of a hint, put into a spec, would set."""
    line = error.hint.split(": ", 2)[1].split("; else")[0]
    keys: dict[str, Any] = tomllib.loads(line)["checkpoint_keys"]
    return keys


@pytest.mark.parametrize("prefix", ["model.", "encoder.model.", "module."])
@pytest.mark.parametrize("beside", [{}, {"n_averaged": torch.tensor(3)}])
def test_a_common_prefix_is_found_and_said(
    net: Net, prefix: str, beside: dict[str, Tensor]
) -> None:
    state = {f"{prefix}{name}": value for name, value in net.state_dict().items()}
    model = Net()
    said = load_state(model, _checkpoint(state | beside)).notes
    assert same_weights(_checkpoint(net.state_dict()), model)
    assert repr(prefix) in said[0]
    assert [note for note in said[1:] if "n_averaged" in note] == list(said[1:])
    assert len(said) == 1 + len(beside)


@pytest.mark.parametrize(
    "stray",
    [
        {"criterion.weight": torch.ones(3)},
        {"ema_model.conv.weight": torch.ones(2, 1, 3, 3), "loss.scale": torch.ones(1)},
        {"temperature": torch.ones(())},
        {"blocks[0]*.w": torch.ones(1)},
    ],
)
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_what_may_be_weights_is_refused_and_the_hint_cures_it(
    net: Net, prefix: str, stray: dict[str, Tensor]
) -> None:
    state = {f"{prefix}{name}": value for name, value in net.state_dict().items()} | stray
    with pytest.raises(InputError) as caught:
        load_state(Net(), _checkpoint(state))
    assert all(name in caught.value.got for name in stray)
    assert repr(prefix) in caught.value.got or not prefix
    model = Net()
    assert load_state(model, _checkpoint(state), **_cure(caught.value)).notes == ()
    assert same_weights(_checkpoint(net.state_dict()), model)


def test_an_average_of_the_whole_model_is_not_taken_for_it(net: Net) -> None:
    state = {f"ema.{name}": value + 1 for name, value in net.state_dict().items()}
    state |= {f"model.{name}": value for name, value in net.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_state(Net(), _checkpoint(state))
    model = Net()
    load_state(model, _checkpoint(state), **_cure(caught.value))
    assert same_weights(_checkpoint(net.state_dict()), model)


@pytest.mark.parametrize(
    "unused",
    [
        {"embeddings.position_ids": torch.arange(8)[None]},
        {"attention.bias": torch.ones(4, 4, dtype=torch.bool)},
        {"total_ops": torch.zeros(1), "head.total_params": torch.zeros(1)},
        {"rotary.inv_freq": torch.ones(4)},
    ],
)
def test_unused_buffers_are_left_aside_and_said(net: Net, unused: dict[str, Tensor]) -> None:
    model = Net()
    (said,) = load_state(model, _checkpoint(dict(net.state_dict()) | unused)).notes
    assert same_weights(_checkpoint(net.state_dict()), model)
    assert all(name in said for name in unused)


def test_statistics_that_the_model_would_not_use_are_refused(net: Net) -> None:
    """In floating point, they change the function: batch norm by the batch is another one."""
    model = Net()
    model.norm = nn.BatchNorm2d(2, track_running_stats=False)
    with pytest.raises(InputError, match=r"norm\.running_mean"):
        load_state(model, _checkpoint(net.state_dict()))


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
)
def test_wrappers_inside_names(tmp_path: Path, net: Net, wrapper: str) -> None:
    state = {n.replace("conv.", f"conv.{wrapper}."): v for n, v in net.state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    assert same_weights(read_checkpoint(tmp_path / "m.pt"), net)
    double = state | {"conv.weight": torch.zeros(2, 1, 3, 3)}
    torch.save(double, tmp_path / "m.pt")
    with pytest.raises(InputError):  # neither of the two is dropped in silence
        load_state(Net(), read_checkpoint(tmp_path / "m.pt"))


def test_the_pattern_that_is_advised_spares_the_models_own_names() -> None:
    """Statistics lie beside weights that the model needs: "norm.*" would take both."""
    kept = nn.Sequential(collections.OrderedDict(norm=nn.BatchNorm1d(3)))
    without = nn.Sequential(
        collections.OrderedDict(norm=nn.BatchNorm1d(3, track_running_stats=False))
    )
    state = {name: value + 1 for name, value in kept.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_state(without, _checkpoint(state))
    load_state(without, _checkpoint(state), **_cure(caught.value))
    assert torch.equal(without.norm.weight, state["norm.weight"])  # type: ignore[union-attr]


def _pruned(net: Net) -> dict[str, Tensor]:
    nn.utils.prune.l1_unstructured(net.head, "weight", 0.5)
    return net.state_dict()


def _normed(net: Net) -> dict[str, Tensor]:
    nn.utils.parametrizations.weight_norm(net.head)
    return net.state_dict()


def _flat(net: Net) -> dict[str, Tensor]:
    return {"_fsdp_wrapped_module._flat_param": torch.zeros(9)}


def _quantised(net: Net) -> dict[str, Tensor]:
    rest = {name: v for name, v in net.state_dict().items() if name != "head.weight"}
    return rest | {"head.scale": torch.ones(()), "head.zero_point": torch.tensor(0)}


@pytest.mark.parametrize(
    ("state", "cause"),
    [(_pruned, "pruned"), (_normed, "parametri"), (_flat, "FSDP"), (_quantised, "quantised")],
)
def test_files_of_a_kind_are_called_by_it(
    net: Net, state: Callable[[Net], dict[str, Tensor]], cause: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_state(Net(), _checkpoint(state(net)))
    assert cause in caught.value.what


def test_sparse_weights_become_dense_only_where_they_fit(net: Net) -> None:
    state = dict(net.state_dict())
    state["head.weight"] = state["head.weight"].to_sparse_coo()
    model = Net()
    load_state(model, _checkpoint(state))
    assert torch.equal(model.head.weight, net.head.weight)
    # Dense, this one would take 4 TB.
    state["head.weight"] = torch.sparse_coo_tensor(
        torch.zeros(2, 1, dtype=torch.long),
        torch.ones(1),
        (10**6, 10**6),
        check_invariants=True,
    )
    with pytest.raises(InputError, match="1000000, 1000000"):
        load_state(Net(), _checkpoint(state))


def test_a_prefix_that_is_none_and_one_that_is_too_much(net: Net) -> None:
    state = dict(net.state_dict())
    with pytest.raises(InputError, match="begins with 'body"):
        load_state(Net(), _checkpoint(state), strip="body.")
    with pytest.raises(InputError, match="two tensors"):
        load_state(Net(), _checkpoint(state | {"x.conv.bias": torch.zeros(2)}), strip="x.")


def test_the_models_own_prefix_is_told(net: Net) -> None:
    model = nn.Sequential(collections.OrderedDict(body=Net()))
    with pytest.raises(InputError) as caught:
        load_state(model, _checkpoint(net.state_dict()))
    assert "only the model's names begin with 'body.'" in caught.value.hint


def test_the_table_in_a_spec_reaches_the_weights(tmp_path: Path, net: Net) -> None:
    """Which set, which prefix and what to leave aside, from the file to the report."""
    state = {f"m.{name}": value for name, value in nn.Linear(6, 3).state_dict().items()}
    payload = {"plain": {}, "state_dict": {}, "state_dict_ema": {**state, "x": torch.ones(2)}}
    torch.save(payload | {"state_dict": dict.fromkeys(state, torch.ones(3))}, tmp_path / "m.pt")
    save_file({"x": torch.randn(8, 6), "y": torch.arange(8) % 3}, tmp_path / "d.safetensors")
    (tmp_path / "m.toml").write_text(
        "[checkpoint_keys]\n"
        'key = "state_dict_ema"\nstrip = "m."\nignore = ["x"]\n'
        '[model]\nfactory = "torch.nn:Linear"\nkwargs = {in_features = 6, out_features = 3}\n'
        '[data]\nfile = "d.safetensors"\ninputs = "x"\ntargets = "y"\n'
        '[loss]\nname = "cross_entropy"\n'
    )
    problem = hesscli.load(tmp_path / "m.pt", spec=tmp_path / "m.toml")
    assert torch.equal(problem.model.weight, state["m.weight"])
    assert problem.warnings == ()


def test_tied_weights_need_one_name(tmp_path: Path) -> None:
    for kept in ("embed.weight", "head.weight"):
        value = torch.randn(5, 4)
        model = Tied()
        load_state(model, _checkpoint({kept: value}))
        assert torch.equal(model.head.weight, value)
        assert model.head.weight is model.embed.weight
    with pytest.raises(InputError, match="ties weights that differ"):
        load_state(Tied(), _checkpoint({"embed.weight": value, "head.weight": value + 1}))
    with pytest.raises(InputError, match="2 missing"):
        load_state(Tied(), _checkpoint({}))


def test_old_batch_norm_without_its_counter(net: Net) -> None:
    state = dict(net.state_dict())
    del state["norm.num_batches_tracked"]
    load_state(Net(), _checkpoint(state))


def test_weights_that_are_not_finite(net: Net) -> None:
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["head.weight"][0, :2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(UnsoundError, match=r"head\.weight \(2 of 216\)"):
        load_state(Net(), _checkpoint(state))


def test_overflow_in_the_models_precision_is_not_finite(net: Net) -> None:
    state = {name: value.clone().double() for name, value in net.state_dict().items()}
    state["norm.num_batches_tracked"] = torch.tensor(0)
    state["head.bias"][0] = 1e300
    with pytest.raises(UnsoundError, match=r"head\.bias \(1 of 3\)"):
        load_state(Net(), _checkpoint(state))


def test_a_mask_may_be_infinite() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    load_state(model, _checkpoint({k: v.clone() for k, v in model.state_dict().items()}))
