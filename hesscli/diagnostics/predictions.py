"""What changes of weights do to the loss: predicted from curvature, and measured.

L(θ + δ) − L(θ) ≈ gᵀδ + ½ δᵀAδ. The gradient g is that of all kept examples; the quadratic term
is summed over batches, which are random samples, until it is known well enough or all are done.
Where the kept examples are a sample themselves, so is g, and batches differ in both terms.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesscli import world
from hesscli.diagnostics.measurement import Pace, Work
from hesscli.diagnostics.perturbations import Change, applied, changes_of, kinds_of
from hesscli.engines.diagonal import student_scale
from hesscli.engines.hutchinson.table import variance_between
from hesscli.engines.lanczos import ROUNDING
from hesscli.meter import FORWARD
from hesscli.operators.base import Operator
from hesscli.operators.forms import LayerForms, Layers
from hesscli.operators.products import gradient
from hesscli.parameters import Parameters
from hesscli.problem.independence import MIN_GROUPS
from hesscli.problem.objective import WeightedBatch
from hesscli.problem.precision import doubled
from hesscli.problem.problem import Problem
from hesscli.results import Snapshot, Status
from hesscli.state import State

Array = NDArray[np.float64]

SCALES = (1.0, 0.5, 0.25)
FEWEST_BATCHES = 4


@dataclass(frozen=True)
class _Seen:
    """What a batch has said of a layer's changes: a row of each, and what all batches agree on."""

    sums: Array
    weight: float
    form: Array
    slopes: list[Array]


@dataclass
class Layer:
    """One layer's changes and what is known of them so far.

    ``sums`` has ‖δ‖² and gᵀδ of each change, ``forms`` a row δᵀA_b δ for each batch b that was
    seen, and ``slopes`` one of g_bᵀδ where examples were left out.
    """

    parameters: Parameters
    place: slice
    saliency: Tensor
    sums: Array | None = None
    weights: list[float] = field(default_factory=list)
    forms: list[Array] = field(default_factory=list)
    slopes: list[Array] = field(default_factory=list)

    def changes(self) -> Iterator[Change]:
        """Made anew each time: they are cheap, and large."""
        return changes_of(self.parameters, self.saliency)

    def add(self, seen: _Seen) -> None:
        """Take what the next batch has said."""
        self.sums = seen.sums
        self.weights.append(seen.weight)
        self.forms.append(seen.form)
        self.slopes += seen.slopes

    @property
    def size(self) -> int:
        """Number of weights."""
        return len(self.saliency)


@dataclass(frozen=True)
class Prediction:
    """Linear and quadratic terms of one layer's changes, in their order ``(k,)``.

    ``stderr`` is of their sum, for the batches that were not seen and the examples that were left
    out, with ``freedom``.
    """

    squared_norm: Array
    linear: Array
    quadratic: Array
    stderr: Array
    freedom: float

    @property
    def bar(self) -> Array:
        """The standard error, scaled so that ±1.96 of it covers 95%, however few the batches."""
        return np.asarray(student_scale(self.freedom) * self.stderr)

    @property
    def size(self) -> Array:
        """|linear| + |quadratic|, in which errors are measured."""
        return np.asarray(np.abs(self.linear) + np.abs(self.quadratic))


class Predictions:
    """The changes of all layers, with the true matrix.

    Args:
        operator: A.
        saliency: of all weights ``(d,)``, by which pruning chooses.
    """

    def __init__(self, operator: Operator, saliency: Tensor) -> None:
        self.operator, self.problem = operator, operator.problem
        self._owned = Layers(operator, _by_layer(operator.parameters))
        places = operator.parameters.layer_places()
        self.layers = [
            Layer(owned, place, saliency[place])
            for owned, place in zip(self._owned.owned, places, strict=True)
        ]
        self._gradient = operator.problem.prove().gradient
        self._fraction = operator.problem.sampling_fraction or 1.0
        self._batches = _batches(operator.problem)

    @property
    def seen(self) -> int:
        """Batches that are done."""
        return min(len(layer.forms) for layer in self.layers)

    @property
    def ready(self) -> bool:
        """Whether there are predictions with their errors: of two batches, or of all there is."""
        return self.seen >= 2 or (self.seen == len(self._batches) and self._fraction == 1)

    def to_tolerance(self, rtol: float) -> Generator[Snapshot, None, Status]:
        """See batches until every standard error is small beside what is predicted.

        Args:
            rtol: wanted two standard errors over |linear| + |quadratic|.

        Returns:
            Whether that was reached, or what was in the way.
        """
        batches = self._batches
        look = min(FEWEST_BATCHES, len(batches))
        while True:
            while self.seen < look:
                yield from self._see(batches[self.seen : min(self.seen + world.size(), look)])
            if self.seen == look and self._known_within(rtol):
                return "converged"
            if look == len(batches):
                return "data-limited"
            look = min(2 * look, len(batches))

    def state_dict(self) -> State:
        """Of each layer what is known of it, batch by batch."""
        return {
            "layers": [
                {
                    "sums": layer.sums,
                    "weights": layer.weights,
                    "forms": layer.forms,
                    "slopes": layer.slopes,
                }
                for layer in self.layers
            ]
        }

    def load_state_dict(self, state: State) -> None:
        """Have seen what another of the same matrix and saliencies had."""
        for layer, its in zip(self.layers, state["layers"], strict=True):
            layer.sums, layer.weights = its["sums"], list(its["weights"])
            layer.forms, layer.slopes = list(its["forms"]), list(its["slopes"])

    def of(self, layer: Layer) -> Prediction:
        """What is predicted of a layer's changes, once a batch was seen."""
        assert layer.sums is not None  # so they are known
        squared, linear = layer.sums
        masses = [sum(self.problem.masses[i] for i in group) for group in self._batches]
        seen = len(layer.forms)
        probed = sum(masses[:seen]) / sum(masses)
        mean, error = sampled_mean(
            np.stack(layer.forms) / 2,
            np.stack(layer.slopes) if layer.slopes else None,
            np.array(layer.weights),
            probed,
            probed * self._fraction,
        )
        return Prediction(
            squared_norm=squared,
            linear=linear,
            quadratic=mean + self.operator.decay * squared / 2,
            stderr=error,
            freedom=max(1, seen - 1),
        )

    def _see(self, turn: Sequence[tuple[int, ...]]) -> Iterator[Snapshot]:
        """The next batches' quadratic forms, of those layers that have not seen them yet.

        There are as many as ranks at most, each of which has one.
        """
        before, meter, forms, slope = self.seen, self.operator.meter, None, None
        own = before + world.place()
        if (group := world.own(turn)) is not None:
            begun = len(self.layers[0].forms) > own
            forms = LayerForms(self._owned, self.problem.batch(*group), is_counted=begun)
        with meter.pooled(), world.apart():
            if forms is not None and self._fraction < 1:
                with meter.uncounted() if begun else nullcontext():
                    slope = self._slope(forms.batch)
        for position, layer in enumerate(self.layers):
            if len(layer.forms) == before + len(turn):
                continue
            with meter.pooled():
                found = None
                with world.apart():
                    if forms is not None and len(layer.forms) <= own:
                        found = self._of_layer(forms, position, slope)
                every = [one for one in world.gathered(found) if one is not None]
            for one in every:
                layer.add(one)
            meter.keep()
            done = before + len(turn) * (position + 1) / len(self.layers)
            total = float(len(self._batches))
            yield Snapshot(phase="perturbing", done=done, total=total)

    def _of_layer(self, forms: LayerForms, position: int, slope: Tensor | None) -> _Seen:
        """A batch's forms of a layer's changes, and the sums that go with them."""
        layer, found, size = self.layers[position], list[Tensor](), self._owned.at_once(position)
        vectors = [vector[layer.place] for vector in (self._gradient, slope) if vector is not None]
        changes = layer.changes()
        while block := [change.delta for change in islice(changes, size)]:
            rows = torch.stack(block)
            sums = [torch.linalg.vecdot(rows, rows), *(rows.to(v) @ v for v in vectors)]
            found.append(torch.stack([forms(position, rows), *sums]))
        form, squared, linear, *slopes = torch.cat(found, dim=1).cpu().numpy()
        return _Seen(np.stack([squared, linear]), forms.batch.weight, form, slopes)

    def _slope(self, batch: WeightedBatch) -> Tensor:
        """The gradient of one batch's loss, float64 ``(d,)``."""
        problem, parameters = self.problem, self.problem.parameters
        self.operator.meter.add(problem.gradient_cost, problem.share_of(batch.count))
        with problem.forward_context(), problem.recomputing():
            parts = gradient(problem.evaluate(batch.data), parameters.tensors)
        return parameters.flatten(parts).double()

    def _known_within(self, rtol: float) -> bool:
        known = map(self.of, self.layers)
        return all(bool((2 * p.stderr <= rtol * p.size).all()) for p in known)


def _batches(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """As the user has them, unless these are too few to show what was left out."""
    joint = problem.joint()
    if problem.sampling_fraction == 1 or len(joint) >= MIN_GROUPS:
        return joint
    return tuple((index,) for index in problem.indices)


def _by_layer(parameters: Parameters) -> list[Parameters]:
    return [Parameters(parameters.in_layer(name)) for name in parameters.layers]


def sampled_mean(
    quadratic: Array, linear: Array | None, weights: Array, probed: float, fraction: float
) -> tuple[Array, Array]:
    """Mean of the batches' quadratic terms, and the standard error of its sum with the linear one.

    The linear term's own mean is over all kept batches, so that it errs only where examples were
    left out.

    Args:
        quadratic: of the batches that were seen ``(B, k)``.
        linear: of the same; None where no example was left out.
        weights: their masses ``(B,)``.
        probed: the share of all kept mass that they make up.
        fraction: the share of all there is.

    Returns:
        The mean ``(k,)``, and the error: infinite from a single batch that is not all.
    """
    share = weights / weights.sum()
    mean = share @ quadratic
    if fraction == 1:
        return mean, np.zeros_like(mean)
    alone = variance_between(quadratic, share)
    both = alone if linear is None else variance_between(quadratic + linear, share)
    if alone is None or both is None:
        return mean, np.full_like(mean, np.inf)
    variance = (1 - probed) * alone.value + (probed - fraction) * both.value
    return mean, np.sqrt(np.maximum(variance, 0.0))


class Measured:
    """Losses that were found with changes applied.

    In float64 wherever the model runs in it: what is left of two losses is small. ``rounding``
    is how far off a difference may be.
    """

    def __init__(self, operator: Operator) -> None:
        self.problem, self.meter, self.rounding = operator.problem, operator.meter, 0.0
        self._before: float | None = None
        self._rows: list[list[float]] = []

    def state_dict(self) -> State:
        """The loss without a change, and its differences so far."""
        return {"before": self._before, "rows": self._rows}

    def load_state_dict(self, state: State) -> None:
        """Have measured what another had."""
        self._before, self._rows = state["before"], list(state["rows"])

    def of(self, layers: list[Layer]) -> list[Array]:
        """Loss differences ``(k, scales)`` of each layer's first changes, those that there are."""
        rows = np.array(self._rows).reshape(-1, len(SCALES))
        counts = [len(kinds_of(layer.parameters)) for layer in layers]
        return np.split(rows, np.cumsum(counts)[:-1])

    def changes(self, layers: list[Layer], exact: bool) -> Iterator[Snapshot]:
        """Measure what is left of them; stopping within a change loses that one."""
        total = float(sum(len(kinds_of(layer.parameters)) for layer in layers))
        with doubled(self.problem) if exact else nullcontext():
            before = self._before = self._loss() if self._before is None else self._before
            self.rounding = ROUNDING * torch.finfo(self.problem.dtype).eps * abs(before)
            each = ((layer, change) for layer in layers for change in layer.changes())
            for layer, change in islice(each, len(self._rows), None):
                row = [self._after(layer, change, scale) - before for scale in SCALES]
                self._rows.append(row)
                self.meter.keep()
                yield Snapshot(phase="verifying", done=float(len(self._rows)), total=total)

    def _after(self, layer: Layer, change: Change, scale: float) -> float:
        with applied(layer.parameters, change.delta, scale):
            return self._loss()

    @torch.no_grad()
    def _loss(self) -> float:
        """Over all kept examples, weight decay included."""
        problem, own = self.problem, dict[int, float]()
        with world.apart():
            for group in world.share(problem.joint()):
                batch = problem.batch(*group)
                own[batch.index] = batch.weight * float(problem.evaluate(batch.data))
        each = sorted(one for every in world.gathered(own) for one in every.items())
        total = sum(value for _, value in each)
        square = sum(t.detach().double().square().sum() for t in problem.parameters.tensors)
        self.meter.add(FORWARD, problem.joint_share)
        return float(total + 0.5 * problem.weight_decay * square)


def order_of(errors: Array, rounding: float) -> float | None:
    """The power of the scale with which errors at ``SCALES`` fall, by its last two.

    None where they are no more than rounding.
    """
    half, quarter = np.abs(errors[-2:])
    return math.log2(half / quarter) if min(half, quarter) > rounding else None


# -- What predictions and measurements will take ---------------------------------------------------


def perturbing(operator: Operator, pace: Pace) -> Work:
    """All layers' changes on as many batches as are likely.

    A sample is seen to its end, and batches of all the data from a first look on, until all
    predictions are known: halfway, by the number of looks.
    """
    problem, layers = operator.problem, Layers(operator, _by_layer(operator.parameters))
    changes, batches = _counts(problem), len(_batches(problem))
    first = min(FEWEST_BATCHES, batches)
    work = sum(count * cost for count, cost in zip(changes, layers.costs, strict=True))
    each = operator.cost[1]  # nothing, where a last bias is all there is
    spent = pace.products(work / each if each else sum(changes), layers.graphs)
    spent.products = float(sum(changes))
    if problem.sampling_fraction != 1:
        first = batches
        spent += pace.gradients(1)
    seen = math.sqrt(first * batches) / batches
    span = f"{first} to {batches}" if first < batches else f"all {batches}"
    note = f"{sum(changes)} changes of {len(changes)} layers, on {span} batches"
    return Work(phase="perturbing", spent=spent.times(seen), note=note)


def verifying(problem: Problem, pace: Pace) -> Work:
    """The loss with every change applied, at each scale."""
    losses, share = 1 + sum(_counts(problem)) * len(SCALES), FORWARD / problem.gradient_cost
    return Work(phase="verifying", spent=pace.gradients(share * losses))


def _counts(problem: Problem) -> list[int]:
    """Changes of each layer."""
    layers = map(problem.parameters.in_layer, problem.layer_names)
    return [len(kinds_of(layer)) for layer in layers]
