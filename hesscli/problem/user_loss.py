"""A loss of the user's own: a function of what the model returned, whole, and of the targets."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hesscli.problem.batches import (
    Batch,
    is_sliceable,
    map_tensors,
    rows,
    size_of,
    split_batch,
    tensors_of,
)
from hesscli.problem.blame import is_out_of_memory
from hesscli.problem.losses import Loss, returned
from hesscli.problem.outputs import HiddenOutputsError, Layout, rows_of
from hesscli.results import Reduction


class UserLoss(Loss):
    """``fn(what the model returned, targets) -> mean loss``, or its sum; examples count once.

    Where the model returns a single tensor, that is its outputs as it is. Where it returns a tree
    of them, outputs are ``(N, M)``: the tree's tensors side by side, which the function gets back
    as the tree that they were.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Tensor],
        name: str,
        reduction: Reduction | None = None,
    ) -> None:
        self.function, self.name, self.reduction = function, name, reduction
        self._layouts: dict[tuple[int, torch.dtype], Layout] = {}

    def settled(self, model: nn.Module, batches: Iterable[Batch]) -> Loss:
        """The same, without outputs where what the model returns is not one row an example."""
        batch, settled = next(iter(batches)), copy.copy(self)
        try:
            settled.outputs(model, batch)
            if settled._layouts:
                settled.is_claim = True
                settled._look_at_half(model, batch)
        except HiddenOutputsError as error:
            settled.hidden, settled.is_claim = error.got, False
        return settled

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model returned: a tensor as it is, a tree as rows ``(N, M)``.

        Raises:
            HiddenOutputsError: it is no rows of examples.
        """
        raw = returned(model, batch)
        if isinstance(raw, Tensor) and not self._layouts:
            return raw
        found, layout = rows_of(raw, size_of(batch))
        place = found.shape[1], found.dtype
        if not self._layouts.get(place, layout).is_like(layout):
            raise HiddenOutputsError("outputs that are of another form in another batch")
        self._layouts[place] = layout  # its types may be others meanwhile
        return found

    def evaluate(self, model: nn.Module, batch: Batch) -> Tensor:
        """The user's own mean of what the model returned, or sum over the number of examples."""
        return self._mean(returned(model, batch), batch)

    def masses(self, batch: Batch) -> Tensor:
        """One an example."""
        return torch.ones(size_of(batch), dtype=torch.float64)

    def mean(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The same of its rows."""
        return self._mean(self._as_returned(outputs), batch)

    def _mean(self, raw: Any, batch: Batch) -> Tensor:
        value = self.function(raw, split_batch(batch)[1])
        return value / size_of(batch) if self.reduction == "sum" else value

    def mass(self, model: nn.Module, batch: Batch, count: int | None = None) -> float:
        """The number of examples; of a sum, whose parts add up, what it was divided by."""
        return float(size_of(batch) if self.reduction == "sum" or count is None else count)

    def numerators(self, outputs: Tensor, batch: Batch) -> Tensor:
        """By one call an example, all in one where the function goes through vmap."""
        targets = split_batch(batch)[1]

        def alone(i: int) -> Tensor:
            pair = self._as_returned(outputs[i : i + 1]), rows(targets, i, i + 1)
            return self.function(*pair).reshape(())

        mapped = self._mapped(outputs, targets, alone)
        if mapped is not None:
            return mapped
        return torch.stack([alone(i) for i in range(len(outputs))])

    def _mapped(
        self, outputs: Tensor, targets: Any, alone: Callable[[int], Tensor]
    ) -> Tensor | None:
        """All examples at once, or None where that fails or ends differ from those alone."""

        def each(row: Tensor, *leaves: Tensor) -> Tensor:
            own = iter(leaves)
            one = map_tensors(lambda _: next(own)[None], targets)
            return self.function(self._as_returned(row[None]), one).reshape(())

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that vmap maps one by one
                found = torch.func.vmap(each)(outputs, *tensors_of(targets))
            ends = torch.stack([alone(0), alone(len(outputs) - 1)]).detach()
            difference = (found[[0, -1]].detach() - ends).abs()
            coarse = torch.finfo(ends.dtype).eps ** 0.5
            return found if bool((difference <= coarse * ends.abs()).all()) else None
        except Exception as error:  # of any kind: what vmap cannot do shows in many ways
            if is_out_of_memory(error):
                raise
            return None

    def _as_returned(self, outputs: Tensor) -> Any:
        """What the function gets: the outputs, or the tree that they are the rows of."""
        if not self._layouts:
            return outputs
        return self._layouts[outputs.shape[1], outputs.dtype].tree(outputs)

    def _look_at_half(self, model: nn.Module, batch: Batch) -> None:
        """Half a batch has half the rows, unless lengths were equal by chance.

        Raises:
            HiddenOutputsError: it has not.
        """
        if is_sliceable(batch) and size_of(batch) > 1:
            try:
                self.outputs(model, rows(batch, 0, size_of(batch) // 2))
            except HiddenOutputsError:
                raise
            except Exception as error:  # a model may refuse fewer examples
                if is_out_of_memory(error):
                    raise
