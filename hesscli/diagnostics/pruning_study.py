"""Networks that are pruned step by step, by M-FAC and by what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO

import torch
from torch import Tensor

from hesscli.diagnostics.measurement import Pace, Work
from hesscli.diagnostics.pruning_choice import Aim, Candidates, by_groups, in_groups, least
from hesscli.diagnostics.run import Run
from hesscli.diagnostics.saliency import saliencies
from hesscli.diagnostics.window import (
    Collected,
    WindowOptions,
    block_sizes,
    collecting,
    damping_of,
    inverting,
    kind_of,
    rows_to_be_had,
)
from hesscli.engines.mfac import GradientWindow, StaticFisher
from hesscli.engines.mfac.pruning import cheapest_patterns, compensation
from hesscli.engines.mfac.work import stored
from hesscli.errors import UsageError
from hesscli.memory import room_for_more
from hesscli.meter import FORWARD, Algebra
from hesscli.operators.per_example.rows import Rows
from hesscli.problem.forward import written
from hesscli.problem.problem import Problem
from hesscli.problem.proof import measured
from hesscli.problem.recalibration import norms_of, recalibrated
from hesscli.problem.rewriting import Rewriting
from hesscli.results import PrunedQuality, PruningMethod, Quality, Snapshot, WindowReport
from hesscli.state import State
from hesscli.units import human_bytes

MFAC: PruningMethod = "mfac"
METHODS: tuple[PruningMethod, ...] = (MFAC, "diagonal-fisher", "magnitude")
"""The one whose weights are written is the first."""
_PRUNING, _COMPARING, _PREDICTING = "pruning", "comparing methods", "predicting"


# -- One network, pruned by one method -------------------------------------------------------------


class Pruned:
    """Weights that a method has pruned so far, and how good they were after each step.

    Attributes:
        weights: all of the matrix's parameters, float64 ``(d,)``.
        gone: which of the candidates are zero for good ``(C,)``.
        qualities: after each step.
        recalibrated: with batch norm's statistics taken anew, at the end.
        leverage: of each candidate, as the last window that it was in had it.
        window: of the last step.
    """

    def __init__(self, weights: Tensor, gone: Tensor) -> None:
        self.weights, self.gone = weights, gone
        self.qualities = list[PrunedQuality]()
        self.recalibrated: Quality | None = None
        self.is_recalibrated = False
        self.leverage = torch.full((len(gone),), math.nan, dtype=torch.float64, device="cpu")
        self.window: WindowReport | None = None

    def state_dict(self) -> State:
        """All of it."""
        return {
            "weights": self.weights,
            "gone": self.gone,
            "qualities": [vars(one).copy() for one in self.qualities],
            "recalibrated": self.recalibrated and vars(self.recalibrated).copy(),
            "is_recalibrated": self.is_recalibrated,
            "leverage": self.leverage,
            "window": self.window and vars(self.window).copy(),
        }

    def load_state_dict(self, state: State) -> None:
        """Have what another had."""
        for name in ("weights", "gone", "leverage"):
            setattr(self, name, torch.as_tensor(state[name], device="cpu").clone())
        self.qualities = [PrunedQuality(**one) for one in state["qualities"]]
        if state["recalibrated"] is not None:
            self.recalibrated = Quality(**state["recalibrated"])
        self.is_recalibrated = state["is_recalibrated"]
        if state["window"] is not None:
            self.window = WindowReport(**state["window"])


class PruningStudy:
    """A network pruned by M-FAC, by the diagonal of its Fisher matrix, and by magnitude.

    Args:
        run: the matrix that predicts the loss.
        aim: how much is to go.
        candidates: of what.
        options: of the windows.
        seed: of sampled rows.
        rewriting: how the weights will be kept, whose types may be narrower than the model's: they
            are as good as they are then. None where they are not.
    """

    lasting = False

    def __init__(
        self,
        run: Run,
        aim: Aim,
        candidates: Candidates,
        options: WindowOptions,
        seed: int,
        rewriting: Rewriting | None = None,
    ) -> None:
        require_room(run.problem, candidates)
        self.run, self.aim, self.options, self.seed = run, aim, options, seed
        self.candidates, self._rewriting = candidates, rewriting
        parameters = self.problem.parameters
        self.original = parameters.flatten([t.detach().double().cpu() for t in parameters.tensors])
        zeros = self.original[self.candidates.columns] == 0
        self.targets = list(self.candidates.targets(aim, zeros))
        self.networks = {name: Pruned(self.original.clone(), zeros.clone()) for name in METHODS}
        self.before = _as_proven(self.problem)
        self.predicted: tuple[float, float] | None = None  # linear and quadratic

    @property
    def problem(self) -> Problem:
        """What is pruned."""
        return self.run.problem

    @property
    def pruned(self) -> Pruned:
        """The network that is written."""
        return self.networks[MFAC]

    def as_written(self, weights: Tensor) -> Tensor:
        """Weights ``(d,)`` as the model has them that reads them again."""
        rounded = weights.to(self.problem.dtype).double()
        if self._rewriting is not None:
            places = self.candidates.columns.sort().values
            rounded[places] = self._rewriting.rounded(rounded[places])
        return rounded

    def files(self, weights: Tensor) -> dict[str, tuple[str, Callable[[BinaryIO], None]]]:
        """A checkpoint of such weights, by the kinds, names and writers of its files."""
        if self._rewriting is None:
            return {}
        return self._rewriting.files(weights[self.candidates.columns.sort().values], "prune")

    @property
    def ready(self) -> bool:
        """Whether M-FAC has come to the sparsity, or some way there."""
        return bool(self.pruned.qualities)

    def state_dict(self) -> State:
        """Of each network what its last whole step has left: windows are collected anew."""
        networks = {name: network.state_dict() for name, network in self.networks.items()}
        return {"networks": networks, "predicted": self.predicted}

    def load_state_dict(self, state: State) -> None:
        """Go on from where another was."""
        if state["predicted"] is not None:
            linear, quadratic = state["predicted"]
            self.predicted = linear, quadratic
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])

    def expected(self, pace: Pace) -> Iterator[Work]:
        """Its stages."""
        return stages(self.problem, self.candidates, self.options, self.aim.steps, pace)

    def steps(self) -> Iterator[Snapshot]:
        """M-FAC's network first, then the others, and what was to be expected of it."""
        for name, network in self.networks.items():
            phase = self._phase(name)
            total = float(len(self.targets))
            for targets in self.targets[len(network.qualities) :]:
                yield Snapshot(phase=phase, done=float(len(network.qualities)), total=total)
                self._step(name, network, targets)
                self.run.operator.meter.keep()
            if not network.is_recalibrated:
                yield Snapshot(phase=phase, done=total, total=total)
                network.recalibrated = self._recalibrated(network.weights, phase)
                network.is_recalibrated = True
                self.run.operator.meter.keep()
        if self.predicted is None:
            yield Snapshot(phase=_PREDICTING)
            self.predicted = self._predicted()
            self.run.operator.meter.keep()

    # -- a step --------------------------------------------------------------------------------

    def _step(self, name: str, network: Pruned, targets: list[tuple[slice, int]]) -> None:
        """Choose what goes, let the others make up for it, and see how good it is then.

        All is done before anything is kept: a step that ends within leaves the network as it was.
        """
        columns, stays = self.candidates.columns, ~network.gone
        weights = network.weights.clone()
        kept = weights[columns]
        costs = torch.full((len(columns),), -1.0, dtype=torch.float64, device="cpu")
        leverage, report = network.leverage, network.window
        if not bool(stays.any()):  # few weights go in fewer steps
            gone = network.gone
        elif name == "magnitude":
            costs[stays] = kept[stays].square()
            gone = self._least(costs, network.gone, targets)
        elif name == "diagonal-fisher":
            with at(self.problem, weights):
                squares, damping = self._diagonal(columns[stays], len(network.qualities))
            costs[stays] = saliencies(kept[stays], 1 / (squares + damping))
            gone = self._least(costs, network.gone, targets)
        else:
            with at(self.problem, weights):
                collected = self._collect(stays, len(network.qualities))
            with collected.window:
                fisher, inside = collected.fisher, self._inside(stays)
                diagonal = fisher.diagonal().cpu()
                leverage = leverage.clone()
                leverage[stays] = (1 - fisher.damping * diagonal)[stays[inside]]
                own = kept[inside].to(self.problem.device)
                if (pattern := self.aim.pattern) is None:
                    costs[stays] = saliencies(kept[stays], diagonal)
                    gone = least(costs, targets)
                else:
                    blocks, each = fisher.groups(pattern.size), own.view(-1, pattern.size)
                    choice, cost = cheapest_patterns(each, blocks, pattern.count)
                    gone = by_groups(choice.cpu(), cost.cpu(), network.gone, targets, pattern)
                now = gone[inside].to(self.problem.device)
                on_step = self.run.clock.watch(_PRUNING)
                weights[columns[inside]] += compensation(fisher, own, now, on_step).cpu()
                work = fisher.work
                self._count(work.built + work.diagonal + work.compensated)
                if pattern is not None:
                    self._count(work.diagonal)  # groups take as long
                report = collected.report()
        weights[columns[gone]] = 0
        quality = self._quality(weights, self._phase(name))
        network.weights, network.gone = weights, gone
        network.leverage, network.window = leverage, report
        share = float(gone.double().mean())
        network.qualities.append(PrunedQuality(sparsity=share, **vars(quality)))

    def _count(self, work: Algebra) -> None:
        self.run.operator.meter.add(self.problem.algebra(work))

    def _least(self, costs: Tensor, gone: Tensor, targets: list[tuple[slice, int]]) -> Tensor:
        """What goes where each weight costs what it costs alone."""
        if (pattern := self.aim.pattern) is None:
            return least(costs, targets)
        return in_groups(costs, gone, targets, pattern)

    def _inside(self, stays: Tensor) -> Tensor:
        """Which have a column in the window: whole groups, in which what is gone has zeros."""
        return stays if self.aim.pattern is None else torch.ones_like(stays)

    def _rows(self, step: int) -> Iterator[Tensor]:
        """A window's rows, with labels of their own at each step."""
        kind, _ = kind_of(self.problem, self.options.rows)
        source = Rows(self.problem, kind, self.seed + step, self.run.operator.meter)
        on_step = self.run.clock.watch("collecting gradients")
        for block in source.take(self.options.count(self.problem)):
            on_step()
            yield block

    def _collect(self, stays: Tensor, step: int) -> Collected:
        """A window of what is left, at the weights as they are."""
        problem, options, watch = self.problem, self.options, self.run.clock.watch
        inside, pattern = self._inside(stays), self.aim.pattern
        columns = self.candidates.columns[inside].to(problem.device)
        there = stays[inside].to(problem.device)
        window = GradientWindow(
            options.count(problem),
            len(columns),
            dtype=options.torch_dtype,
            path=options.file,
            device=problem.device,
        )
        for block in self._rows(step):
            rows = block[:, columns]
            window.extend(rows if pattern is None else rows * there)
            self._count(stored(len(rows), window.columns, window.dtype))
        layers = [int(inside[place].sum()) for place in self.candidates.layers.values()]
        multiple = 1 if pattern is None else pattern.size
        held = [size for size in layers if size]
        sizes = block_sizes(held, options.blocks, window.count, multiple)
        damping = damping_of(window, options)
        fisher = StaticFisher(window, damping, blocks=sizes, on_step=watch("inverting"))
        kind, reason = kind_of(problem, options.rows)
        return Collected(window, fisher, sizes, kind, reason, options)

    def _diagonal(self, columns: Tensor, step: int) -> tuple[Tensor, float]:
        """Mean squares of rows, and the damping that M-FAC would have."""
        total, count = torch.zeros(len(columns), dtype=torch.float64, device="cpu"), 0
        for block in self._rows(step):
            total += block[:, columns.to(block.device)].double().square().sum(0).cpu()
            count += len(block)
        squares = total / count
        options = self.options
        return squares, options.damping * (1 if options.absolute else float(squares.mean()))

    # -- how good weights are --------------------------------------------------------------------

    @staticmethod
    def _phase(name: str) -> str:
        return _PRUNING if name == MFAC else _COMPARING

    def _quality(self, weights: Tensor, phase: str) -> Quality:
        with at(self.problem, self.as_written(weights)):
            return self._here(phase)

    def _recalibrated(self, weights: Tensor, phase: str) -> Quality | None:
        if not norms_of(self.problem.model):
            return None
        on_step = self.run.clock.watch(phase)
        with (
            at(self.problem, self.as_written(weights)),
            recalibrated(self.problem, self.run.operator.meter, on_step),
        ):
            return self._here(phase)

    def _here(self, phase: str) -> Quality:
        loss, accuracy = measured(self.problem, self.run.clock.watch(phase))
        self.run.operator.meter.add(FORWARD, self.problem.joint_share)
        known = accuracy if self.before.accuracy is not None else None
        return Quality(loss=loss if math.isfinite(loss) else None, accuracy=known)

    def _predicted(self) -> tuple[float, float]:
        """Linear and quadratic part of the change of the loss of the data."""
        problem, operator = self.problem, self.run.operator.in_full()
        change = self.as_written(self.pruned.weights) - self.original
        moved = change.to(problem.device)
        product = operator.apply(moved[None])[0].double().cpu()
        gradient = problem.prove().gradient.cpu()
        linear = gradient @ change - problem.weight_decay * (self.original @ change)
        quadratic = (product @ change - problem.weight_decay * (change @ change)) / 2
        return float(linear), float(quadratic)


# -- What it will take -----------------------------------------------------------------------------


def stages(
    problem: Problem, candidates: Candidates, options: WindowOptions, steps: int, pace: Pace
) -> Iterator[Work]:
    """Windows and losses of each step, and a product."""
    rows = rows_to_be_had(problem, options)
    window = collecting(problem, options, rows, pace)
    loss = pace.gradients(FORWARD / problem.gradient_cost)
    own = window.spent + inverting(problem, options, rows).spent.times(2) + loss
    again = loss.times(2.0) if norms_of(problem.model) else loss.times(0.0)
    held = window.num_bytes + needed_bytes(problem, candidates)
    note = f"{steps} steps; {window.note}"
    yield Work(phase=_PRUNING, spent=own.times(steps) + again, num_bytes=held, note=note)
    others = (window.spent + loss.times(2.0)).times(steps) + again.times(2.0)
    yield Work(phase=_COMPARING, spent=others)
    yield Work(phase=_PREDICTING, spent=pace.products(1))


_EACH, _EACH_CANDIDATE = 8 * (2 + len(METHODS)), 9 * len(METHODS) + 8 * 20
"""Bytes of a parameter, whose weight is kept once, in each network, and in a step; and of one that
may go: whether it has, its leverage, and a step's vectors, of which about twenty are there at once
(66 times the weights in float32 were seen at 19 million, with a window of eight rows)."""


def needed_bytes(problem: Problem, candidates: Candidates) -> int:
    """What the networks take, all in float64, beside the windows."""
    return _EACH * problem.parameters.size + _EACH_CANDIDATE * candidates.count


def require_room(problem: Problem, candidates: Candidates) -> None:
    """See that the networks fit into memory, before any of it is taken.

    Raises:
        UsageError: they do not.
    """
    needed, room = needed_bytes(problem, candidates), room_for_more(torch.device("cpu"))
    if needed > room:
        raise UsageError(
            "the pruned networks do not fit in the memory that is free",
            f"{problem.parameters.size} weights by {len(METHODS)} methods in float64 take "
            f"{human_bytes(needed)}, and there is room for {human_bytes(room)}",
            f"--params for at most {room // (_EACH + _EACH_CANDIDATE)} of them, or more memory",
        )


def _as_proven(problem: Problem) -> Quality:
    """Of the data alone, at the weights that the proof was of."""
    proof = problem.prove()
    squares = sum(float(t.detach().double().square().sum()) for t in problem.trainable.tensors)
    return Quality(loss=proof.loss - problem.weight_decay / 2 * squares, accuracy=proof.accuracy)


def at(problem: Problem, weights: Tensor) -> AbstractContextManager[None]:
    """A problem at other weights ``(d,)``, which are put back."""
    return written(problem.parameters.tensors, problem.parameters.split(weights))
