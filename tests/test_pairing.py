"""A root for autograd does what weights handed to autograd do."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscli.pairing import paired, weightless


def tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Leaves, two outputs of them of different shapes, and weights; float64."""
    torch.manual_seed(0)
    leaves = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 2)]
    outputs = [leaves[0].outer(leaves[1]).tanh(), leaves[1].exp()]
    weights = [torch.randn_like(output, requires_grad=True) for output in outputs]
    return leaves, outputs, weights


def test_its_gradient_is_that_of_the_inner_product() -> None:
    leaves, outputs, weights = tensors()
    true = torch.autograd.grad(outputs, leaves, weights, retain_graph=True)
    for _ in range(2):  # the outputs' graph is kept where that is asked for
        found = torch.autograd.grad(paired(outputs, weights), leaves, retain_graph=True)
        assert all(map(torch.equal, found, true))


def test_its_gradient_is_linear_in_the_weights_to_autograd() -> None:
    leaves, outputs, weights = tensors()
    pulled = torch.autograd.grad(paired(outputs, weights), leaves, create_graph=True)
    vectors = [torch.randn_like(leaf) for leaf in leaves]
    pushed = torch.autograd.grad(paired(pulled, vectors), weights)
    jacobian = torch.func.jvp(
        lambda a, b: (a.outer(b).tanh(), b.exp()),
        tuple(leaf.detach() for leaf in leaves),
        tuple(vectors),
    )[1]
    for found, true in zip(pushed, jacobian, strict=True):
        assert torch.allclose(found, true, rtol=1e-14)  # a few roundings of numbers of order 1


def test_outputs_that_a_tensor_does_not_reach_are_unused() -> None:
    leaves, outputs, weights = tensors()
    first, second = torch.autograd.grad(paired(outputs[1:], weights[1:]), leaves, allow_unused=True)
    assert first is None
    assert second is not None
    assert torch.allclose(second, weights[1] * leaves[1].exp(), rtol=1e-15)


def test_what_stands_for_outputs_leads_to_the_same_gradients_and_has_no_values() -> None:
    leaves, outputs, weights = tensors()
    true = torch.autograd.grad(outputs, leaves, weights, retain_graph=True)
    standing = weightless(outputs)
    assert [output.untyped_storage().nbytes() for output in standing] == [8, 8]
    del outputs
    for _ in range(2):
        found = torch.autograd.grad(paired(standing, weights), leaves, retain_graph=True)
        assert all(map(torch.equal, found, true))
