"""What torch does not promise and hesscli uses: it is there, and does what is assumed of it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscli
from hesscli import torch_private
from hesscli.operators.per_example.sites import _padding

PACKAGE = Path(hesscli.__file__).parent
OF_TORCH = {
    *("_apply", "_base", "_buffers", "_indices", "_modules", "_orig_mod", "_parameters", "_values"),
    *("_version", "_grad", "_C", "_NormBase", "_BatchNorm"),
}
"""Attributes of torch's own objects that begin with an underscore."""


def private_names(tree: ast.AST) -> set[str]:
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            words = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            found |= {word for word in words if word.startswith("_")}
        elif isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not is_own and (node.attr in OF_TORCH or node.attr.startswith("_saved_")):
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("_saved_"):
            found.add(str(node.value))
    return found


def test_they_are_used_in_one_room() -> None:
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        names = private_names(ast.parse(path.read_text(encoding="utf-8")))
        if path.name == "torch_private.py":
            seen = len(names)
        else:
            assert not names, path
    assert seen >= 5


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_parameter("bias", None)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.mean


def test_what_a_module_holds_may_be_replaced() -> None:
    module = Held()
    parameters, buffers = torch_private.held_parameters(module), torch_private.held_buffers(module)
    assert set(parameters) == {"weight", "bias"}
    parameters["weight"] = torch.full((2,), 3.0)  # type: ignore[assignment]
    buffers["mean"] = torch.ones(2)
    assert module(torch.ones(2)).tolist() == [4.0, 4.0]


def test_all_tensors_are_replaced_complex_ones_by_choice() -> None:
    module = Held()
    module.register_buffer("phase", torch.ones(1, dtype=torch.complex64))
    torch_private.apply_to_tensors(module, lambda t: t if t.is_complex() else t.double())
    assert module.weight.dtype == module.mean.dtype == torch.float64
    assert module.phase.dtype == torch.complex64


def test_the_compiled_module_gives_back_its_own() -> None:
    module = Held()
    assert torch_private.uncompiled(module) is module
    assert torch_private.uncompiled(torch.compile(module, backend="eager")) is module


def test_code_knows_whether_it_is_transformed() -> None:
    seen: list[bool] = []

    def square(x: Tensor) -> Tensor:
        seen.append(torch_private.is_transformed())
        return (x * x).sum()

    x = torch.ones(2)
    square(x)
    torch.func.grad(square)(x)
    torch.func.vmap(square)(x[None])
    torch.func.jvp(square, (x,), (x,))
    square(x.requires_grad_()).backward()
    assert seen == [False, True, True, True, False]


def test_a_view_knows_its_memory() -> None:
    whole = torch.zeros(4)
    assert torch_private.viewed(whole[1:].view(3, 1)) is whole
    assert torch_private.viewed(whole) is whole


def test_the_parts_of_a_sparse_tensor() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    assert embedding.weight.grad is not None
    indices, values = torch_private.stored_parts(embedding.weight.grad)
    assert (indices.tolist(), tuple(values.shape)) == ([[1, 1, 3]], (3, 2))
    dense = torch.ones(3)
    assert torch_private.stored_parts(dense) == (dense,)
    assert torch_private.stored_parts(torch.eye(2).to_sparse_csr()) == ()


def test_operations_keep_their_arguments() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    softmax, size = x.log_softmax(1).grad_fn, x.abs().grad_fn
    assert softmax is not None
    assert size is not None
    assert torch_private.saved(softmax, "dim", None) % (1 << 64) == 1
    assert torch_private.saved(softmax, "nothing", "absent") == "absent"
    assert torch.equal(torch_private.saved(size, "self", None), x)
    for training in (True, False):
        norm = nn.functional.batch_norm(x, torch.zeros(4), torch.ones(4), training=training)
        assert norm.grad_fn is not None
        assert torch_private.saved(norm.grad_fn, "training", None) is training


def test_a_write_into_a_view_is_called_so() -> None:
    whole = torch.zeros(4, requires_grad=True) * 1
    whole[1:].mul_(2)
    assert whole.grad_fn is not None
    assert whole.grad_fn.name() == torch_private.COPY_SLICES


class Names(torch_private.TorchDispatchMode):
    """The operations that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_every_operation_is_dispatched() -> None:
    with Names() as seen:
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert "aten.mm.default" in seen.names


class Watched(Tensor):
    """A tensor whose every use is seen."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("seen")


def test_attributes_may_be_read_past_torch_functions() -> None:
    tensor = torch.ones(2).as_subclass(Watched)
    with pytest.raises(AssertionError, match="seen"):
        _ = tensor.grad_fn
    with torch_private.DisableTorchFunction():
        assert tensor.grad_fn is None


CONVOLUTIONS = [
    nn.Conv1d(2, 3, 4, padding="same", dilation=2),
    nn.Conv1d(2, 3, 4, padding=3, stride=2),
    nn.Conv2d(2, 3, (2, 5), padding="same", padding_mode="circular"),
    nn.Conv2d(2, 3, (3, 2), padding=(2, 1), padding_mode="reflect"),
    nn.Conv2d(2, 3, 2, padding="valid"),
    nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 2), padding_mode="replicate"),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_padding_is_what_convolutions_do(conv: nn.Module) -> None:
    """A convolution of the padded input that pads nothing itself is the same."""
    module: Any = conv
    torch.manual_seed(0)
    x = torch.randn(2, 2, *[7] * len(module.kernel_size))
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(x, _padding(module), mode)
    plain = getattr(nn.functional, f"conv{len(module.kernel_size)}d")
    found = plain(padded, module.weight, module.bias, module.stride, 0, module.dilation)
    torch.testing.assert_close(found, module(x))
