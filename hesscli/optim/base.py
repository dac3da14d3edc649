"""What the optimizers share: a step from losses that they differentiate themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscli.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
Sums = dict[Tensor, Tensor]
"""Of some parameters, a tensor of the same shape."""


class LossOptimizer(torch.optim.Optimizer):
    """Steps are made of what losses have as derivatives, which it takes by ``autograd.grad``.

    The derivatives of one step add up in ``.grad``, and in products with the Hessian beside it,
    until the step uses them up: with parts of a batch, each loss is to be its part's share.

    Args:
        params: tensors, or groups of them with options of their own.
        defaults: the options of groups without.
        replicas: processes with the same model, over which derivatives are averaged.

    Attributes:
        steps: how many were taken.
    """

    def __init__(
        self, params: Params, defaults: dict[str, Any], replicas: ProcessGroup | None
    ) -> None:
        super().__init__(params, defaults)
        self.replicas, self.steps = replicas, 0
        self._products: Sums = {}
        self._averaged = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in more parameters.

        Raises:
            UsageError: an option, or the type of a parameter, cannot be meant.
        """
        self._check(self.defaults | param_group)
        super().add_param_group(param_group)
        for tensor in self.param_groups[-1]["params"]:
            if not tensor.is_floating_point():
                raise UsageError("parameters must be real", str(tensor.dtype), "leave it out")

    def step(self, loss: Tensor | Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Move the parameters. What a step was made of is used up: ``zero_grad`` has no work.

        Args:
            loss: a scalar whose graph is used up, or a function that makes one and leaves
                ``backward`` alone; None where all of it was accumulated.

        Returns:
            The loss, without a graph.
        """
        if callable(loss):
            with torch.enable_grad():
                loss = loss()
        if loss is not None:
            self.accumulate(loss)
        self._average()
        with torch.no_grad():
            self._move()
        self.steps += 1
        self.zero_grad()
        return None if loss is None else loss.detach()

    def accumulate(self, loss: Tensor) -> None:
        """Add the derivatives of a loss to those that the next step is made of.

        Args:
            loss: a scalar, whose graph is used up.
        """
        with torch.enable_grad():
            self._differentiate(loss)
        self._averaged = False

    @torch.no_grad()
    def scale(self, factor: float | Tensor) -> None:
        """Multiply all that the next step is made of, gradient and Hessian alike.

        So a sum over tokens becomes their mean, once it is known how many there were.
        """
        for tensor in self._parameters():
            if tensor.grad is not None:
                tensor.grad = tensor.grad * factor
        self._products = {tensor: product * factor for tensor, product in self._products.items()}

    def clip(self, max_norm: float) -> Tensor:
        """Scale the next step's derivatives so that the gradient's norm is at most this.

        Returns:
            The norm before, over all parameters and of the average over the replicas.
        """
        self._average()
        with torch.no_grad():
            gradients = [p.grad for p in self._parameters() if p.grad is not None]
            wide, device = wide_dtype(*gradients), self._parameters()[0].device
            norms = [torch.linalg.vector_norm(each, dtype=wide).to(device) for each in gradients]
            norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
            self.scale((max_norm / norm).clamp(max=1))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was accumulated for a step."""
        super().zero_grad(set_to_none)
        self._products = {}
        self._averaged = False

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from between two steps, by reference as torch's own are."""
        saved = super().state_dict()
        saved["state"] = {index: self._packed(own) for index, own in saved["state"].items()}
        return saved | {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where another of the same parameters was; of what it has copies are made."""
        super().load_state_dict(state_dict | {"state": {}})  # which would cast it to half types
        self.steps = state_dict["steps"]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for tensor, index in zip(self._parameters(), saved, strict=True):
            if index in state_dict["state"]:
                self.state[tensor] = self._unpacked(tensor, state_dict["state"][index])
        self.zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **super().__getstate__()}

    # -- What each optimizer has of its own --------------------------------------------------------

    def _check(self, options: dict[str, Any]) -> None:
        """See that a group's options can be meant.

        Raises:
            UsageError: one cannot.
        """
        require("lr", options["lr"], options["lr"] >= 0, "lr=0.1")
        require("weight_decay", options["weight_decay"], options["weight_decay"] >= 0, "0.01")

    def _differentiate(self, loss: Tensor) -> None:
        """Add a loss's derivatives to the sums."""
        self._add(self._gradient(loss))

    def _has_products(self) -> bool:
        """Whether the next step is made of products with the Hessian besides the gradient."""
        return False

    def _move(self) -> None:
        """Move the parameters that have a gradient."""
        raise NotImplementedError

    def _move_one(self, tensor: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        """θ ← θ − lr (direction + w θ), rounded once where a parameter is of a half type."""
        lr = float(group["lr"])
        moved = tensor.to(direction.dtype)  # itself, unless it is of a half type
        if group["weight_decay"]:
            moved.mul_(1 - lr * group["weight_decay"])
        moved.sub_(direction, alpha=lr)
        if moved is not tensor:
            tensor.copy_(moved)

    def _packed(self, state: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state as tensors and numbers."""
        return state

    def _unpacked(self, tensor: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state from a copy of such tensors."""
        raise NotImplementedError

    # -- What they have in common ------------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        return [tensor for group in self.param_groups for tensor in group["params"]]

    def _gradient(self, loss: Tensor, *, create_graph: bool = False) -> Sums:
        """The gradient in each parameter that the loss reaches."""
        tensors = [p for p in self._parameters() if p.requires_grad]
        parts = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True)
        return {p: part for p, part in zip(tensors, parts, strict=True) if part is not None}

    @torch.no_grad()
    def _add(self, gradient: Sums) -> None:
        """Add to what ``.grad`` holds; autograd's parts may share memory."""
        for tensor, part in gradient.items():
            part = part.to_dense() if part.is_sparse else part.detach().clone()
            tensor.grad = part if tensor.grad is None else tensor.grad + part

    @torch.no_grad()
    def _average(self) -> None:
        """Average over replicas; one that a parameter has not been reached in counts as zero.

        What is averaged already stays as it is, as often as this is done.
        """
        if self.replicas is None or self._averaged:
            return
        import torch.distributed as dist

        tensors = self._parameters()
        sums = [tensor.grad for tensor in tensors]
        if self._has_products():
            sums += map(self._products.get, tensors)
        like = tensors * (len(sums) // len(tensors))
        wide, device = wide_dtype(*tensors), tensors[0].device
        parts = [torch.tensor([float(part is not None) for part in sums], device=device)]
        for part, tensor in zip(sums, like, strict=True):
            parts.append((torch.zeros_like(tensor) if part is None else part).flatten())
        flat = torch.cat([part.to(device, wide) for part in parts])
        dist.all_reduce(flat, group=self.replicas)
        flat /= dist.get_world_size(self.replicas)
        reached, *means = torch.split(flat, [part.numel() for part in parts])
        for i, share in enumerate(reached.tolist()):
            mean = means[i].view_as(like[i]).to(like[i].device)
            if share and i < len(tensors):
                like[i].grad = mean.to(like[i].dtype)
            elif share:
                self._products[like[i]] = mean
        self._averaged = True


def require(name: str, value: object, holds: bool, hint: str) -> None:
    """See that an option can be meant.

    Raises:
        UsageError: it cannot.
    """
    if not holds:
        raise UsageError(f"{name} cannot be meant", repr(value), hint)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of what is kept of some parameters: float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
