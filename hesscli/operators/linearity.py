"""In which parameters a model's outputs are piecewise linear, proven from autograd's own graph.

A parameter's path to the outputs is followed through every operation that autograd recorded,
the other parameters held fixed. Sums, views, selections and piecewise linear activations keep
a piecewise linear path so; a product does if at most one factor depends on the parameter. What
is not known to do so bends the path of all that its inputs depend on. Since second derivatives
are made from this graph and nothing else, what holds for it holds for them, whatever weights
are tied, modules called twice, or parametrizations in between; a detached path counts as
constant, as it does for autograd.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from hesscli.operators.products import Tensors
from hesscli.problem.batches import tensors_of
from hesscli.problem.blame import label
from hesscli.torch_private import COPY_SLICES, DisableTorchFunction, saved, viewed


@dataclass
class Recording:
    """Of a forward pass.

    Attributes:
        places: which module an operation belongs to, the innermost.
        writes: the name of the function that wrote into a view, ``"relu_"``.
    """

    places: dict[Node, str] = field(default_factory=dict)
    writes: dict[Node, str] = field(default_factory=dict)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Recording]:
    """Meanwhile, note what the model does."""
    recording, running = Recording(), list[str]()

    def claim(tree: Any) -> None:
        """What was recorded since the last call is of the module that is running now."""
        nodes = [t.grad_fn for t in tensors_of(tree)] if running else []
        while nodes:
            node = nodes.pop()
            if node is not None and node not in recording.places:
                recording.places[node] = running[-1]
                nodes += [source for source, _ in node.next_functions]

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            claim((args, kwargs))
            running.append(name)

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        claim(output)
        running.pop()

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no such hooks
            continue
        entering = enter(label(name, module))
        handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with _Writes(recording.writes):
            yield recording
    finally:
        for handle in handles:
            handle.remove()


class _Writes(TorchFunctionMode):
    """Notes who made each write into a view: of functions that make one, and no more, at once."""

    def __init__(self, writes: dict[Node, str]) -> None:
        super().__init__()
        self.writes = writes

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run it, and compare what its first argument is a view of before and after."""
        before = _last_write(args)
        result = function(*args, **(kwargs or {}))
        after = _last_write(args)
        if after is not None and after is not before and after.name() == COPY_SLICES:
            is_only_write = after.next_functions[0][0] is before
            self.writes[after] = getattr(function, "__name__", "") if is_only_write else ""
        return result


def _last_write(args: tuple[Any, ...]) -> Node | None:
    """The last operation on the memory of the first argument."""
    if not args or not isinstance(args[0], Tensor):
        return None
    with DisableTorchFunction():
        return viewed(args[0]).grad_fn


# -- What autograd's graph does not say of its operations: their modules, and writes into views ----


@dataclass(frozen=True)
class Rule:
    """How an operation depends on its inputs, which count in the order of its signature.

    Attributes:
        factors: inputs that are multiplied with one another; it is linear in each alone.
        curved: inputs that it is curved in; None for all of them.

    In its other inputs together it is piecewise linear.
    """

    factors: tuple[int, ...] = ()
    curved: tuple[int, ...] | None = ()


_LINEAR = Rule()
_CURVED = Rule(curved=None)
_NORM = Rule(curved=(0,))  # also in products of the input with the weight

_RULES: dict[str, Rule] = {}
for _names, _how in {
    # views and copies
    """Alias AsStrided Clone Copy Setitem Diagonal Expand NarrowCopy Permute Repeat
    ReshapeAlias ReshapeCopy Select Slice Split SplitWithSizes Squeeze T ToCopy Transpose Unbind
    Unfold UnsafeSplit UnsafeSplitWithSizes UnsafeView Unsqueeze View
    ChannelShuffle Flip PixelShuffle PixelUnshuffle Roll Rot90""": _LINEAR,
    # entries put together or taken out, by constant indices and masks
    """BlockDiag Cat Col2Im ConstantPadNd DiagEmbed DiagonalScatter Embedding Fill Gather Im2Col
    Index IndexAdd IndexCopy IndexFill IndexPut IndexPutImpl IndexSelect MaskedFill MaskedScatter
    MaskedSelect ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D
    ReplicationPad3D Scatter ScatterAdd SelectScatter SliceScatter Stack Take Trace Tril Triu
    UnsafeIndex UnsafeIndexPut Where Zero""": _LINEAR,
    # sums and means
    """AdaptiveAvgPool2D AdaptiveAvgPool3D Add AvgPool2D AvgPool3D Cumsum Mean Neg Rsub Sub Sum
    UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D
    UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D
    UpsampleTrilinear3D FusedDropout NativeDropout""": _LINEAR,
    # piecewise linear
    """AdaptiveMaxPool2D AdaptiveMaxPool3D Amax Amin Ceil Clamp ClampMax ClampMin Floor Hardshrink
    Hardsigmoid Hardtanh Kthvalue LeakyRelu Max MaxPool2D MaxPool2DWithIndices
    MaxPool3DWithIndices Maximum Median Min Minimum Relu Round RreluWithNoise Sign Softshrink Sort
    Threshold Topk Trunc""": _LINEAR,
    # products; convolutions and Linear have their bias behind the two factors
    """Bmm Convolution CudnnConvolution ConvDepthwise2D ConvDepthwise3D Dot Linear MkldnnConvolution
    MkldnnLinear Mm Mul Mv PreluKernel SlowConv2D SlowConv3D SlowConvDilated2D SlowConvDilated3D
    SlowConvTranspose2D SlowConvTranspose3D""": Rule(factors=(0, 1)),
    "Addbmm Addcmul Addmm Addmv Addr Baddbmm": Rule(factors=(1, 2)),
    "Trilinear": Rule(factors=(0, 1, 2)),
    "Div": Rule(curved=(1,)),
    # (input, weight, bias), and (direction, length) of weight_norm
    "FusedRmsNorm NativeGroupNorm NativeLayerNorm WeightNormInterface": _NORM,
}.items():
    _RULES |= dict.fromkeys(_names.split(), _how)

_BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
_NODE = re.compile(r"(\w+)(?:Backward\d+|Backwards)")
"""Of torch's own operations: those of a user's ``autograd.Function`` end in no digit."""


def bends(
    outputs: Tensor,
    tensors: Tensors,
    recording: Recording | None = None,
    straight: Collection[Node] = (),
) -> dict[int, str]:
    """Where outputs may be curved in a tensor alone: its position, and the first such operation.

    Args:
        outputs: live, with their graph.
        tensors: leaves of the graph, or of none.
        recording: of the pass that made the outputs; without it a write into a view is unknown.
        straight: operations whose curvature does not count.
    """
    recording = recording or Recording()
    positions = {id(tensor): index for index, tensor in enumerate(tensors)}
    depends: dict[Node, int] = {}  # a bit for each tensor
    found: dict[int, str] = {}
    for node in _inputs_first(outputs):
        inputs = [0 if source is None else depends[source] for source, _ in node.next_functions]
        kind = _kind(node, recording)
        rule = _LINEAR if node in straight else _rule(kind, node)
        for index in _bits(_bent(rule, inputs)):
            found.setdefault(index, _words(kind or node.name(), recording.places.get(node)))
        leaf = positions.get(id(getattr(node, "variable", None)))
        depends[node] = 0 if leaf is None else 1 << leaf
        for bits in inputs:
            depends[node] |= bits
    return found


def normalisation(outputs: Tensor, dim: int) -> tuple[Node, ...]:
    """The log-softmax along a dimension that ends a graph, or the logarithm of a softmax.

    It takes from a row x its log-sum-exp, the same from each entry, so that with weights that
    sum to zero along the dimension its curvature cancels.
    """
    last = get_gradient_edge(outputs).node if outputs.requires_grad else None
    nodes = [last]
    if last is not None and last.name().startswith("LogBackward"):
        nodes.append(last.next_functions[0][0])
    softmax = "LogSoftmaxBackward" if len(nodes) == 1 else "SoftmaxBackward"
    end = nodes[-1]
    if end is None or not end.name().startswith(softmax):
        return ()
    along = int(saved(end, "dim", 1 << 63))
    along = along - (1 << 64) if along >> 63 else along  # saved without its sign
    return tuple(n for n in nodes if n is not None) if along in (dim, dim - outputs.dim()) else ()


def _kind(node: Node, recording: Recording) -> str:
    """What torch calls an operation, "LeakyRelu"; empty if it is none of torch's or not known."""
    if node.name() == COPY_SLICES:
        return recording.writes.get(node, "").title().replace("_", "")
    match = _NODE.fullmatch(node.name())
    return match[1] if match else ""


def _rule(kind: str, node: Node) -> Rule:
    """How an operation depends on its inputs."""
    if kind in _BATCH_NORMS:
        return _NORM if saved(node, "training", True) else Rule(factors=(0, 1))
    if kind == "Abs":
        value = saved(node, "self", None)
        return _CURVED if value is None or value.is_complex() else _LINEAR
    return _RULES.get(kind, _CURVED)


def _bent(rule: Rule, inputs: list[int]) -> int:
    """What an operation may be curved in, given what each of its inputs depends on."""
    bent = before = 0
    for position in range(len(inputs)) if rule.curved is None else rule.curved:
        bent |= inputs[position]
    for position in rule.factors:
        if position < len(inputs):  # a product with a number has one input
            bent |= before & inputs[position]
            before |= inputs[position]
    return bent


def _inputs_first(outputs: Tensor) -> Iterator[Node]:
    """The graph's nodes, each after all that it is computed from."""
    root = get_gradient_edge(outputs).node if outputs.requires_grad else None
    stack: list[tuple[Node | None, bool]] = [(root, False)]
    entered: set[Node] = set()
    while stack:
        node, is_complete = stack.pop()
        if node is not None and is_complete:
            yield node
        elif node is not None and node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack.extend((source, False) for source, _ in node.next_functions)


def _bits(number: int) -> Iterator[int]:
    return (i for i in range(number.bit_length()) if number >> i & 1)


def _words(kind: str, place: str | None) -> str:
    """An operation for people: "gelu in blocks.0.mlp (GELU)"."""
    bare = kind.rpartition(":")[2].removesuffix("Backward")
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", bare).lower().removeprefix("native_")
    return f"{words} in {place}" if place else words
