"""Per-example gradients: one forward pass, the backward passes on its graph, and their checks.

One backward pass gives every module's output gradients for all examples; each known module
turns them and its inputs into its parameters' per-example gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesscli import randomness
from hesscli.errors import UnsoundError
from hesscli.memory import is_out_of_memory
from hesscli.meter import FORWARD, Meter
from hesscli.operators.per_example.calls import BareLinear, captured, found_in_graph
from hesscli.operators.per_example.generic import Generic
from hesscli.operators.per_example.sites import Site, known_modules, site_class
from hesscli.operators.products import gradient
from hesscli.pairing import paired
from hesscli.parameters import LayerSums, Parameter, Parameters
from hesscli.problem.batches import Batch, rows
from hesscli.problem.losses import Loss
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.output_hessian import Columns
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem

# -- One forward pass over some examples, and the backward passes on its graph ---------------------


GRADIENT_BYTES = 1 << 27
"""Bytes of output gradients that are held at once."""
PART_BYTES = 1 << 22
"""Bytes of module outputs that a CPU works on at once."""
_HALF_WAY = 0.5
"""Of the work of a way back that gives no weight its gradient."""
_ADDED = 3
"""Vectors that are gone through where squares are added to others."""
_TERMS = 16
"""Rounding of a sum in units of eps times the size of its terms, which were rounded before."""
_CHECK = 0xC4EC
"""Separates the check's stream from other uses of a seed."""


@dataclass(frozen=True)
class Pulled:
    """Columns, and for each what it makes of the gradients in every call's output."""

    columns: Sequence[Tensor]
    slopes: list[dict[nn.Module, list[Tensor]]]


class Pass:
    """Some examples on one retained graph."""

    def __init__(self, owner: ExampleGradients, batch: WeightedBatch) -> None:
        self.owner, self.batch = owner, batch
        self.share = owner.problem.share_of(batch.count)
        with captured(owner.known, owner.shared, batch.count) as calls:
            self.outputs = owner.problem.outputs(batch.data)
        if bare := [module for module in owner.known if isinstance(module, BareLinear)]:
            calls |= found_in_graph(self.outputs, bare)
        for module in owner.turned:
            calls[module] = [call.by_example(batch.count) for call in calls[module]]
        self.calls = calls
        self._sites: dict[nn.Module, Site] = {}
        owner.meter.add(FORWARD, self.share)

    @property
    def columns(self) -> Columns:
        """Columns of the loss's Hessian in the outputs."""
        problem = self.owner.problem
        return self.owner.make_columns(problem.loss, self.outputs, self.batch.data)

    @property
    def structure(self) -> Hashable:
        """What one verification speaks for: which modules were called, and on what."""
        kinds = tuple(
            tuple((call.input.dim(), call.rows_each(self.batch.count)) for call in calls)
            for calls in self.calls.values()
        )
        return self.batch.count > 1, kinds

    @property
    def block_size(self) -> int:
        """Columns whose output gradients are held at once."""
        return max(1, GRADIENT_BYTES // self._column_bytes)

    @property
    def fitting(self) -> int:
        """Examples that make a good part of a batch."""
        room = PART_BYTES if self.outputs.device.type == "cpu" else GRADIENT_BYTES
        tensors = self.owner.problem.parameters.tensors  # that are read anew for each part
        room = max(room, sum(t.nbytes for t in tensors))
        return max(1, room * self.batch.count // self._column_bytes)

    @property
    def _column_bytes(self) -> int:
        """Bytes of the outputs of all known modules and of the model."""
        shapes = [call.shape for calls in self.calls.values() for call in calls]
        numbers = self.outputs.numel() + sum(shape.numel() for shape in shapes)
        return max(1, numbers * self.outputs.element_size())

    def pull(self, columns: Sequence[Tensor]) -> Pulled:
        """Backward passes from some columns, for :meth:`norms` and :meth:`squares`."""
        return Pulled(columns, [self._pulled(column) for column in columns])

    def norms(self, pulled: Pulled) -> Tensor:
        """Σ over columns s of ‖J_iᵀ s_i‖² by example and parameter, float64 ``(N, tensors)``."""
        found = torch.zeros(
            self.batch.count,
            len(self.owner.parameters),
            dtype=torch.float64,
            device=self.outputs.device,
        )
        self._count_forming(len(pulled.columns))
        for module, names in self.owner.known.items():
            if self.calls[module]:
                norms = self._site(module).norms([p[module] for p in pulled.slopes])
                for name, position in names.items():
                    found[:, position] = norms[name]
        if chosen := self._unspoken_for(len(pulled.columns)):
            columns = torch.stack(list(pulled.columns), 1)
            norms_of_rest = self.owner.mapper.norms(self.batch, columns, list(chosen.values()))
            for position, value in zip(chosen, norms_of_rest, strict=True):
                found[:, position] = value
        return found

    def squares(self, pulled: Pulled) -> Tensor:
        """Σ over examples and columns s of (J_iᵀ s_i)², flat float64 ``(d,)``."""
        parameters = self.owner.parameters
        self._count_forming(2 * len(pulled.columns))  # and squaring
        self.owner.meter.add(self.owner.problem.vectors(1.0, _ADDED, parameters.size))
        total = torch.zeros(parameters.size, dtype=torch.float64, device=self.outputs.device)
        parts = parameters.split(total)
        for module, names in self.owner.known.items():
            if self.calls[module]:
                into = {name: parts[position] for name, position in names.items()}
                self._site(module).add_squares([p[module] for p in pulled.slopes], into)
        for position, (_, square) in self._generic(pulled.columns).items():
            parts[position].add_(square)
        return total

    def each(self, column: Tensor) -> Tensor:
        """Rows J_iᵀ s_i ``(N, d)``, s_i the example's part of one column."""
        pulled, made = self._pulled(column), self._generic_each(column)
        self._count_forming(1)
        for module, names in self.owner.known.items():
            if self.calls[module]:
                each = self._site(module).each(pulled.pop(module))
                made |= {position: each[name] for name, position in names.items()}
        parts = [
            made.pop(i).reshape(self.batch.count, t.numel())
            if i in made
            else t.new_zeros(self.batch.count, t.numel())
            for i, t in enumerate(self.owner.parameters.tensors)
        ]
        return torch.cat(parts, 1)

    # -- verification --------------------------------------------------------------------------

    def wrong_modules(self) -> dict[nn.Module, bool]:
        """Known modules whose sites do not tell the truth, and whether their rows are examples."""
        column, scales = self._probe()
        pulled, expected = self._pulled(column), self._batch_gradients(column)
        scaled = self._pulled((column.view(len(scales), -1) * scales).view_as(column))
        self._count_forming(2)  # as sums, and as norms
        wrong: dict[nn.Module, bool] = {}
        for module, names in self.owner.known.items():
            in_rows = self._in_rows(module, pulled[module], scaled[module], scales)
            if not in_rows or not self._adds_up(module, pulled[module], names, expected):
                wrong[module] = in_rows
        return wrong

    def _in_rows(
        self, module: nn.Module, pulled: list[Tensor], scaled: list[Tensor], scales: Tensor
    ) -> bool:
        """Whether rows are examples: where an example's output counts twice, its rows double.

        Several rows an example may lie in two orders, of which the first and the last row know
        nothing: another is to have a gradient.
        """
        count = self.batch.count
        for call, slopes, others in zip(self.calls[module], pulled, scaled, strict=True):
            if (each := call.rows_each(count)) is None:
                return False
            if not slopes.numel():
                continue
            expected = slopes.reshape(count, -1) * scales
            error = (others.reshape(count, -1) - expected).abs()
            digits = torch.finfo(expected.dtype).eps ** 0.5
            if (error > digits * expected.abs().amax(1, keepdim=True)).any():
                return False
            if count > 1 and each > 1 and not slopes.reshape(count * each, -1)[1:-1].any():
                return False
        return True

    def _adds_up(
        self,
        module: nn.Module,
        pulled: list[Tensor],
        names: dict[str, int],
        expected: list[Tensor],
    ) -> bool:
        """Whether the examples' gradients sum to autograd's own."""
        if not pulled:
            return not any(expected[position].any() for position in names.values())
        try:
            site = self._site(module)
            totals, norms = site.totals(pulled), site.norms([pulled])
            sums = {name: totals[name].view_as(expected[at]) for name, at in names.items()}
        except Exception as error:  # of any kind: a subclass with shapes of its own
            if is_out_of_memory(error):
                raise
            return False
        terms = _size_of_terms(site.inputs, pulled)
        return all(
            is_close(sums[name], expected[position], norms[name].sum().sqrt(), terms)
            for name, position in names.items()
        )

    def check_generic(self) -> None:
        """Raise unless single examples add up to the batch.

        Raises:
            UnsoundError: they do not, so that examples depend on each other.
        """
        column, _ = self._probe()
        expected = self._batch_gradients(column) if self.owner.unspoken_for else []
        terms = torch.stack([part.norm() for part in expected]).norm() if expected else None
        for position, (total, square) in self._generic([column]).items():
            if not is_close(total, expected[position], square.sum().sqrt(), terms):
                raise UnsoundError(
                    "per-example gradients do not add up to the gradient of the batch",
                    f"{self.owner.parameters[position].name} on batch {self.batch.index}",
                    f"a model whose output for an example depends on nothing but that example, "
                    f"or {self.owner.instead}",
                )

    def _probe(self) -> tuple[Tensor, Tensor]:
        """Random weights on the outputs, and a scale for each example ``(N, 1)``.

        Scales are powers of two, with which a gradient that is of one example alone grows to the
        last bit, and which the examples of a sample have each its own.
        """
        dtype, device = self.outputs.dtype, self.outputs.device
        stream = randomness.key(_CHECK, self.batch.index)
        weights = randomness.rademacher(stream, 0, self.outputs.numel(), dtype=dtype, device=device)
        powers = torch.arange(self.batch.count, dtype=dtype, device=device)
        powers = powers.remainder_(_SAMPLE).sub_(_SAMPLE // 2)
        return weights.view(self.outputs.shape), powers.exp2_()[:, None]

    def _batch_gradients(self, column: Tensor) -> list[Tensor]:
        self.owner.meter.add(self.owner.problem.way_back, self.share)
        value = paired([self.outputs], [column])
        return gradient(value, self.owner.parameters.tensors, retain_graph=True)

    # -- backward passes -----------------------------------------------------------------------

    def _pulled(self, column: Tensor) -> dict[nn.Module, list[Tensor]]:
        """⟨outputs, column⟩ differentiated by the output of each call of each module."""
        calls = [call for calls in self.calls.values() for call in calls]
        if not calls:
            return {module: [] for module in self.calls}
        if not self.outputs.requires_grad:  # what was called leads nowhere
            return {
                module: [call.arranged(column.new_zeros(call.shape)) for call in calls]
                for module, calls in self.calls.items()
            }
        self.owner.meter.add(_HALF_WAY * self.owner.problem.way_back, self.share)
        edges = [call.edge for call in calls]
        parts = torch.autograd.grad(
            paired([self.outputs], [column]), edges, retain_graph=True, allow_unused=True
        )
        filled = iter(
            call.arranged(column.new_zeros(call.shape) if part is None else part)
            for call, part in zip(calls, parts, strict=True)
        )
        return {module: [next(filled) for _ in calls] for module, calls in self.calls.items()}

    def _count_forming(self, columns: int) -> None:
        """Weights' gradients, from what has come back to where they are used."""
        work = (1 - _HALF_WAY) * self.owner.problem.way_back
        self.owner.meter.add(columns * work, self.share)

    def _generic(self, columns: Sequence[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """Sums of gradients and of squares for the parameters that no site speaks for."""
        if not (chosen := self._unspoken_for(len(columns))):
            return {}
        stacked = torch.stack(list(columns), 1)
        sums = self.owner.mapper.sums(self.batch, stacked, list(chosen.values()))
        return dict(zip(chosen, zip(*sums, strict=True), strict=True))

    def _generic_each(self, column: Tensor) -> dict[int, Tensor]:
        """Gradients ``(N, *shape)`` for the parameters that no site speaks for."""
        if not (chosen := self._unspoken_for(1)):
            return {}
        chunks = self.owner.mapper.each(self.batch, column[:, None], list(chosen.values()))
        return dict(zip(chosen, map(torch.cat, zip(*chunks, strict=True)), strict=True))

    def _unspoken_for(self, columns: int) -> dict[int, Parameter]:
        """The parameters that no site speaks for, by place; passes of so many columns count."""
        owner = self.owner
        if owner.unspoken_for:
            owner.meter.add(FORWARD + columns * owner.problem.way_back, self.share)
        return {position: owner.parameters[position] for position in sorted(owner.unspoken_for)}

    def _site(self, module: nn.Module) -> Site:
        if module not in self._sites:
            kind = site_class(module)
            assert kind is not None  # or it were not known
            inputs = [call.input for call in self.calls[module]]
            self._sites[module] = kind(module, inputs, self.batch.count)
        return self._sites[module]


def is_close(got: Tensor, expected: Tensor, scale: Tensor, terms: Tensor | None = None) -> bool:
    """Equal but for rounding, of a size that single examples have.

    Half of a type's digits, since sums over examples may cancel and kernels differ; a GPU's
    float32 products may have but 10 bits. Where a gradient is zero by an invariance (a bias that
    a softmax or a normalisation takes away), all of it is rounding of its ``terms``.
    """
    coarse = got.device.type == "cuda" and expected.dtype == torch.float32
    digits = 2.0**-10 if coarse else torch.finfo(expected.dtype).eps
    bound = digits**0.5 * torch.maximum(scale, expected.norm())
    if terms is not None:
        bound = bound + _TERMS * digits * terms
    return bool((got - expected).norm() <= bound)


def _size_of_terms(inputs: Sequence[Tensor], pulled: Sequence[Tensor]) -> Tensor:
    """At most what a sum over positions would be if nothing in it cancelled: Cauchy & Schwarz."""
    slopes = torch.stack([g.norm() for g in pulled]).norm()
    ones = math.sqrt(sum(g.numel() for g in pulled))
    sizes = [x.norm() for x in inputs if x.is_floating_point()]
    size: Tensor = slopes * torch.stack([*sizes, slopes.new_tensor(ones)]).norm()
    return size


# -- J_iᵀ s_i of a batch's examples: each one, or Σ_i (J_iᵀ s_i)², entry by entry ------------------
# One backward pass gives every module's output gradients for all examples; each known module turns
# them and its inputs into its parameters' per-example gradients. That a parameter acts through its
# module alone, and that rows of the module are examples, is not assumed: on the first batch of
# every structure, outputs are backpropagated with random weights, and again with each example's
# times a power of two of its own; its rows must have grown by just that, and the sums over
# examples must be autograd's own gradients. What fails takes the generic path, which is checked in
# the same way.


_SAMPLE = 16
"""Examples that a verification takes."""


MakeColumns = Callable[[Loss, Tensor, Batch], Columns]


class ExampleGradients:
    """Vector-Jacobian products J_iᵀ s_i of single examples, one by one or squared and summed.

    Args:
        problem: its examples must not depend on each other.
        parameters: what to differentiate by.
        make_columns: those of A at a batch's outputs.
        meter: counts the passes.
        instead: what a user may ask for where examples turn out to depend on each other.
        most: examples on one graph, default as many as make a good part of a batch.
    """

    def __init__(
        self,
        problem: Problem,
        parameters: Parameters,
        make_columns: MakeColumns,
        meter: Meter,
        instead: str,
        most: int | None = None,
    ) -> None:
        self.problem, self.parameters, self.meter = problem, parameters, meter
        self.make_columns, self.instead, self._most = make_columns, instead, most
        self.known = known_modules(problem.model, parameters)
        spoken_for = {i for names in self.known.values() for i in names.values()}
        self.unspoken_for = set(range(len(parameters))) - spoken_for
        self.shared: set[nn.Module] = set()
        self.turned: set[nn.Module] = set()
        self.mapper = Generic(problem)
        self._structures: set[Hashable] = set()
        self._part: int | None = None

    @property
    def generic(self) -> tuple[str, ...]:
        """Parameters that take the generic path, as far as known."""
        return tuple(self.parameters[i].name for i in sorted(self.unspoken_for))

    @property
    def columns(self) -> Columns:
        """Columns of A at the outputs of a few examples.

        Raises:
            UsageError: the loss's output Hessian is not known.
        """
        loss, sample = self.problem.loss, self.problem.sample(_SAMPLE)
        outputs = self.problem.fixed_outputs(sample.data)
        loss.check(outputs, sample.data)
        return self.make_columns(loss, outputs, sample.data)

    def relative_rounding(self) -> float | None:
        """Error of a layer's traces relative to their size, at most, on a few examples.

        One measurement may come out small by chance: a unit in the last place is added to it.
        None where the model does not run in float64.
        """
        problem = self.problem
        if not problem.precision.is_float64:
            return None
        rough = self._traces_of(problem.sample(_SAMPLE))
        with doubled(problem):
            fine = self._traces_of(problem.sample(_SAMPLE))
        unit = torch.finfo(problem.dtype).eps
        tiny = torch.finfo(torch.float64).tiny
        least = max(unit * abs(float(fine[-1])), tiny)  # of a layer that an invariance zeroes
        return float(((rough - fine).abs() / fine.abs().clamp_min(least)).max()) + unit

    def _traces_of(self, batch: WeightedBatch) -> Tensor:
        """Traces ``(L + 1,)`` of a few examples by one draw, on the CPU."""
        live = self._verified(batch)
        norms = [sign * live.norms(live.pull([s])).sum(0) for sign, s in live.columns.draw(0)]
        return LayerSums(self.parameters).of_tensors(torch.stack(norms).sum(0)[None])[0].cpu()

    def joint(self, among: Sequence[int]) -> Sequence[tuple[int, ...]]:
        """Which of some batches are best computed as one."""
        return self.problem.joint(among)

    def prepare(self) -> None:
        """Verify a few examples, which also say how many make a good part of a batch.

        Raises:
            UnsoundError: examples depend on each other.
        """
        if self._part is None:
            sample = _cut(self.problem.batch(self.problem.indices[0]), 0, _SAMPLE)
            fitting = self._verified(sample).fitting
            self._part = fitting if self._most is None else min(fitting, self._most)

    def of(
        self, batches: Sequence[int], first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, Pass]]:
        """Forward passes over parts of a batch, each with the place of its first example.

        A part is as large as a CPU's cache likes the activations, or as a GPU likes its work.

        Args:
            batches: its number, or those of some that are best computed as one.
            first: parts that begin before this example are left out.
            last: examples from this one on are left out, default none.

        Raises:
            UnsoundError: examples depend on each other.
        """
        self.prepare()
        assert self._part is not None  # it is prepared
        whole = self.problem.batch(*batches)
        last, count = whole.count if last is None else last, -(-whole.count // self._part)
        bounds = [part * whole.count // count for part in range(count + 1)]
        for start, stop in itertools.pairwise(bounds):
            if first <= start < last:
                yield start, self._verified(_cut(whole, start, min(stop, last)))

    def _verified(self, batch: WeightedBatch) -> Pass:
        """A forward pass; where its structure is new, a few of its examples are verified."""
        live = Pass(self, batch)
        for sample in (_cut(batch, 0, _SAMPLE), batch):
            if live.structure in self._structures:
                break
            self._verify(sample)
            live = Pass(self, batch)
        return live

    def _verify(self, batch: WeightedBatch) -> None:
        """Take modules as they are, else as shared by all examples, or as having them in columns.

        What is neither is looked for in the graph, and else takes the generic path.
        """
        plain = self.problem.fixed_outputs(batch.data)
        live = Pass(self, batch)
        while wrong := live.wrong_modules():
            for module, in_rows in wrong.items():
                if in_rows or module in self.shared | self.turned:
                    self._give_up(module)
                elif not self._share(module, batch, plain):
                    self.shared.discard(module)
                    self.turned.add(module)
            live = Pass(self, batch)
        live.check_generic()
        self._structures.add(live.structure)

    def _share(self, module: nn.Module, batch: WeightedBatch, plain: Tensor) -> bool:
        """Let a module repeat its output for every example, unless that changes the model's."""
        if isinstance(module, BareLinear):
            return False
        self.shared.add(module)
        try:
            outputs = Pass(self, batch).outputs
        except Exception as error:  # of any kind: the model's code expected another shape
            if is_out_of_memory(error):
                raise
            return False
        return outputs.shape == plain.shape and is_close(outputs, plain, plain.norm())

    def _give_up(self, module: nn.Module) -> None:
        """Look for what a linear layer is asked for in its stead; nothing else speaks for it."""
        self.shared.discard(module)
        self.turned.discard(module)
        names = self.known.pop(module)
        if isinstance(module, nn.Linear):
            self.known[BareLinear(module.weight, module.bias)] = names
        else:
            self.unspoken_for |= set(names.values())


def _cut(batch: WeightedBatch, start: int, stop: int) -> WeightedBatch:
    """Some of a batch's examples; its weight stays the batch's."""
    stop = min(stop, batch.count)
    data = rows(batch.data, start, stop)
    return WeightedBatch(batch.index, data, batch.weight, stop - start)
