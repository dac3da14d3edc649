"""M-FAC: gradients times the inverse Fisher matrix of a window of the last of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscli.engines.mfac import GradientWindow, WindowedFisher
from hesscli.errors import HesscliError, UnsoundError, UsageError
from hesscli.optim.base import LossOptimizer, Params, wide_dtype
from hesscli.optim.refusals import require

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MFAC(LossOptimizer):
    """Frantar, Kurtic & Alistarh 2021, arXiv 2107.03356, section 3.3: "the dynamic algorithm".

    With the last n gradients g_i, of all parameters as one vector, n the number that there are
    until the window is full, and g the newest of them,

        F̂ = (1/n) Σ g_i g_iᵀ          v ← μ v + (1 − μ) (F̂ + λI)⁻¹ g          θ ← θ − lr (v + w θ)

    The decay w is decoupled, and never in the window. A step reads the window twice: for the new
    row's inner products with the others, and for its product with the inverse, which is a sum of
    rows. What is kept has float32 at least, but for rows in bfloat16 where that is asked for. A
    parameter that no loss reaches stays as it is, and counts as zero in the window's row.

    ``loss.backward()`` and ``step()`` do as well as ``step(loss)``: no more than a gradient is
    wanted.

    Args:
        params: tensors, or groups of them; ``lr``, ``momentum`` and ``weight_decay`` may differ by
            group.
        lr: learning rate.
        momentum: μ.
        weight_decay: w.
        window: how many gradients there is room for, 4 bytes an entry in float32.
        damping: λ, absolute.
        window_dtype: that rows are kept in; default the parameters', float32 at least.
        replicas: processes with the same model, over which gradients are averaged; each has the
            window.

    Raises:
        UsageError: an option that cannot be meant.

    >>> import torch
    >>> weights = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = MFAC([weights], lr=1.0, damping=25.0)
    >>> optimizer.step(weights.square().sum() / 2)
    tensor(12.5000)
    >>> weights.tolist()  # g gᵀ + λI has g as an eigenvector, of eigenvalue ‖g‖² + λ = 50
    [2.94..., 3.92...]
    """

    _options = ("window", "damping", "window_dtype")
    _kept = ("steps", "window", "fisher")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        window: int = 1024,
        damping: float = 1e-5,
        window_dtype: torch.dtype | None = None,
        replicas: ProcessGroup | None = None,
    ) -> None:
        require("window", window, window >= 1, "window=1024")
        require("damping", damping, 0 < damping < float("inf"), "damping=1e-5")
        self.window, self.damping, self.window_dtype = window, damping, window_dtype
        self._fisher: WindowedFisher | None = None
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, replicas)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in more parameters, before the first step.

        Raises:
            UsageError: an option, or the type of a parameter, cannot be meant; or there are rows
                without these parameters already.
        """
        if self._fisher is not None:
            raise UsageError(
                "parameters that the window has no columns for",
                f"a group after {self.steps} steps",
                "all groups from the start, with requires_grad_(False) for what is to wait",
            )
        super().add_param_group(param_group)

    def state_dict(self, *, window: bool = True) -> dict[str, Any]:
        """All there is to go on from between two steps, by reference as torch's own are.

        Args:
            window: whether with the rows, without which the window begins anew.
        """
        fisher = self._fisher.state_dict() if window and self._fisher is not None else None
        return super().state_dict() | {"window": self.window, "fisher": fisher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where another of the same parameters was; of what it has copies are made.

        Raises:
            UsageError: its window is another, or it is of another optimizer or other parameters.
        """
        self._require_own(state_dict)
        fisher, new = state_dict["fisher"], None
        if fisher is not None:
            new, rows = self._new_fisher(), fisher["window"]["rows"]
            room, pushes = new.window.capacity, fisher["window"]["pushes"]
            if rows.shape != (min(room, pushes), new.window.columns):
                raise UsageError(
                    "a window of another size",
                    f"{len(rows)} rows of {rows.shape[1]}, of {pushes}",
                    f"MFAC(..., window={state_dict['window']}) with the same parameters",
                )
            new.load_state_dict(fisher)
        super().load_state_dict(state_dict)
        self._fisher = new

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        require("momentum", options["momentum"], 0 <= options["momentum"] < 1, "momentum=0.9")

    def _row_dtype(self) -> torch.dtype:
        return self.window_dtype or wide_dtype(*self._parameters())

    def _new_fisher(self) -> WindowedFisher:
        tensors, dtype = self._parameters(), self._row_dtype()
        columns = sum(tensor.numel() for tensor in tensors)
        try:
            window = GradientWindow(self.window, columns, dtype=dtype, device=tensors[0].device)
        except UsageError as error:
            raise _in_python(error) from error
        return WindowedFisher(window, self.damping, enough=_ENOUGH)

    def _follow(self) -> None:
        super()._follow()
        if (before := self._fisher) is not None:
            first, dtype = self._parameters()[0], self._row_dtype()
            if (before.window.device, before.window.dtype) != (first.device, dtype):
                self._fisher = self._new_fisher()
                self._fisher.load_state_dict(before.state_dict())

    def _move(self) -> None:
        tensors = self._parameters()
        if all(tensor.grad is None for tensor in tensors):
            return
        if self._fisher is None:
            self._fisher = self._new_fisher()
        directions = torch.split(self._preconditioned(self._fisher), [p.numel() for p in tensors])
        places = dict(zip(tensors, directions, strict=True))
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    direction = places[tensor].view_as(tensor)
                    direction = direction.to(tensor.device, wide_dtype(tensor))
                    self._move_one(tensor, self._with_momentum(tensor, direction, group), group)

    def _preconditioned(self, fisher: WindowedFisher) -> Tensor:
        """(F̂ + λI)⁻¹ g ``(d,)``, with g in the window.

        Raises:
            UnsoundError: λ is lost in rounding.
        """
        tensors = self._parameters()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in tensors]
        row = torch.cat([part.flatten().to(tensors[0].device) for part in parts])
        try:
            return fisher.member(fisher.push(row)).vector
        except UnsoundError as error:
            raise _in_python(error) from error

    def _with_momentum(self, tensor: Tensor, direction: Tensor, group: dict[str, Any]) -> Tensor:
        if not group["momentum"]:
            return direction
        state = self.state[tensor]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(direction)
        found: Tensor = state["momentum"].lerp_(direction, 1 - group["momentum"])
        return found


_ENOUGH = 0.1
"""Bound of a step's relative error that is left to float32. What was seen is a hundredth of the
bound, and of a gradient's own noise much less."""
_NOT_HERE = r"(, )?--window-file FILE or \d+ ranks with as much memory each"
"""Ways to a window that an optimizer has not: each replica keeps a whole one, in memory."""
_WORDS = {
    "--window-dtype ": "window_dtype=torch.",
    "--window ": "window=",
    "--damping abs:": "damping=",
}


def _in_python(error: HesscliError) -> HesscliError:
    """An engine's error, with options as they are typed here."""
    got, hint = error.got, re.sub(_NOT_HERE, "", error.hint) or "fewer parameters"
    for typed, ours in _WORDS.items():
        got, hint = got.replace(typed, ours), hint.replace(typed, ours)
    return type(error)(error.what, got, hint)
