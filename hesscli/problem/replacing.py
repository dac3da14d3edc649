"""Other functions in the place of torch's own, wherever the user's code calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode


class replacing(TorchFunctionMode):  # noqa: N801 (used as a context manager)
    """Meanwhile, each function of ``by`` is the one that it names; others are as ever."""

    def __init__(self, by: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.by = by

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call what stands in for it."""
        return self.by.get(function, function)(*args, **(kwargs or {}))
