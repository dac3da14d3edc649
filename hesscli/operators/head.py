"""A softmax head's null directions: the same added to all logits is what no product may notice.

Where a linear layer's outcome is the logits, and its parameters are read nowhere else, adding one
vector to the weights of all classes leaves the loss of every batch as it is, and so 1 ⊗ e_j in the
null space of its Hessian, and of what is made of its outputs' derivatives, at any weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from hesscli.meter import FORWARD
from hesscli.operators.curvature import Curvature
from hesscli.operators.terms import Terms
from hesscli.operators.trials import MismatchError, Products, signs
from hesscli.parameters import Parameters
from hesscli.problem.losses import Loss
from hesscli.problem.named_losses import CrossEntropy, LanguageModel
from hesscli.problem.objective import Objective, Sample
from hesscli.problem.precision import tolerance
from hesscli.results import Check
from hesscli.torch_private import saved

_SOFTMAX: dict[type[Loss], int] = {CrossEntropy: 2, LanguageModel: 3}
"""Losses whose classes are the logits' last dimension, where these have so many of them."""
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class _Head:
    """Numbers of parameters ``(classes, ·)`` and ``(classes,)``, in the matrix's order."""

    numbers: tuple[int, ...]
    classes: int


def check_head(operator: Curvature, sample: Sample, found: Products) -> Check | None:
    """|n'Hv| / ‖Hv‖ of unit vectors n along which all logits get the same, v being signs.

    Args:
        operator: what made the products, of a problem in float64.
        sample: the examples.
        found: these products.

    Returns:
        None where the graph does not show a softmax head.

    Raises:
        MismatchError: it is above rounding.
    """
    head = _head_of(operator.problem, operator.parameters)
    if head is None:
        return None
    operator.meter.add(FORWARD, operator.problem.share_of(1))
    lengths = found.values.norm(dim=1).clamp_min(1e-300)
    places, value = operator.parameters.places(), 0.0
    for number in head.numbers:
        rows = found.values[:, places[number]].reshape(len(lengths), head.classes, -1)
        along = rows.sum(1).abs().amax(1) / head.classes**0.5
        value = max(value, float((along / lengths).max()))
    size, scale = operator.parameters.size**0.5, float(lengths.min())
    bound = tolerance(torch.float64) + _EPS * size / scale
    if not value <= bound:  # what cancels is rounded as it was before
        vector = signs(operator.problem, 0, operator.parameters)
        bound += Terms(operator, sample).rounding_of(vector, torch.float64) / scale
    if not value <= bound:
        names = ", ".join(operator.parameters[number].name for number in head.numbers)
        told = f"products notice what is added to all logits: {value:.1e} above {bound:.0e}"
        raise MismatchError(f"{told}, in {names}")
    return Check(
        name="softmax head",
        state="passed",
        detail="|n'Hv| / |Hv|, n adding the same to all logits",
        value=value,
        bound=bound,
    )


def _head_of(problem: Objective, parameters: Parameters) -> _Head | None:
    """The linear layer whose outcome the logits are, by the graph of one example."""
    if (dims := _SOFTMAX.get(type(problem.loss))) is None:  # a user's may have the same name
        return None
    with torch.enable_grad():
        logits = problem.outputs(problem.sample(1).data)
    node, classes = logits.grad_fn, logits.shape[-1]
    if logits.dim() != dims:
        return None
    while node is not None and node.name() in _VIEWS:
        if saved(node, "self_sym_sizes", (0,))[-1] != classes:
            return None
        node = node.next_functions[0][0]
    if node is None or node.name() not in ("AddmmBackward0", "MmBackward0"):
        return None
    turned, ends = node.next_functions[-1][0], list[Node | None]()
    if turned is not None:  # as it is where the weight is a constant
        if turned.name() != "TBackward0":
            return None
        ends.append(turned.next_functions[0][0])
    if node.name() == "AddmmBackward0":
        ends.append(node.next_functions[0][0])
    uses = Counter(source for each in _nodes(node) for source, _ in each.next_functions)
    own = {id(tensor): number for number, tensor in enumerate(parameters.tensors)}
    variables = [(uses[end], getattr(end, "variable", None)) for end in ends if end is not None]
    numbers = tuple(own[id(v)] for count, v in variables if count == 1 and id(v) in own)
    fitting = all(
        isinstance(v, Tensor) and v.shape[0] == classes and count == 1 for count, v in variables
    )
    return _Head(numbers, classes) if numbers and fitting else None


def _nodes(node: Node) -> Iterator[Node]:
    """All that a node's derivative comes from, and itself."""
    pending, entered = [node], {node}
    while pending:
        yield (one := pending.pop())
        new = {source for source, _ in one.next_functions if source is not None} - entered
        entered |= new
        pending += new
