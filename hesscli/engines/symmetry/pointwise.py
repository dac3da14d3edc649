"""Channels through views, pointwise operations, sums and products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hesscli.engines.symmetry.known import Call, Known, key_of, scored, tensors_in, varies
from hesscli.engines.symmetry.seen import Flow, Shift

Handler = Callable[[Known, Call], None]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VIEWS = _names(
    "view _unsafe_view reshape permute transpose t expand slice select split split_with_sizes "
    "unbind unsqueeze squeeze clone alias detach unfold flip roll index index_select diagonal "
    "unsafe_split repeat _to_copy _reshape_alias lift_fresh gather contiguous"
)
_HOMOGENEOUS = {"relu", "leaky_relu", "_prelu_kernel", "abs", "rrelu"}
_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
_REDUCTIONS = {
    "sum": 1.0,
    "mean": 1.0,
    "amax": 1.0,
    "amin": 1.0,
    "linalg_vector_norm": 1.0,
    "norm": 1.0,
    "std": 1.0,
    "var": 2.0,
    "nansum": 1.0,
}
_CLIPS = ("hardtanh", "clamp", "clamp_min", "clamp_max", "relu6")
POOLS = _names(
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest2d "
    "upsample_bilinear2d"
)
_SOFTMAXES = ("_softmax", "_safe_softmax", "_log_softmax", "logsumexp")
SILENT = _names(
    "gt lt ge le eq ne isnan isinf isfinite sign argmax argmin empty_like zeros_like "
    "ones_like full_like new_zeros new_ones new_empty new_full is_same_size "
    "_local_scalar_dense scalar_tensor"
)


def _view(known: Known, call: Call) -> None:
    tensor, outs = call.args[0], list(tensors_in(call.result))
    rest = on_cpu(call.args[1:])  # where labels are, whatever device the model has
    key = key_of(tensor)

    def replayed(labels: Tensor) -> list[Tensor]:
        if call.name in ("_to_copy", "clone", "alias", "detach", "lift_fresh", "contiguous"):
            return [labels]
        if call.name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            return [labels.reshape(call.result.shape)]
        return list(tensors_in(call.func(labels, *rest, **call.kwargs)))

    if any(isinstance(each, torch.dtype) for each in rest):
        known.unknown(call)
        return
    if call.name in ("index", "gather", "index_select") and key in known.entries:
        _lookup(known, call)
        return
    if key in known.entries:
        for out, labels in zip(outs, replayed(known.entries[key]), strict=True):
            call.entries[key_of(out)] = labels.contiguous()
    for flow in known.flows_of(tensor):
        for out, labels in zip(outs, replayed(flow.labels), strict=True):
            call.flows.setdefault(key_of(out), []).append(flow.through(labels))
    if key in known.scores:
        for out in outs:
            call.scores[key_of(out)] = known.scores[key]


def on_cpu(args: Any) -> Any:
    """Arguments whose tensors are indices."""
    if isinstance(args, Tensor):
        return args.cpu()
    return type(args)(map(on_cpu, args)) if type(args) in (tuple, list) else args


def _lookup(known: Known, call: Call) -> None:
    """Rows of a parameter, by their numbers."""
    entries = known.entries[key_of(call.args[0])]
    call.entries[key_of(call.result)] = call.func(entries, *on_cpu(call.args[1:])).contiguous()


def _keep(known: Known, call: Call) -> None:
    call.give([flow.through(flow.labels) for flow in known.flows_of(call.args[0])])


def _homogeneous(known: Known, call: Call) -> None:
    flows = known.flows_of(call.args[0])
    known.use_others(call)
    known.seen.mark("activation", *flows)
    call.give([flow.through(flow.labels, linear=False) for flow in flows])


def _power(known: Known, call: Call) -> None:
    power = _POWERS.get(call.name) or call.args[1]
    flows = known.flows_of(call.args[0])
    if not isinstance(power, (int, float)) or not power:
        known.unknown(call)
        return
    call.give([f.through(f.labels, degree=float(power), linear=False) for f in flows])


def _clip(known: Known, call: Call) -> None:
    flows = known.flows_of(call.args[0])
    low, high = ((*call.args[1:], None, None)[:2]) if call.name != "relu6" else (0, 6)
    if call.name == "clamp_max":
        low, high = None, low
    known.seen.mark("activation", *flows)
    if low not in (None, 0) or high is not None:
        known.seen.mark("clipped", *flows)
    call.give([flow.through(flow.labels, linear=False) for flow in flows])


def _reduction(known: Known, call: Call) -> None:
    tensor = call.args[0]
    if known.is_entries(tensor):
        known.unknown(call)
        return
    vector_norm = call.name in ("linalg_vector_norm", "norm")
    place = 2 if vector_norm else 1
    dims = call.args[place] if len(call.args) > place else call.kwargs.get("dim")
    whole = list(range(tensor.dim()))
    dims = [dims] if isinstance(dims, int) else (list(dims) if dims else whole)
    dims = [dim % tensor.dim() for dim in dims] if tensor.dim() else []
    linear, flows = call.name in ("sum", "mean", "nansum"), list[Flow]()
    for flow in known.flows_of(tensor):
        labels, merged = known.merge(flow.labels, dims)
        labels = labels.reshape(call.result.shape)
        degree = _REDUCTIONS[call.name]
        if not linear:
            known.seen.mark("activation", flow)
        flows.append(flow.through(labels, degree=degree, linear=linear and not merged))
    call.give(flows)


def _pool(known: Known, call: Call) -> None:
    out, flows = next(tensors_in(call.result)), list[Flow]()
    kept = call.args[0].dim() - (3 if "3d" in call.name else 2)
    for flow in known.flows_of(call.args[0]):
        labels, _ = known.merge(flow.labels, range(kept, flow.labels.dim()))
        linear = "max" not in call.name
        if not linear:
            known.seen.mark("activation", flow)
        flows.append(flow.through(labels.expand(out.shape), linear=linear))
    call.give(flows, out)


def _sum(known: Known, call: Call) -> None:
    one, other = call.args[:2]
    shape = call.result.shape
    if known.is_entries(one) and not known.is_entries(other):
        one, other = other, one
    scores = [known.scores[key_of(t)] for t in (one, other) if scored(t, known.scores)]
    if scores:
        call.scores[key_of(call.result)] = scores[0]
    if known.is_entries(one):
        ones, others = known.promoted(one), known.promoted(other)
    elif known.is_entries(other):
        ones = _added(known, one, other, shape)
        call.give(ones)
        return
    else:
        ones, others = known.flows_of(one), known.flows_of(other)
    if ones and others:
        call.give(_together(known, ones, others, shape))
        return
    flows, constant = (ones, other) if ones else (others, one)
    call.give(known.with_constant(flows, constant, shape))


def _added(known: Known, tensor: Any, parameter: Tensor, shape: torch.Size) -> list[Flow]:
    """A parameter that is added scales as what it is added to."""
    entries = known.entries[key_of(parameter)].expand(shape)
    use = known.seen.used(entries)
    flows = [flow.through(flow.labels.expand(shape)) for flow in known.flows_of(tensor)]
    for flow in flows:
        known.seen.act(entries, flow.labels, flow.degree, use, shift=flow.linear)
    return flows


def _together(
    known: Known, ones: Sequence[Flow], others: Sequence[Flow], shape: torch.Size
) -> list[Flow]:
    """A sum scales where its two terms do alike."""
    if len(ones) > 1 or len(others) > 1 or ones[0].degree != others[0].degree:
        known.seen.stop("added to what scales otherwise", [*ones, *others])
        return []
    one, other = (flow.labels.expand(shape).contiguous() for flow in (ones[0], others[0]))
    if known.is_own(one, other):
        if known.seen.require(one, other, known.seen.merged):
            known.seen.mark("turned", *ones, *others)
            one = known.turned(one, other)
    else:
        known.seen.require(one, other, known.seen.same)
        known.seen.mark("summed", *ones, *others)
    return [ones[0].through(one, linear=others[0].linear)]


def _cat(known: Known, call: Call) -> None:
    parts, rest = [part for part in call.args[0] if part.numel()], call.args[1:]
    if not parts:
        return
    if all(known.is_entries(part) for part in parts):
        whole = call.func([known.entries[key_of(part)] for part in parts], *rest, **call.kwargs)
        call.entries[key_of(call.result)] = whole
        return
    flows = [known.promoted(part) for part in parts]
    alike = all(len(each) == 1 and each[0].degree == flows[0][0].degree for each in flows)
    if not all(flows) or not alike:
        known.seen.stop("joined to what does not scale", [f for each in flows for f in each])
        return
    whole = call.func([each[0].labels for each in flows], *rest, **call.kwargs)
    linear = all(each[0].linear for each in flows)
    call.give([flows[0][0].through(whole, linear=linear)])


def _product(known: Known, call: Call) -> None:
    (one, other), shape = call.args[:2], call.result.shape
    divided = -1.0 if call.name == "div" else 1.0
    if call.result.is_complex():
        _rotated(known, call)
        return
    for tensor, factor in ((one, other), (other, one)):
        is_constant = not (known.flows_of(factor) or known.is_entries(factor))
        if scored(tensor, known.scores) and is_constant:
            call.scores[key_of(call.result)] = known.scores[key_of(tensor)]
    if known.is_entries(one) and known.is_entries(other):
        known.unknown(call)
        return
    flows = [f.through(f.labels.expand(shape)) for f in known.flows_of(one)]
    others = [f.through(f.labels.expand(shape), degree=divided) for f in known.flows_of(other)]
    if divided < 0:
        others = [Flow(f.labels, f.degree, linear=False) for f in others]
    result = _multiplied(known, flows, others)
    for mine, factor in ((known.flows_of(one), other), (known.flows_of(other), one)):
        if mine and not known.flows_of(factor):
            known.meets_factor(mine, factor, shape)
    if flows and others and not result:
        known.normal[key_of(call.result)] = flows[0].labels
    for parameter, factor, degree in ((one, other, 1.0), (other, one, divided)):
        if known.is_entries(parameter):
            entries = known.entries[key_of(parameter)].expand(shape)
            undone = [flow for flow in result if known.seen.are_paired(entries, flow.labels)]
            result = [flow for flow in result if not any(flow is each for each in undone)]
            result.append(known.gain(parameter, factor, shape, degree, undone))
    call.give(result)


def _as_complex(known: Known, call: Call) -> None:
    """Pairs of real numbers as complex ones, whose labels stay pairs; and back."""
    flows = known.flows_of(call.args[0])
    shape = call.result.shape if call.name == "view_as_real" else call.args[0].shape
    if any(flow.labels.shape != shape for flow in flows):
        raise ValueError
    call.give([flow.through(flow.labels) for flow in flows])


def _rotated(known: Known, call: Call) -> None:
    """Complex numbers times constants, which turn each pair."""
    one, other = call.args[:2]
    flows = known.flows_of(one) or known.flows_of(other)
    if call.name != "mul" or (known.flows_of(one) and known.flows_of(other)):
        raise ValueError
    result = list[Flow]()
    for flow in flows:
        labels = flow.labels.expand(*call.result.shape, 2)
        known.seen.require(labels[..., 0], labels[..., 1], known.seen.merged)
        known.seen.mark("turned", flow)
        result.append(flow.through(labels))
    call.give(result)


def _multiplied(known: Known, flows: list[Flow], others: list[Flow]) -> list[Flow]:
    """A product has the degree of both where they scale alike, and each's where not."""
    result, met = list[Flow](), set[int]()
    for flow in flows:
        degree, linear = flow.degree, flow.linear
        for number, other in enumerate(others):
            if known.is_own(flow.labels, other.labels):
                known.seen.require(flow.labels, other.labels, known.seen.merged)
                degree, linear = degree + other.degree, False
                met.add(number)
        result.append(Flow(flow.labels, degree, linear and not others))
    result += [
        Flow(f.labels, f.degree, f.linear and not flows)
        for number, f in enumerate(others)
        if number not in met
    ]
    if flows and others:
        known.seen.mark("diagonal", *(flow for flow in result if flow.degree))
        known.seen.mark("gated", *(flow for flow in result if flow.degree == 1))
    absorbed = [flow for flow in result if flow.degree == 0]
    known.seen.mark("normalised", *absorbed)
    return [flow for flow in result if flow.degree]


def _masked(known: Known, call: Call) -> None:
    tensors = [t for t in tensors_in(call.args) if not known.is_entries(t)]
    scores = [known.scores[key_of(t)] for t in tensors if key_of(t) in known.scores]
    if scores:
        call.scores[key_of(call.result)] = scores[0]
    value = call.args[2]
    if isinstance(value, Tensor) and value.numel() == 1 and key_of(value) not in known.live:
        value = value.item()
    first = call.args[0] if call.name == "masked_fill" else call.args[1]
    if isinstance(value, (int, float)) and value == 0:
        flows = [f.through(f.labels.expand(call.result.shape)) for f in known.flows_of(first)]
        known.seen.mark("diagonal", *flows)
        call.give(flows)
        return
    known.unknown(call)


def _softmax(known: Known, call: Call) -> None:
    tensor, dim = call.args[:2]
    dim = dim[0] if isinstance(dim, (list, tuple)) else dim
    for flow in known.flows_of(tensor):
        if flow.linear and flow.degree == 1 and varies(flow.labels, dim):
            rows = flow.labels.movedim(dim, -1).reshape(-1, flow.labels.shape[dim])
            known.seen.shifts.append(Shift("softmax", torch.unique(rows, dim=0)))
        known.seen.stop("softmax", [flow])
    if scored(tensor, known.scores):
        keys = known.scores[key_of(tensor)]
        known.seen.shifts.append(Shift("keys", keys[:, None]))


def table() -> dict[str, Handler]:
    """What is done where one of these operations is met, by its name."""
    found: dict[str, Handler] = {}
    for names, handler in (
        (VIEWS, _view),
        (_HOMOGENEOUS, _homogeneous),
        (("neg",), _keep),
        ((*_POWERS, "pow"), _power),
        (_REDUCTIONS, _reduction),
        (_CLIPS, _clip),
        (POOLS, _pool),
        (_SOFTMAXES, _softmax),
        (SILENT, _ignore),
        (("add", "sub", "rsub"), _sum),
        (("mul", "div"), _product),
        (("view_as_complex", "view_as_real"), _as_complex),
        (("cat", "stack"), _cat),
        (("masked_fill", "where"), _masked),
    ):
        found |= dict.fromkeys(names, handler)
    return found


def _ignore(_known: Known, _call: Call) -> None:
    """What comes of it has no derivative, or none that matters."""
