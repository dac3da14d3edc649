"""A log of what each step adds to each parameter: ``hesscli symmetry`` predicts charges by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hesscli.errors import UsageError
from hesscli.vocabulary import TrainedWith


class UpdateLog:
    """Keeps the steps of any optimizer while it is entered, and writes them where it is left.

    What a step adds takes as much memory as the parameters do, so that a log is of some hundred
    steps of a small network, or of a few of a large one.

    Args:
        model: whose trainable parameters are told of.
        optimizer: of ``torch.optim``, or of this package.
        path: a .safetensors file, for ``--trained-with updates=FILE``.

    Raises:
        UsageError: the optimizer moves no parameter of the model, the file is there already, or
            its folder is not.

    >>> import tempfile
    >>> model = nn.Linear(3, 2)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> path = Path(tempfile.mkdtemp()) / "log.safetensors"
    >>> with UpdateLog(model, sgd, path) as log:
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     sgd.step()
    >>> len(log), path.exists()
    (1, True)
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path | str
    ) -> None:
        self.path, self._optimizer = Path(path), optimizer
        self._tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._updates: dict[str, list[Tensor]] = {name: [] for name in self._tensors}
        self._rates, self._settings = list[float](), list[TrainedWith]()
        self._before, self._hooks = dict[str, Tensor](), list[Any]()
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not own & {id(p) for p in self._tensors.values()}:
            raise UsageError(
                "the optimizer moves none of the model's parameters",
                f"{type(optimizer).__name__} and {type(model).__name__}",
                "an optimizer of model.parameters()",
            )
        folder = self.path.absolute().parent
        if not folder.is_dir():  # said before the training, and not after it
            raise UsageError("the log's folder does not exist", str(folder), f"mkdir -p {folder}")
        if self.path.exists():
            raise UsageError(
                "a log of updates is there already",
                str(self.path),
                "another path, for one log is of one run; or remove the file first",
            )

    def __len__(self) -> int:
        """Steps so far."""
        return len(self._rates)

    def __enter__(self) -> Self:
        """Look at each step from here on."""
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._begin),
            self._optimizer.register_step_post_hook(self._end),
        ]
        return self

    def __exit__(self, *_raised: object) -> None:
        """Write what there is, whatever has ended the training."""
        for hook in self._hooks:
            hook.remove()
        none = {
            name: tensor.new_empty(0, *tensor.shape, device="cpu")
            for name, tensor in self._tensors.items()
        }
        found = {
            name: torch.stack(each) if each else none[name] for name, each in self._updates.items()
        }
        same = set(self._settings)
        settings = same.pop() if len(same) == 1 else TrainedWith("mixed" if same else None)
        found["lr"] = torch.tensor(self._rates, dtype=torch.float64, device="cpu")
        save_file(found, self.path, metadata={"trained_with": str(settings)})

    def _begin(self, *_step: object) -> None:
        self._before = {name: p.detach().clone() for name, p in self._tensors.items()}

    def _end(self, *_step: object) -> None:
        for name, tensor in self._tensors.items():
            self._updates[name].append((tensor.detach() - self._before[name]).cpu())
        self._before.clear()
        groups = self._optimizer.param_groups
        self._rates.append(float(groups[0]["lr"]))
        settings = TrainedWith.of_groups(groups)
        self._settings.append(settings._replace(lr=None))
