"""What the optimizers share: a step from losses that they differentiate themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscli.arithmetic import in_full_precision
from hesscli.errors import UnsoundError, UsageError
from hesscli.optim.refusals import (
    Sums,
    require,
    require_own_numbers,
    require_reached,
    tell_of_others,
    tells_backward_alone,
)
from hesscli.torch_private import times_written

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class LossOptimizer(torch.optim.Optimizer):
    """Steps are made of what losses have as derivatives, which it takes by ``autograd.grad``.

    The derivatives of one step add up in ``.grad``, and in products with the Hessian beside it,
    until the step uses them up: with parts of a batch, each loss is to be its part's share. Of
    parameters in a half type the state has what rounding takes from them, so that small steps add
    up as they would in float32.

    ``scaler.scale`` of a ``torch.amp.GradScaler`` may multiply the losses: its ``step`` has all
    derivatives divided again.

    Args:
        params: tensors, or groups of them with options of their own.
        defaults: the options of groups without.
        replicas: processes with the same model, over which derivatives are averaged.

    Attributes:
        steps: how many were taken.
    """

    _step_supports_amp_scaling = True
    """GradScaler leaves it to :meth:`step` to divide what it has multiplied, and says by what."""
    grad_scale: Tensor | None
    found_inf: Tensor
    _options: tuple[str, ...] = ()
    """Those that all groups share."""
    _kept: tuple[str, ...] = ("steps",)
    """What a state has beside the groups and their tensors."""

    def __init__(
        self, params: Params, defaults: dict[str, Any], replicas: ProcessGroup | None
    ) -> None:
        super().__init__(params, defaults)
        self.replicas, self.steps = replicas, 0
        self._products: Sums = {}
        self._averaged = self._knows_of_others = self._has_looked = False

    def __repr__(self) -> str:
        """Its options, and those of each group."""
        name, _, groups = super().__repr__().partition("\n")
        own = (f"{option}: {getattr(self, option)}" for option in self._options)
        return "\n".join((name, *own, groups))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in more parameters.

        Raises:
            UsageError: an option, or a parameter, cannot be meant.
        """
        for name in self._options:
            if name in param_group:
                what, hint = f"{name} is one for all groups", f"{type(self).__name__}(..., {name}="
                raise UsageError(what, f"a group with {name}={param_group[name]}", f"{hint}...)")
        self._check(self.defaults | param_group)
        with warnings.catch_warnings(action="ignore"):  # a parameter that is there twice is refused
            super().add_param_group(param_group)
        try:
            require_own_numbers(self.param_groups[-1]["params"])
        except UsageError:
            del self.param_groups[-1]
            raise

    def step(self, loss: Tensor | Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Move the parameters. What a step was made of is used up: ``zero_grad`` has no work.

        Args:
            loss: a scalar whose graph is used up, or a function that makes one; None where all of
                it was accumulated. What the function differentiates itself is not differentiated
                again.

        Returns:
            The loss, without a graph.

        Raises:
            UnsoundError: a derivative is not finite, and nothing has moved.
        """
        try:
            loss = self._differentiated(loss)
            self._settle()
            with torch.no_grad(), self._in_full(), in_full_precision():
                if self._unscaled():
                    self._require_finite()
                    self._follow()
                    self._move()
                    self.steps += 1
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # GradScaler takes them back from a step made
                self.__dict__.pop(name, None)
            raise
        finally:
            self.zero_grad()
        return None if loss is None else loss.detach()

    def accumulate(self, loss: Tensor) -> None:
        """Add the derivatives of a loss to those that the next step is made of.

        Args:
            loss: a scalar, whose graph is used up.
        """
        if self.replicas is None and not self._knows_of_others:
            self._knows_of_others = True
            tell_of_others()
        with torch.enable_grad(), self._in_full():
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

        Raises:
            UsageError: a bound below 0.
        """
        require("max_norm", max_norm, max_norm >= 0, "max_norm=1.0")
        self._settle()
        with torch.no_grad():
            gradients = self._gradients()
            wide, device = wide_dtype(*gradients), self._parameters()[0].device
            norms = [torch.linalg.vector_norm(each, dtype=wide).to(device) for each in gradients]
            zero = torch.zeros((), device=device)
            norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else zero
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
        """Go on from where another of the same parameters was; of what it has copies are made.

        Raises:
            UsageError: it is of another optimizer, or of other parameters.
        """
        self._require_own(state_dict)
        super().load_state_dict(state_dict | {"state": {}})  # which would cast it to half types
        self.steps = state_dict["steps"]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for tensor, index in zip(tensors, saved, strict=True):
            if index in state_dict["state"]:
                self.state[tensor] = self._unpacked(tensor, state_dict["state"][index])
        self.zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        own = {**self.__dict__, **super().__getstate__()}
        own.pop("step", None)  # a scheduler's, which would step this one and not the copy
        return own

    # -- What each optimizer has of its own --------------------------------------------------------

    def _check(self, options: dict[str, Any]) -> None:
        """See that a group's options can be meant.

        Raises:
            UsageError: one cannot.
        """
        for name, hint in (("lr", "lr=0.1"), ("weight_decay", "weight_decay=0.01")):
            require(name, options[name], 0 <= options[name] < float("inf"), hint)

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
        """θ ← θ − lr (direction + w θ), with Kahan's compensation where θ is of a half type."""
        lr = float(group["lr"])
        moved = self._exactly(tensor, direction.dtype)
        if group["weight_decay"]:
            moved.mul_(1 - lr * group["weight_decay"])
        moved.sub_(direction, alpha=lr)
        if moved is not tensor:
            tensor.copy_(moved)
            self.state[tensor]["compensation"] = moved.sub_(tensor)

    def _exactly(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A parameter with what rounding took from it, which both fit in a wider type exactly.

        Where it has been written meanwhile and is not the rounded sum, it is as it was written.
        """
        wide = tensor.to(dtype)  # itself, unless it is of a half type
        if wide is tensor or (lost := self.state[tensor].get("compensation")) is None:
            return wide
        whole = wide + lost
        return torch.where(whole.to(tensor.dtype) == tensor, whole, wide)

    def _follow(self) -> None:
        """Let states be where their parameters are, and as wide, should these have been moved.

        Raises:
            UsageError: a parameter has another shape than it had.
        """
        for tensor in self._parameters():
            state = self.state.get(tensor, {})
            kept = state.get("momentum", state.get("compensation"))
            if kept is None:
                continue
            like = tensor.device, wide_dtype(tensor), tensor.shape
            if (kept.device, kept.dtype, kept.shape) != like:
                self.state[tensor] = self._unpacked(tensor, self._packed(state))

    def _packed(self, state: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state as tensors and numbers."""
        return state

    def _unpacked(self, tensor: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state from a copy of such tensors.

        Raises:
            UsageError: it is of a tensor of another shape.
        """
        wide = {}
        for name in {"momentum", "compensation"} & state.keys():
            if state[name].shape != tensor.shape:
                raise UsageError(
                    "the state is of other parameters",
                    f"{tuple(state[name].shape)} for one of shape {tuple(tensor.shape)}",
                    "the same parameters in the same order and groups",
                )
            wide[name] = state[name].to(tensor.device, wide_dtype(tensor), copy=True)
        return wide

    def _require_own(self, state_dict: dict[str, Any]) -> None:
        """See that a state is of such an optimizer.

        Raises:
            UsageError: it is not.
        """
        wanted = ("state", "param_groups", *self._kept)
        if missing := [name for name in wanted if name not in state_dict]:
            name = type(self).__name__
            raise UsageError(
                "the state is of another optimizer",
                f"no {' and no '.join(missing)} in it, which {name} keeps",
                f"what state_dict() of {name} has saved; or none, and it begins anew",
            )

    # -- What they have in common ------------------------------------------------------------------

    def _in_full(self) -> ExitStack:
        """Without autocast, which is for forward passes: it would make sums in a half type."""
        stack = ExitStack()
        for kind in {tensor.device.type for tensor in self._parameters()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack

    def _parameters(self) -> list[Tensor]:
        every = (tensor for group in self.param_groups for tensor in group["params"])
        return [tensor for tensor in every if tensor.is_floating_point()]

    def _gradients(self) -> list[Tensor]:
        return [tensor.grad for tensor in self._parameters() if tensor.grad is not None]

    def _differentiated(self, loss: Tensor | Callable[[], Tensor] | None) -> Tensor | None:
        """A step's loss, the derivatives of which are taken unless its closure has done so.

        Raises:
            UsageError: a GradScaler has not seen them.
        """
        is_new = True
        if callable(loss):
            loss, is_new = self._called(loss)
        if loss is None:
            return None
        if hasattr(self, "found_inf"):
            hint = "optimizer.accumulate(scaler.scale(loss)), and then scaler.step(optimizer)"
            raise UsageError("a loss that GradScaler has not looked at", "step(loss)", hint)
        if is_new:
            self.accumulate(loss)
        return loss

    def _called(self, closure: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """A closure's loss, and whether its derivatives are still to be taken.

        Raises:
            UsageError: it has neither given a loss nor differentiated one.
        """
        tensors = self._parameters()
        before = [None if p.grad is None else times_written(p.grad) for p in tensors]
        held = [p.grad for p in tensors]
        with torch.enable_grad():
            loss = closure()
        for tensor, gradient, count in zip(tensors, held, before, strict=True):
            new = tensor.grad
            if new is not None and (new is not gradient or times_written(new) != count):
                self._averaged = False
                return loss, False
        if loss is None:
            raise UsageError("there is no loss", "a closure that returns None", "return loss")
        return loss, True

    def _unscaled(self) -> bool:
        """Undo what a GradScaler has multiplied by; False where that was too large.

        Raises:
            UsageError: it has divided the gradient alone.
        """
        if not hasattr(self, "found_inf"):
            return True
        factor: Tensor | None = self.grad_scale
        if factor is None and self._products:
            raise UsageError(
                "products with the Hessian are scaled, and the gradient is not",
                "scaler.unscale_(optimizer)",
                "step without it; to clip, optimizer.clip(max_norm * scaler.get_scale())",
            )
        if factor is not None:
            self.scale(1 / factor)
        return not float(self.found_inf) and _are_finite(_largest(self._gradients()))

    def _require_finite(self) -> None:
        """See that nothing comes into the state that never leaves it.

        Raises:
            UnsoundError: a gradient or product is not finite.
        """
        gradient = _largest(self._gradients())
        squares = [size.square() for size in _largest(self._products.values())]
        if _are_finite([*gradient, *squares]):
            return
        what = "the square of a product with the Hessian"
        if not _are_finite(gradient):
            what = "a gradient"
        raise UnsoundError(
            f"{what} is not finite",
            f"NaN or infinity after {self.steps} steps",
            "a smaller lr, or optimizer.clip(1.0) before each step",
        )

    def _gradient(self, loss: Tensor, *, create_graph: bool = False) -> Sums:
        """The gradient in each parameter that the loss reaches.

        Raises:
            UsageError: there is none, or not of one number, or it was taken already.
        """
        tensors = [p for p in self._parameters() if p.requires_grad]
        if not tensors:
            hint = "requires_grad_() for those that are to move"
            raise UsageError("there is nothing to move", "all parameters are frozen", hint)
        if not isinstance(loss, Tensor):
            hint = "the tensor that the model's forward pass leads to"
            raise UsageError("a loss must be a tensor", type(loss).__name__, hint)
        if loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}"
            raise UsageError("a loss must be one number", got, "loss.mean()")
        if not loss.requires_grad:
            hint = "a forward pass outside torch.no_grad(), and a loss that is not detached"
            raise UsageError("the loss has no gradient", "a tensor without a graph", hint)
        try:
            parts = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise tells_backward_alone() from error
            if "a second time" not in str(error):
                raise
            raise UsageError(
                "the loss has been differentiated already",
                "its graph is used up, by loss.backward() or a loss that shares it",
                "step(loss) without backward(), which is part of it; of losses that share, the sum",
            ) from error
        found = {p: part for p, part in zip(tensors, parts, strict=True) if part is not None}
        if not found or not (len(found) == len(tensors) or self._has_looked):
            self._has_looked = True
            require_reached(loss, found)
        return found

    @torch.no_grad()
    def _add(self, gradient: Sums) -> None:
        """Add to what ``.grad`` holds; autograd's parts may share memory."""
        for tensor, part in gradient.items():
            if tensor.grad is None:  # whoever dropped it meant its share of a product too
                self._products.pop(tensor, None)
            part = part.to_dense() if part.is_sparse else part.detach().clone()
            tensor.grad = part if tensor.grad is None else tensor.grad + part

    def _settle(self) -> None:
        """Let gradients be dense, which backward() may have made sparse, and averages."""
        for tensor in self._parameters():
            if tensor.grad is not None and tensor.grad.is_sparse:
                tensor.grad = tensor.grad.to_dense()
        self._average()

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


def _largest(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of those of each type, the largest absolute entry: on a device at one stroke."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for each in tensors:
        if each.numel():
            found.setdefault(each.dtype, []).append(each.detach())
    return [torch.nn.utils.get_total_norm(each, float("inf")) for each in found.values()]


def _are_finite(sizes: list[Tensor]) -> bool:
    held = [size.isfinite().to(sizes[0].device) for size in sizes]
    return not held or bool(torch.stack(held).all())


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of what is kept of some parameters: float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
