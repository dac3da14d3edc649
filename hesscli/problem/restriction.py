"""Which parameters the matrix is of, where not of all: the others count as frozen.

Frozen is what ``requires_grad = False`` makes of a parameter: those of the user's model that have
it already, and meanwhile those that ``--params`` leaves out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from hesscli.errors import UsageError
from hesscli.memory import is_out_of_memory
from hesscli.parameters import Parameters, matches
from hesscli.problem.batches import tensors_of
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


def shares_of_way_back(
    evaluate: Callable[[], Tensor], model: nn.Module, groups: Sequence[Sequence[Tensor]]
) -> list[float]:
    """Of a model's backward pass, how much is on the way to some of its parameters.

    By the multiplications that gradients by these and by all take, frozen ones included, as one
    forward pass shows them: nothing of the size of the parameters is made. By the numbers of
    entries where nothing is multiplied.

    Args:
        evaluate: the loss of an example, with a graph for those parameters that require one.
        model: whose parameters they are.
        groups: of those parameters, each with a share of its own.
    """
    whole = [tensor for tensor in model.parameters() if tensor.is_floating_point()]
    entries = [sum(tensor.numel() for tensor in group) for group in (*groups, whole)]
    most = entries.pop()
    if set(entries) == {most}:
        return [1.0] * len(groups)
    try:
        with _requiring(whole, wanted=True), _Counting((*groups, whole)) as counting:
            evaluate()
        *parts, total = counting.counts
    except Exception as error:  # of any kind: code that was made for frozen weights
        if is_out_of_memory(error):
            raise
        parts, total = [], 0
    return [part / total for part in parts] if total else [each / most for each in entries]


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiplications that the way back from products and convolutions will take.

    It takes as many again by each of the two factors that a gradient is to reach: of a group of
    parameters, those that are made of one of them.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size, self._multiplied = len(groups), Counter[int]()
        self._origins = dict[int, int]()
        self._kept = list[Tensor]()
        for number, group in enumerate(groups):
            for tensor in group:
                self._came_from(tensor, 1 << number)

    @property
    def counts(self) -> list[int]:
        """Of each group."""
        return [
            sum(count for origins, count in self._multiplied.items() if origins >> number & 1)
            for number in range(self._size)
        ]

    def _came_from(self, tensor: Tensor, origins: int) -> None:
        """Remember of which groups, a bit for each, a tensor is made; it must stay in its place."""
        if origins:
            self._origins[id(tensor)] = self._origins.get(id(tensor), 0) | origins
            self._kept.append(tensor)

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
            count = counted(*args, **(kwargs or {}), out_val=result) if live else 0
            for factor in live[-2:]:
                self._multiplied[self._origins.get(id(factor), 0)] += count
        origins = 0
        for tensor in tensors_of((args, kwargs)):
            origins |= self._origins.get(id(tensor), 0)
        for tensor in tensors_of(result):
            self._came_from(tensor, origins)
        return result
