"""What optimizers refuse, or warn of: options, parameters and losses that cannot be meant."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hesscli.errors import UnsoundError, UsageError

Sums = dict[Tensor, Tensor]
"""Of some parameters, a tensor of the same shape."""


def require(name: str, value: object, holds: bool, hint: str) -> None:
    """See that an option can be meant.

    Raises:
        UsageError: it cannot.
    """
    if not holds:
        raise UsageError(f"{name} cannot be meant", repr(value), hint)


def require_own_numbers(tensors: list[Tensor]) -> None:
    """See that each parameter can be moved, and is once.

    Raises:
        UsageError: one cannot, or is there twice.
    """
    for tensor in tensors:
        if tensor.is_complex():
            raise UsageError("parameters must be real", str(tensor.dtype), "leave it out")
        if any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
            got = f"an expanded tensor of shape {tuple(tensor.shape)}"
            raise UsageError("entries of a parameter share memory", got, "its clone()")
    if len(set(tensors)) < len(tensors):
        got = f"{len(tensors)} tensors, and {len(set(tensors))} different ones"
        raise UsageError("a parameter is there twice", got, "list(dict.fromkeys(params))")


def require_reached(loss: Tensor, found: Sums) -> None:
    """See why a loss reaches only some parameters by ``autograd.grad``, or none.

    Raises:
        UnsoundError: there are parameters of which its graph does not tell.
        UsageError: it reaches none.
    """
    if any("CheckpointFunction" in node.name() for node in nodes_of([loss])):
        raise tells_backward_alone()
    if not found:
        raise UsageError(
            "the loss reaches none of the parameters",
            "a loss of others, or of a copy of these",
            "the optimizer of the model that the loss is computed with",
        )


def tells_backward_alone() -> UnsoundError:
    """Of ``torch.utils.checkpoint`` as it was at first."""
    return UnsoundError(
        "a part of the model tells of its parameters to loss.backward() alone",
        "torch.utils.checkpoint with use_reentrant=True",
        "use_reentrant=False; in transformers "
        'gradient_checkpointing_enable({"use_reentrant": False})',
    )


def require_whole(loss: Tensor, gradient: Sums) -> None:
    """See that there is no operation on a loss's way back without a second derivative.

    Autograd takes what lies behind one that is marked so (``once_differentiable``) for unused, and
    the norms that torch's kernel of weight norm has kept for constant.

    Raises:
        UnsoundError: there is one.
    """
    if any(node.name().startswith("WeightNormInterface") for node in nodes_of([loss])):
        raise UnsoundError(
            "the loss cannot be differentiated twice",
            "torch's kernel of weight norm, whose second derivative is wrong",
            "the weight as direction * (length / direction.norm(dim=..., keepdim=True)), or MFAC",
        )
    if any(node.name().endswith("::Error") for node in nodes_of(gradient.values())):
        raise UnsoundError(
            "the loss cannot be differentiated twice",
            "an operation that is marked as once differentiable",
            "the same of torch's own operations, or MFAC, which needs but a first derivative",
        )


def require_dense(gradient: Sums) -> None:
    """See that no gradient is sparse, which autograd takes for constant.

    Raises:
        UnsoundError: one is.
    """
    if any(part.is_sparse for part in gradient.values()):
        raise UnsoundError(
            "the loss cannot be differentiated twice",
            "a sparse gradient",
            "sparse=False in the Embedding",
        )


def nodes_of(tensors: Iterable[Tensor]) -> Iterator[torch.autograd.graph.Node]:
    """All of the graph behind some tensors."""
    seen, ahead = set(), [tensor.grad_fn for tensor in tensors]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            ahead += [function for function, _ in node.next_functions]


def tell_of_others() -> None:
    """Warn that replicas drift apart, where there may be some."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"derivatives of {dist.get_world_size()} processes are not averaged, by "
            "DistributedDataParallel neither, which sees no autograd.grad: "
            "replicas=torch.distributed.group.WORLD, unless each trains a model of its own",
            stacklevel=3,
        )
