"""Σ_i (J_iᵀ s_i)², entry by entry, over the examples of a batch.

One backward pass gives every module's output gradients for all examples; each known module
turns them and its inputs into its parameters' per-example gradients. That a parameter acts
through its module alone, and that rows of the module are examples, is not assumed: on the first
batch of every structure, outputs of some examples are backpropagated with random weights; no
other example's row may then have a gradient, and the sums over examples must be autograd's own
gradients. What fails takes the generic path, which is checked in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator

from torch import Tensor, nn

from hesscli.engines.exact_diagonal.generic import Generic
from hesscli.engines.exact_diagonal.passes import Pass, is_close
from hesscli.engines.exact_diagonal.sites import site_class
from hesscli.parameters import Parameters
from hesscli.problem.batches import rows
from hesscli.problem.blame import is_out_of_memory
from hesscli.problem.problem import Problem, WeightedBatch

_SAMPLE = 16
"""Examples that a verification takes."""


class SquaredJacobian:
    """Per-example vector-Jacobian products of a problem, squared.

    Args:
        problem: its examples must not depend on each other.
        parameters: what to differentiate by.

    ``generic`` holds the positions of parameters that take the generic path, as far as known.
    """

    def __init__(self, problem: Problem, parameters: Parameters) -> None:
        self.problem, self.parameters = problem, parameters
        self.known = _known_modules(problem.model, parameters)
        spoken_for = {i for names in self.known.values() for i in names.values()}
        self.generic = set(range(len(parameters))) - spoken_for
        self.shared: set[nn.Module] = set()
        self.mapper = Generic(problem)
        self._structures: set[Hashable] = set()
        self._part: int | None = None
        self.gradients = 0.0

    def passes(self, batch: WeightedBatch) -> Iterator[tuple[int, Pass]]:
        """Forward passes over parts of a batch, each with the place of its first example.

        A part is as large as a CPU's cache likes the activations, or as a GPU likes its work.
        """
        if self._part is None:
            self._part = self._verified(_cut(batch, 0, _SAMPLE)).fitting
        count = -(-batch.count // self._part)
        bounds = [part * batch.count // count for part in range(count + 1)]
        for start, stop in itertools.pairwise(bounds):
            yield start, self._verified(_cut(batch, start, stop))

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
        """Take modules as they are, else as shared by all examples, else by the generic path."""
        plain = self.problem.fixed_outputs(batch.data)
        live = Pass(self, batch)
        while wrong := live.wrong_modules():
            for module, in_rows in wrong.items():
                if in_rows or module in self.shared or not self._share(module, batch, plain):
                    self._give_up(module)
            live = Pass(self, batch)
        live.check_generic()
        self._structures.add(live.structure)

    def _share(self, module: nn.Module, batch: WeightedBatch, plain: Tensor) -> bool:
        """Let a module repeat its output for every example, unless that changes the model's."""
        self.shared.add(module)
        try:
            outputs = Pass(self, batch).outputs
        except Exception as error:  # of any kind: the model's code expected another shape
            if is_out_of_memory(error):
                raise
            return False
        return outputs.shape == plain.shape and is_close(outputs, plain, plain.norm())

    def _give_up(self, module: nn.Module) -> None:
        self.shared.discard(module)
        self.generic |= set(self.known.pop(module).values())


def _known_modules(model: nn.Module, parameters: Parameters) -> dict[nn.Module, dict[str, int]]:
    """Modules of a known kind, and the places of those parameters that no other module owns."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, name))
    known: dict[nn.Module, dict[str, int]] = {}
    for position, parameter in enumerate(parameters):
        if len(homes := owners[id(parameter.tensor)]) == 1:
            module, name = homes[0]
            if site_class(module) is not None and name in ("weight", "bias"):
                known.setdefault(module, {})[name] = position
    return known


def _cut(batch: WeightedBatch, start: int, stop: int) -> WeightedBatch:
    """Some of a batch's examples; its weight stays the batch's."""
    stop = min(stop, batch.count)
    data = rows(batch.data, start, stop)
    return WeightedBatch(batch.index, data, batch.weight, stop - start)
