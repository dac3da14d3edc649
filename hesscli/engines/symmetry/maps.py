"""Channels through maps and norms: where they begin, and where they are undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hesscli.engines.symmetry.known import Call, Known, key_of, tensors_in, varies
from hesscli.engines.symmetry.seen import Anchor, Flow, Heads, Shift, distinct

Handler = Callable[[Known, Call], None]


def _matmul(known: Known, call: Call) -> None:
    args = list(call.args)
    bias = args.pop(0) if call.name in ("addmm", "baddbmm") else None
    out, (one, other) = call.result, args[:2]
    batched = out.dim() == 3
    shape = out.shape if batched else (1, *out.shape)
    if known.is_entries(one) and known.is_entries(other):
        known.unknown(call)
        return
    if known.is_entries(one):  # W x, as xᵀ Wᵀ
        entries = _three(known.entries[key_of(one)]).mT
        flows = [f.through(_three(f.labels).mT) for f in known.flows_of(other)]
        found = _map(known, flows, entries, (shape[0], shape[2], shape[1]))
        result = [Flow(f.labels.mT.contiguous(), f.degree, f.linear) for f in found]
    elif known.is_entries(other):
        entries = _three(known.entries[key_of(other)])
        flows = [f.through(_three(f.labels)) for f in known.flows_of(one)]
        result = _map(known, flows, entries, tuple(shape))
    else:
        result = _paired(known, call, known.flows_of(one), known.flows_of(other), tuple(shape))
    result = [Flow(f.labels.reshape(out.shape), f.degree, f.linear) for f in result]
    if known.is_entries(bias):
        entries = known.entries[key_of(bias)].expand(out.shape)
        use = known.seen.used(entries)
        for flow in result:
            known.seen.act(entries, flow.labels, flow.degree, use, shift=flow.linear)
    elif bias is not None and result:
        beta = call.kwargs.get("beta", 1)
        result = known.with_constant(result, bias if beta else 0.0, out.shape)
    call.give(result)


def _three(labels: Tensor) -> Tensor:
    return labels if labels.dim() == 3 else labels[None]


def _map(known: Known, flows: list[Flow], entries: Tensor, shape: tuple[int, ...]) -> list[Flow]:
    """X W: its columns are channels, and its rows undo what scales those of x."""
    entries = entries.expand(shape[0], *entries.shape[1:])
    use = known.seen.used(entries)
    shared = bool((entries == entries[:1]).all())
    for flow in flows:
        labels, _ = known.merge(flow.labels, [0, 1] if shared else [1])  # (b, 1, k)
        weights = entries[:1] if shared else entries
        known.seen.act(weights, labels.mT, -flow.degree, use)
        known.seen.mark("read", flow)
        known.seen.mixable(labels[:, 0], known.seen.map_rows)
    batches = 1 if shared else shape[0]
    channels = known.seen.new("map", batches * shape[2]).view(batches, 1, shape[2])
    weights = entries[:batches]
    known.seen.act(weights, channels.expand_as(weights), 1.0, use)
    return [Flow(channels.expand(shape).contiguous())]


def _paired(
    known: Known, call: Call, ones: list[Flow], others: list[Flow], shape: tuple[int, ...]
) -> list[Flow]:
    """Both are computed: one's channels are summed over, or are bystanders."""
    result, summed = list[Flow](), (list[Flow](), list[Flow]())
    for number, flows in enumerate((ones, others)):
        for flow in flows:
            labels = _three(flow.labels)
            labels = labels if number == 0 else labels.mT  # (b, bystanders, summed)
            moved = Flow(labels.contiguous(), flow.degree, flow.linear)
            if varies(labels, 2):
                summed[number].append(moved)
                continue
            kept = labels[:, :, :1].expand(-1, -1, shape[2] if number == 0 else shape[1])
            known.seen.mixable(labels[:, :, 0], known.seen.rows)
            known.seen.mark("attended", flow)
            result.append(flow.through(kept if number == 0 else kept.mT))
    if any(summed):
        _contracted(known, call, *summed)
    if len(result) > 1:
        known.seen.mark("diagonal", *result)
    return result


def _contracted(known: Known, call: Call, ones: list[Flow], others: list[Flow]) -> None:
    """Q kᵀ: what scales the one must scale the other by the inverse."""
    alike = len(ones) == len(others) == 1 and ones[0].degree == others[0].degree
    if not alike or torch.isin(ones[0].labels, others[0].labels).any():
        known.seen.stop("a product with itself", [*ones, *others])
        return
    (query,), (key,) = ones, others
    queries, _ = known.merge(query.labels, [1])  # (b, 1, k)
    keys, _ = known.merge(key.labels, [1])
    known.seen.require(queries, keys, known.seen.same)
    known.seen.inverse.append(distinct(keys))
    known.seen.mixable(queries[:, 0], known.seen.rows)
    known.seen.mark("paired", query, key)
    if key.linear:
        call.scores[key_of(call.result)] = distinct(keys)
        rows = torch.unique(torch.cat([queries[:, 0], keys[:, 0]], dim=1), dim=0)
        known.seen.heads.append(Heads(*rows.chunk(2, dim=1)))


def _convolution(known: Known, call: Call) -> None:
    tensor, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    if not known.is_entries(weight) or (transposed and groups != 1):
        known.unknown(call)
        return
    entries, out = known.entries[key_of(weight)], call.result
    if transposed:  # whose inputs come first
        entries = entries.transpose(0, 1)
    use, depth = known.seen.used(entries), entries.shape[1]
    for flow in known.flows_of(tensor):
        labels, _ = known.merge(flow.labels, [0, *range(2, flow.labels.dim())])
        by_group = labels.reshape(groups, 1, depth).expand(-1, len(entries) // groups, -1)
        by_output = by_group.reshape(len(entries), depth, *(1,) * (entries.dim() - 2))
        known.seen.act(entries, by_output.expand_as(entries), -flow.degree, use)
        known.seen.mark("read", flow)
        if groups == 1:
            known.seen.mixable(labels.reshape(1, -1), known.seen.map_rows)
        else:
            known.seen.mark("diagonal", flow)
    channels = known.seen.new("map", len(entries))
    if groups != 1:
        known.seen.mark("diagonal", Flow(channels))
    column = channels.view(-1, *(1,) * (entries.dim() - 1))
    known.seen.act(entries, column.expand_as(entries), 1.0, use)
    spread = channels.view(1, -1, *(1,) * (out.dim() - 2)).expand(out.shape).contiguous()
    if known.is_entries(bias):
        own = known.entries[key_of(bias)]
        known.seen.act(own, channels, 1.0, known.seen.used(own), shift=True)
    call.give([Flow(spread)])


def _embedding(known: Known, call: Call) -> None:
    weight = call.args[0]
    if not known.is_entries(weight):
        known.unknown(call)
        return
    entries = known.entries[key_of(weight)]
    channels = known.seen.new("embedding", entries.shape[-1])
    known.seen.act(entries, channels.expand_as(entries), 1.0, known.seen.used(entries))
    flow = Flow(channels.expand(call.result.shape).contiguous())
    padding = call.args[2] if len(call.args) > 2 else -1
    if padding >= 0:  # which other examples may have, if these do not
        known.seen.mark("padding_idx", flow)
    call.give([flow])


def _absorbed(
    known: Known, flows: Sequence[Flow], dims: Sequence[int], eps: Any, name: str
) -> None:
    """A norm over some dimensions, which no common factor changes but for its eps."""
    for flow in flows:
        if flow.linear and all(varies(flow.labels, dim) for dim in dims):
            rows = flow.labels.flatten(min(dims)).flatten(0, -2)
            known.seen.shifts.append(Shift(name, torch.unique(rows, dim=0)))
        known.merge(flow.labels, dims)
    known.seen.mark("normalised", *flows)
    known.seen.mark(name, *flows)
    if eps is None or eps > 0:
        known.seen.mark("eps", *flows)


def _layer_norm(known: Known, call: Call) -> None:
    tensor, shape, weight = call.args[:3]
    layer = call.name == "native_layer_norm"
    bias = call.args[3] if layer else None
    eps = call.args[4] if layer else (call.args[3] if len(call.args) > 3 else None)
    dims = list(range(tensor.dim() - len(shape), tensor.dim()))
    flows = known.promoted(tensor)
    _absorbed(known, flows, dims, eps, "layer norm" if layer else "RMS norm")
    channels = _gain_and_bias(known, call, weight, bias, lambda entries: entries)
    if channels is None:
        return
    for flow in flows:
        outcomes = channels.view(weight.shape).expand_as(flow.labels)
        known.seen.require(flow.labels, outcomes, known.seen.gained)
    if len(flows) == len(dims) == 1:
        known.normed(flows[0].labels, weight, bias, channels, has_mean=layer)


def _group_norm(known: Known, call: Call) -> None:
    tensor, weight, bias = call.args[:3]
    groups, eps = call.args[6], call.args[7]
    cut = [f.through(f.labels.reshape(len(tensor), groups, -1)) for f in known.flows_of(tensor)]
    for flow in cut:
        if flow.linear:
            inner = [distinct(row) for row in torch.unique(flow.labels.flatten(0, 1), dim=0)]
            if len({len(row) for row in inner}) == 1:
                rows = torch.unique(torch.stack(inner), dim=0)
                known.seen.shifts.append(Shift("group norm", rows))
        known.merge(flow.labels, [2])
    known.seen.mark("normalised", *cut)
    if eps > 0:
        known.seen.mark("eps", *cut)
    wide = (-1, *(1,) * (tensor.dim() - 2))
    _gain_and_bias(known, call, weight, bias, lambda entries: entries.view(wide))


def _batch_norm(known: Known, call: Call) -> None:
    tensor, weight, bias = call.args[:3]
    training, eps = call.args[5], call.args[7]
    flows = known.flows_of(tensor)
    if call.name == "_native_batch_norm_legit" and not isinstance(call.args[3], Tensor):
        training, eps = call.args[3], call.args[5]
    if training:
        for flow in flows:
            known.merge(flow.labels, [0, *range(2, flow.labels.dim())])
            if flow.linear:
                channels = distinct(flow.labels)[:, None]
                known.seen.shifts.append(Shift("batch norm", channels))
        known.seen.mark("normalised", *flows)
        known.seen.mark("batch norm", *flows)
        if eps > 0:
            known.seen.mark("eps", *flows)
    else:
        known.seen.mark("normalised", *flows)
        known.seen.mark("batch norm", *flows)
        known.seen.stop("running statistics", flows)
    fixed = statistics(call)
    if fixed is not None and known.is_entries(weight) and known.is_entries(bias):
        for flow in flows:
            channels = flow.labels.transpose(0, 1).flatten(1)[:, 0]
            own = known.entries[key_of(weight)], known.entries[key_of(bias)]
            known.seen.anchors.append(Anchor(channels, *own, fixed[0] / fixed[1]))
    wide = (-1, *(1,) * (tensor.dim() - 2))
    _gain_and_bias(known, call, weight, bias, lambda entries: entries.view(wide))


def statistics(call: Call) -> tuple[Tensor, Tensor] | None:
    """Mean, and root of the variance with its eps, of a batch norm whose statistics are fixed."""
    if call.name == "_native_batch_norm_legit" and not isinstance(call.args[3], Tensor):
        return None
    mean, variance, training, _, eps = call.args[3:8]
    if training or not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return None
    return mean.detach().double().cpu(), (variance.detach().double().cpu() + eps).sqrt()


def _gain_and_bias(
    known: Known, call: Call, weight: Any, bias: Any, wide: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Gain and bias of a norm, one of each for a channel, which are what is returned."""
    if not known.is_entries(weight):
        if known.is_entries(bias):
            known.seen.used(known.entries[key_of(bias)])
        return None
    out = next(tensors_in(call.result))
    entries = known.entries[key_of(weight)]
    channels = known.seen.new("norm", entries.numel())
    known.seen.act(entries.reshape(-1), channels, 1.0, known.seen.used(entries))
    if known.is_entries(bias):
        own = known.entries[key_of(bias)]
        known.seen.act(own.reshape(-1), channels, 1.0, known.seen.used(own), shift=True)
    labels = wide(channels.view(entries.shape)).expand(out.shape)
    call.give([Flow(labels.contiguous())], out)
    return channels


def table() -> dict[str, Handler]:
    """What is done where one of these operations is met, by its name."""
    found: dict[str, Handler] = {}
    for names, handler in (
        (("mm", "bmm", "addmm", "baddbmm"), _matmul),
        (("convolution", "_convolution", "mkldnn_convolution"), _convolution),
        (("embedding",), _embedding),
        (("native_layer_norm", "_fused_rms_norm"), _layer_norm),
        (("native_group_norm",), _group_norm),
        (("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), _batch_norm),
    ):
        found |= dict.fromkeys(names, handler)
    return found
