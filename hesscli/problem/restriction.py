"""Which parameters the matrix is of, where not of all: the others count as frozen.

Frozen is what ``requires_grad = False`` makes of a parameter: those of the user's model that have
it already, and meanwhile those that ``--params`` leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from hesscli.errors import UsageError
from hesscli.memory import is_out_of_memory
from hesscli.parameters import Parameters, matches
from hesscli.torch_private import TorchDispatchMode


def chosen(model: nn.Module, whole: Parameters, patterns: Sequence[str]) -> Parameters:
    """Those of a model's trainable parameters that ``--params`` takes.

    Args:
        model: whose they are.
        whole: all that are trainable.
        patterns: as :meth:`Parameters.select` takes them; none for all.

    Raises:
        UsageError: a pattern takes nothing, or nothing is left.
    """
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        if any(matches(glob, name) for p in whole for name in p.names):
            continue
        for name, what, cure in _others(model):
            if matches(glob, name):
                raise UsageError(
                    "no trainable parameter matches the pattern",
                    f"--params {pattern!r}: {name} {what}",
                    f"{cure}; or one of {', '.join(whole.layers[:5])}",
                )
    return whole.select(*patterns) if patterns else whole


def _others(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """What else has a name, why it is no parameter of the matrix, and what would make it one."""
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if not tensor.requires_grad:
            yield name, "is frozen by the model", f"requires_grad = True on {name}"
    for name, _ in model.named_buffers(remove_duplicate=False):
        yield name, "is a buffer", "an nn.Parameter in its place"


@contextmanager
def held_fixed(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let some parameters need no gradient meanwhile: no graph is made for them, nor kept."""
    with _requiring(tensors, wanted=False):
        yield


@contextmanager
def _requiring(tensors: Sequence[Tensor], *, wanted: bool) -> Iterator[None]:
    others = [tensor for tensor in tensors if tensor.requires_grad != wanted]
    try:
        for tensor in others:
            tensor.requires_grad_(wanted)
        yield
    finally:
        for tensor in others:
            tensor.requires_grad_(not wanted)


# -- What the others cost: a forward pass, and no way back -----------------------------------------


def share_of_way_back(
    evaluate: Callable[[], Tensor], model: nn.Module, tensors: Sequence[Tensor]
) -> float:
    """Of a model's backward pass, how much is on the way to some of its parameters.

    By the multiplications that gradients by these and by all take, frozen ones included, as the
    forward pass shows them: nothing of the size of the parameters is made. By the numbers of
    entries where nothing is multiplied.

    Args:
        evaluate: the loss of an example, with a graph for those parameters that require one.
        model: whose parameters they are.
        tensors: those parameters.
    """
    whole = [tensor for tensor in model.parameters() if tensor.is_floating_point()]
    entries, most = (sum(t.numel() for t in each) for each in (tensors, whole))
    if entries == most:
        return 1.0
    try:
        with _Counting() as part:
            evaluate()
        with _requiring(whole, wanted=True), _Counting() as total:
            evaluate()
    except Exception as error:  # of any kind: code that was made for frozen weights
        if is_out_of_memory(error):
            raise
        return entries / most
    return part.count / total.count if total.count else entries / most


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiplications that the way back from products and convolutions will take.

    It takes as many again by each of the two factors that a gradient is to reach.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, two seconds, to keep it away from this class."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run it, and add what it has multiplied; what has one dimension is added, as a bias."""
        result = function(*args, **(kwargs or {}))
        counted = flop_registry.get(function.overloadpacket)
        if counted is not None:
            live = [a for a in args if isinstance(a, Tensor) and a.dim() > 1 and a.requires_grad]
            self.count += min(2, len(live)) * counted(*args, **(kwargs or {}), out_val=result)
        return result
