"""AdaHessian: gradients divided by a root mean square of the Hessian's diagonal."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hesscli.engines.hutchinson.blocks import Blocks
from hesscli.engines.root_mean_square import RootMeanSquare
from hesscli.errors import UnsoundError, UsageError, first_line
from hesscli.optim.base import LossOptimizer, Params, wide_dtype
from hesscli.optim.refusals import Sums, require, require_dense, require_whole
from hesscli.pairing import paired
from hesscli.randomness import key, rademacher
from hesscli.vocabulary import BlockRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdaHessian(LossOptimizer):
    """Yao, Gholami, Shen, Mustafa, Keutzer & Mahoney 2020, arXiv 2006.00719, algorithm 1.

    For a probe v of independent signs, the diagonal's estimate h is v ⊙ Hv averaged over blocks
    (the paper's "spatial averaging"), and

        m ← β₁ m + (1 − β₁) g          s ← β₂ s + (1 − β₂) h²
        θ ← θ − lr (m̂ / (√ŝ^k + ε) + w θ)

    with m̂ = m / (1 − β₁ᵗ) and ŝ = s / (1 − β₂ᵘ) after t steps and u updates of s, of which there
    are fewer where the Hessian is looked at every few steps only. The decay w is decoupled.

    One step has one set of probes, drawn by a hash of (seed, step, probe, entry), whatever parts
    its batch comes in and on whatever replica: their products add up before they are squared.
    What is kept has float32 at least, and of s one number a block. A parameter that no loss
    reaches stays as it is, and begins to move with the first product that it has.

    Args:
        params: tensors, or groups of them; all options up to ``diagonal`` may differ by group.
        lr: learning rate.
        betas: β₁ and β₂.
        eps: ε, which is added after the power.
        weight_decay: w.
        hessian_power: k.
        blocks: of :class:`hesscli.engines.hutchinson.blocks.Blocks`; ``image`` are those of the
            authors' code for images.
        diagonal: whether a block's mean is of v ⊙ Hv as it is (``signed``, as in the paper), which
            is unbiased for the diagonal's, or of |v ⊙ Hv| (``abs``, as in the authors' code).
        hessian_every: from one product to the next, in steps; the first so many have one each. One
            probe's v ⊙ Hv is next to nothing in some entries, along which steps would be far too
            long until there is another.
        probes: products in an estimate, which is their mean.
        seed: of the probes.
        replicas: processes with the same model, over which gradients and products are averaged.
            The model itself is called, not ``DistributedDataParallel``, which sees no
            ``autograd.grad``.

    Raises:
        UsageError: an option that cannot be meant.

    >>> import torch
    >>> weights = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = AdaHessian([weights], lr=1.0, eps=0.0)
    >>> optimizer.step((torch.tensor([1.0, 1e6]) * weights.square()).sum())
    tensor(1000001.)
    >>> weights.tolist()  # a diagonal Hessian is inverted
    [0.0, 0.0]
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_power: float = 1.0,
        blocks: str = "auto",
        diagonal: Literal["signed", "abs"] = "signed",
        hessian_every: int = 1,
        probes: int = 1,
        seed: int = 0,
        replicas: ProcessGroup | None = None,
    ) -> None:
        require("hessian_every", hessian_every, hessian_every >= 1, "hessian_every=10")
        require("probes", probes, probes >= 1, "probes=1")
        self.hessian_every, self.probes, self.seed = hessian_every, probes, seed
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "blocks": blocks,
            "diagonal": diagonal,
        }
        super().__init__(params, defaults, replicas)

    _options = ("probes", "hessian_every", "seed")
    _kept = ("steps", "seed")

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from between two steps, by reference as torch's own are."""
        return super().state_dict() | {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where another of the same parameters was; of what it has copies are made."""
        super().load_state_dict(state_dict)
        self.seed = state_dict["seed"]

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        betas, power = options["betas"], options["hessian_power"]
        require("betas", betas, all(0 <= beta < 1 for beta in betas), "betas=(0.9, 0.999)")
        require("eps", options["eps"], 0 <= options["eps"] < float("inf"), "eps=1e-4")
        require("hessian_power", power, 0 <= power <= 1, "hessian_power=1")
        require("diagonal", options["diagonal"], options["diagonal"] in ("signed", "abs"), "signed")
        BlockRule.parse(options["blocks"])

    def _has_products(self) -> bool:
        return self.steps < self.hessian_every or self.steps % self.hessian_every == 0

    def _differentiate(self, loss: Tensor) -> None:
        gradient = self._gradient(loss, create_graph=self._has_products())
        if self._has_products():
            require_dense(gradient)
        self._add(gradient)
        live = {p: part for p, part in gradient.items() if part.requires_grad}
        if self.steps == 0:
            require_whole(loss, live)
        for probe in range(self.probes if self._has_products() else 0):
            signs = self._signs(probe)
            last = probe == self.probes - 1
            products = _product(live, signs, list(gradient), retain_graph=not last)
            self._add_products(dict(zip(gradient, products, strict=True)), signs)

    @torch.no_grad()
    def _add_products(self, products: Sums, signs: Sums) -> None:
        """Add v ⊙ Hv, each product's share of an estimate."""
        for tensor, product in products.items():
            entries = product.to(wide_dtype(tensor)) * signs[tensor]
            if self.probes > 1:
                entries /= self.probes
            before = self._products.get(tensor)
            self._products[tensor] = entries if before is None else before.add_(entries)

    def _signs(self, probe: int) -> Sums:
        """A probe of this step, for every parameter there is."""
        tensors = self._parameters()
        sizes, dtype, device = [p.numel() for p in tensors], tensors[0].dtype, tensors[0].device
        stream = key(self.seed, self.steps, probe)
        whole = rademacher(stream, 0, sum(sizes), dtype=dtype, device=device)
        parts = zip(tensors, torch.split(whole, sizes), strict=True)
        return {p: part.view(p.shape).to(p) for p, part in parts}

    def _move(self) -> None:
        reached = {tensor for tensor in self._parameters() if tensor.grad is not None}
        if self._has_products() and not reached <= self._products.keys():
            raise UsageError(
                "a step without a product with the Hessian, which it was to have",
                "a gradient alone",
                "optimizer.step(loss), or optimizer.accumulate(loss) instead of loss.backward()",
            )
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    direction = self._direction(tensor, tensor.grad, group)
                    if direction is not None:
                        self._move_one(tensor, direction, group)

    def _direction(self, tensor: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor | None:
        """m̂ / (√ŝ^k + ε), with m and s brought up to date; None before the first product."""
        product, state = self._products.get(tensor), self.state[tensor]
        if product is None and "curvature" not in state:
            return None
        dtype, blocks = wide_dtype(tensor), _blocks(tuple(tensor.shape), group["blocks"])
        if "curvature" not in state:
            state["steps"], state["momentum"] = 0, torch.zeros_like(tensor, dtype=dtype)
            state["curvature"] = RootMeanSquare(dtype=dtype)
        beta1, beta2 = group["betas"]
        momentum, curvature = state["momentum"], state["curvature"]
        state["steps"] += 1
        momentum.lerp_(gradient.to(dtype), 1 - beta1)
        if product is not None:
            curvature.beta2 = beta2
            entries = product.abs() if group["diagonal"] == "abs" else product
            curvature.update(blocks.means(entries))
        divisor = curvature.value
        if group["hessian_power"] != 1:
            divisor.pow_(group["hessian_power"])
        divisor.add_(group["eps"]).mul_(1 - beta1 ** state["steps"])
        direction: Tensor = momentum / blocks.spread(divisor)
        return direction

    def _packed(self, state: dict[str, Any]) -> dict[str, Any]:
        has_curvature = "curvature" in state
        return state | {"curvature": state["curvature"].state_dict()} if has_curvature else state

    def _unpacked(self, tensor: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        curvature = RootMeanSquare(dtype=wide_dtype(tensor))
        saved = state["curvature"].items()
        curvature.load_state_dict(
            {name: v.to(tensor.device) if isinstance(v, Tensor) else v for name, v in saved}
        )
        return super()._unpacked(tensor, state) | {"steps": state["steps"], "curvature": curvature}


_TWICE = ("derivative", "differentiate", "double backward")
"""One of these is in what torch says of an operation whose gradient has none of its own."""
_CURE = "the same of operations that have a second derivative, or MFAC, which needs but a first"
_CURES = {
    "torch.compile": "a model that is not compiled",
    "attention": "a forward pass within "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    "embedding_bag": "an Embedding, and the mean or sum of what it gives",
}
"""What to try where one of these is in it."""


@lru_cache(maxsize=1024)
def _blocks(shape: tuple[int, ...], rule: str) -> Blocks:
    return Blocks.of(shape, BlockRule.parse(rule))


def _product(
    gradient: Sums,
    signs: Sums,
    tensors: list[Tensor],
    *,
    retain_graph: bool,
) -> list[Tensor]:
    """Hv, from the gradient in the parameters where it is not constant.

    Raises:
        UnsoundError: the loss has no second derivative.
    """
    if not gradient:
        return [torch.zeros_like(tensor, requires_grad=False) for tensor in tensors]
    root = paired(list(gradient.values()), [signs[p] for p in gradient])
    try:
        return list(
            torch.autograd.grad(
                root,
                tensors,
                retain_graph=retain_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    except RuntimeError as error:
        if not any(word in str(error) for word in _TWICE):
            raise
        what, got = "the loss cannot be differentiated twice", first_line(error)
        cure = next((cure for word, cure in _CURES.items() if word in got), _CURE)
        raise UnsoundError(what, got, cure) from error
