"""Blocks that keep of a pass no more than what they were given, and are run again for the rest.

``torch.utils.checkpoint`` runs a block again for its way back. Where that way is differentiated
itself it saves nothing, since the gradient's graph keeps what was made again: of a transformer of
24 blocks a product took 679 MiB, and 607 without. So the way back of a block is here a function of
its own, which keeps no more than it was given either, and is run again when it is differentiated:
156 MiB. A gradient takes a forward pass more then, and a product a forward pass and a way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hesscli.errors import UsageError
from hesscli.problem.forward import standing_in
from hesscli.problem.replacing import replacing
from hesscli.torch_private import function_modes, is_transformed

# -- Which blocks ----------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules in lists and sequences that are made of others and have weights.

    A list or sequence within another is none itself.
    """
    found = dict[nn.Module, None]()

    def look(module: nn.Module, in_row: bool) -> None:
        is_row = isinstance(module, nn.ModuleList | nn.Sequential)
        children = list(module.children())
        if in_row and children and not is_row and any(True for _ in module.parameters()):
            found[module] = None
            return
        for child in children:
            look(child, is_row)

    look(model, False)
    return list(found)


def require_blocks(model: nn.Module) -> list[nn.Module]:
    """Those blocks, of which there are some.

    Raises:
        UsageError: there is none.
    """
    if blocks := blocks_of(model):
        return blocks
    raise UsageError(
        "--checkpoint-activations finds no blocks to run again",
        f"{type(model).__name__}, in which no list or sequence of modules has others in it",
        "no --checkpoint-activations, and a smaller --batch-size",
    )


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Meanwhile, blocks keep nothing of a forward pass that is to be differentiated.

    Their way back must be gone in the surroundings in which they were run. Under ``torch.func``
    they are as ever.

    Yields:
        A list with the number of calls of such a block.
    """
    with ExitStack() as stack:
        calls = [0]
        for block in blocks:
            own, run = block.__dict__.get("forward"), block.forward
            block.forward = _again(block, run, calls)
            stack.callback(_put_back, block, own)
        yield calls


def _put_back(block: nn.Module, own: Any) -> None:
    """The forward of its class, or the one that it had of its own."""
    del block.__dict__["forward"]
    if own is not None:
        block.__dict__["forward"] = own


def _again(block: nn.Module, run: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or is_transformed():
            return run(*args, **kwargs)
        calls[0] += 1
        call = _Call(block, run, args, kwargs)
        tensors = [*_tensors_in((args, kwargs)), *block.parameters()]
        found = _Block.apply(call, (args, kwargs), *tensors)  # type: ignore[no-untyped-call]
        return _filled(call.returned, found)

    return forward


# -- One call of a block ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """Where a tensor was, in nested arguments that are to keep none."""

    number: int


class _Call:
    """All that it takes to run a block once more, but for the tensors.

    Args:
        block: with parameters, for which others can stand in.
        run: its forward.
        args: that it was called with; so are the others.
    """

    def __init__(
        self, block: nn.Module, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> None:
        self._block, self._run = block, run
        self._names = [name for name, _ in block.named_parameters()]
        self._given = _emptied((args, kwargs))
        self.returned: Any = None
        weights = next(block.parameters())
        self._device = weights.device
        kind = self._device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._replacing = [mode for mode in function_modes() if isinstance(mode, replacing)]
        self._drawn: tuple[Tensor, ...] | None = None

    def first(self, given: Any) -> list[Tensor]:
        """What the block makes of what it is given, without a graph."""
        before = self._random_state()
        found = self._run(*given[0], **given[1])
        if any(map(_differ, before, self._random_state())):
            self._drawn = before
        self.returned = _emptied(found)
        return _tensors_in(found)

    def again(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same from other tensors, those of its parameters last.

        By the same functions, though autograd leaves all modes, with the same random numbers.
        """
        args, kwargs = _filled(self._given, tensors)
        weights = tensors[len(tensors) - len(self._names) :]
        enabled, dtype = self._autocast
        with ExitStack() as stack:
            for mode in self._replacing:
                stack.enter_context(mode)
            if self._drawn is not None:
                devices = [self._device] if self._device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices))
                torch.set_rng_state(self._drawn[0])
                if devices:
                    torch.cuda.set_rng_state(self._drawn[1], self._device)
            stack.enter_context(
                torch.autocast(self._device.type, dtype, enabled, cache_enabled=False)
            )
            stand_ins = dict(zip(self._names, weights, strict=True))
            stack.enter_context(standing_in(self._block, stand_ins))
            return _tensors_in(self._run(*args, **kwargs))

    def _random_state(self) -> tuple[Tensor, ...]:
        own = torch.get_rng_state()
        if self._device.type != "cuda":
            return (own,)
        return own, torch.cuda.get_rng_state(self._device)


def _differ(one: Tensor, other: Tensor) -> bool:
    return not torch.equal(one, other)


def _mapped(function: Callable[[Any], Any], kind: type, value: Any) -> Any:
    """Nested arguments with something done to all of a kind in them."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        found = {name: _mapped(function, kind, each) for name, each in value.items()}
        return found if type(value) is dict else type(value)(found)
    if isinstance(value, tuple | list):
        parts = [_mapped(function, kind, each) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _tensors_in(value: Any) -> list[Tensor]:
    found = list[Tensor]()
    _mapped(found.append, Tensor, value)
    return found


def _emptied(value: Any) -> Any:
    number = iter(range(len(_tensors_in(value))))
    return _mapped(lambda _: _Slot(next(number)), Tensor, value)


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    return _mapped(lambda slot: tensors[slot.number], _Slot, value)


# -- Its two derivatives ---------------------------------------------------------------------------


class _Block(torch.autograd.Function):
    """What a block makes of what it is given; keeps that alone."""

    @staticmethod
    def forward(ctx: Any, call: _Call, given: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        found = call.first(given)
        ctx.mark_non_differentiable(*(t for t in found if not _is_differentiable(t)))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *pulled: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        found = _WayBack.apply(ctx.call, needs, len(pulled), *pulled, *tensors)  # type: ignore[no-untyped-call]
        return None, None, *found


class _WayBack(torch.autograd.Function):
    """Jᵀ of a block times what is pulled back of its outputs; keeps that, and what it was given."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, needs: Sequence[bool], count: int, *given: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.needs, ctx.count = call, needs, count
        ctx.there = [each is not None for each in given]
        ctx.save_for_backward(*(each for each in given if each is not None))
        tensors = [_leaf(t, n) for t, n in zip(given[count:], needs, strict=True)]
        return _pulled_back(call, given[:count], tensors, needs, create_graph=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, count, wanted = iter(ctx.saved_tensors), ctx.count, ctx.needs_input_grad[3:]
        given = [
            _leaf(next(kept), needed) if is_there else None
            for is_there, needed in zip(ctx.there, wanted, strict=True)
        ]
        slopes = _pulled_back(ctx.call, given[:count], given[count:], ctx.needs, create_graph=True)
        pairs = [
            (slope, vector)
            for slope, vector in zip(slopes, vectors, strict=True)
            if slope is not None and vector is not None and slope.requires_grad
        ]
        return None, None, None, *_slopes(pairs, given, wanted)


def _pulled_back(
    call: _Call,
    pulled: Sequence[Tensor | None],
    tensors: Sequence[Any],
    needs: Sequence[bool],
    *,
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    """What comes back to each of a block's tensors that needs it, if any way leads there."""
    with torch.enable_grad():
        outputs = call.again(tensors)
        pairs = [
            (output, slope)
            for output, slope in zip(outputs, pulled, strict=True)
            if slope is not None and output.requires_grad
        ]
        return _slopes(pairs, tensors, needs, create_graph=create_graph)


def _slopes(
    pairs: Sequence[tuple[Tensor, Tensor]],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Σ vectorᵀ ∂output/∂tensor for each tensor that is wanted."""
    targets = [
        t for t, is_wanted in zip(tensors, wanted, strict=True) if is_wanted and t is not None
    ]
    if not pairs or not targets:
        return (None,) * len(tensors)
    outputs, vectors = zip(*pairs, strict=True)
    parts = iter(
        torch.autograd.grad(outputs, targets, vectors, create_graph=create_graph, allow_unused=True)
    )
    return tuple(next(parts) if is_wanted else None for is_wanted in wanted)


def _leaf(tensor: Tensor | None, needed: bool) -> Tensor:
    assert tensor is not None
    return tensor.detach().requires_grad_(needed)


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
