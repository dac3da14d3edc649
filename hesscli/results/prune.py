"""What ``hesscli prune`` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from hesscli.results.header import IN_FILES, Answer, Layer
from hesscli.results.ihvp import WindowReport

PruningMethod = Literal["mfac", "magnitude", "diagonal-fisher"]


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How many weights are zero, of those that may go: ``asked`` and ``reached`` as shares."""

    asked: float
    reached: float
    num_weights: int
    num_zeros: int


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of a network on all kept examples: the loss of the data, without weight decay.

    It has no error bar: the weights were chosen by the same examples, so that how much these
    differ says little of others.

    ``loss`` is None where it is not finite, ``accuracy`` where there is none.
    """

    loss: float | None
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class PrunedQuality(Quality):
    """The same after a step, at which so large a share of the weights was zero."""

    sparsity: float


@dataclass(frozen=True, kw_only=True)
class PrunedBy(Quality):
    """What a method came to, with the same number of zeros and on the same examples.

    ``recalibrated`` is the same network with the running statistics of its batch norms taken anew;
    None where it has none. ``steps`` are all that the method came through, the last included.
    """

    name: PruningMethod
    recalibrated: Quality | None
    steps: tuple[PrunedQuality, ...]


@dataclass(frozen=True, kw_only=True)
class LayerPruned(Layer):
    """A layer, and what of it went.

    Attributes:
        num_weights: that may go; biases, gains and other vectors stay.
        num_zeros: those that are zero now.
        leverage: 1 − λ [(F̂ + λI)⁻¹]_qq, the median of the weights, each as the last window had
            it that it was in: how much that says of them, from 0 to 1. None where none was in one.
    """

    num_weights: int
    num_zeros: int
    leverage: float | None


@dataclass(frozen=True, kw_only=True)
class PruneResult(Answer):
    """The answer of ``hesscli prune``.

    Attributes:
        steps: in which the weights went, the window being collected anew at each.
        per_layer: whether each layer has the sparsity, and not all of them together.
        pattern: N:M, where of each M weights for consecutive inputs no more than N were to stay;
            RxC, where blocks of R outputs by C inputs were to go or stay whole.
        before: the network as it was.
        methods: M-FAC, whose weights are written, and what it is compared with.
        predicted: the change of the loss of the data by M-FAC that its gradient and the matrix
            foresee, to second order and so without an error bar; None where the run ended before.
        holds: whether that is off by no more than 10% of |linear| + |quadratic|; None where it is
            not known, or the loss is not finite.
        window: of the last step.
        weights: arrays by parameter, in ``state_dict``'s names and without buffers.
        checkpoint: the names of the files to write, and what writes them, by their kinds; none
            where there is no file that they could be like.
    """

    command: Literal["prune"] = "prune"
    sparsity: Sparsity
    steps: int
    per_layer: bool
    pattern: str | None
    before: Quality
    methods: tuple[PrunedBy, ...]
    predicted: float | None
    holds: bool | None
    window: WindowReport
    layers: tuple[LayerPruned, ...]
    weights: dict[str, Any] = field(default_factory=dict, repr=False, metadata=IN_FILES)
    checkpoint: dict[str, Any] = field(default_factory=dict, repr=False, metadata=IN_FILES)

    def copies(self) -> dict[str, tuple[str, Callable[[BinaryIO], None]]]:
        """The pruned checkpoint."""
        return self.checkpoint

    def __str__(self) -> str:
        """One honest line."""
        found = self.methods[0]
        loss = "not finite" if found.loss is None else f"{found.loss:.4g}"
        was = "not finite" if self.before.loss is None else f"{self.before.loss:.4g}"
        return (
            f"prune: {self.sparsity.num_zeros} of {self.sparsity.num_weights} weights are zero, "
            f"loss {was} before and {loss} after, {self.end}"
        )
