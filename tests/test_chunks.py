"""Cross-entropy a few targets at a time: derivatives against those of its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscli
from hesscli.problem import chunks
from hesscli.problem.freezing import FrozenData
from hesscli.problem.losses import Loss, Summed
from hesscli.problem.named_losses import CrossEntropy, LanguageModel
from hesscli.problem.output_hessian import softmax_products
from hesscli.problem.problem import Problem

F64 = torch.float64


def drawn(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(len(shape)))


def classes(*shape: int, masked: int | None = None) -> Tensor:
    found = torch.randint(5, shape, generator=torch.Generator().manual_seed(7))
    return found if masked is None else found.where(found != 3, masked)


WEIGHTS = [1.0, 2.0, 0.5, 3.0, 0.0]
SOFT = torch.rand(6, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
CASES: dict[str, tuple[Loss, Tensor, Any]] = {
    "classes": (CrossEntropy(), drawn(7, 5), classes(7)),
    "masked": (CrossEntropy(ignore_index=9), drawn(7, 5), classes(7, masked=9)),
    "smoothed": (CrossEntropy(0.2), drawn(7, 5), classes(7, masked=-100)),
    "weighted": (CrossEntropy(0.2, class_weights=WEIGHTS), drawn(9, 5), classes(9, masked=-100)),
    "pixels": (CrossEntropy(0.1), drawn(3, 5, 4, 2), classes(3, 4, 2, masked=-100)),
    "soft": (CrossEntropy(0.1, class_weights=WEIGHTS), drawn(6, 5), SOFT[:, :, 0]),
    "soft pixels": (CrossEntropy(0.1), drawn(6, 5, 3), SOFT),
    "tokens": (LanguageModel(), drawn(3, 4, 5), classes(3, 4, masked=-100)),
    "shifted": (LanguageModel(0.1), drawn(3, 5, 5)[:, :-1], classes(3, 4, masked=-100)),
}


def by_definition(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """−Σ_k w_k q_k log p_k over targets, with smoothed q, by the divisor that torch has."""
    logits = loss.logits(outputs)
    weights = torch.ones(5, dtype=F64) if loss.class_weights is None else loss.class_weights
    weights = weights.view(-1, *[1] * (logits.dim() - 2))
    if targets.is_floating_point():
        shares, masses = targets, torch.ones_like(targets[:, 0])
    else:
        kept = targets != loss.ignore_index
        shares = (torch.arange(5).view(weights.shape) == targets[:, None]).to(F64) * kept[:, None]
        masses = (shares * weights).sum(1)
    smoothed = (1 - loss.label_smoothing) * shares + loss.label_smoothing / 5
    if not targets.is_floating_point():
        smoothed = smoothed * kept[:, None]
    return -(weights * smoothed * logits.log_softmax(1)).sum() / masses.sum()


@pytest.mark.parametrize("size", [1, 11, 24])
@pytest.mark.parametrize("case", CASES)
def test_value_slope_and_products(case: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, outputs, targets = CASES[case]
    monkeypatch.setattr(chunks, "CHUNK", size)
    vector = drawn(*outputs.shape).roll(1, 0)

    def derived(value: Any) -> tuple[Tensor, Tensor, Tensor]:
        live = outputs.clone().requires_grad_()
        mean = value(live)
        (slope,) = torch.autograd.grad(mean, live, create_graph=True)
        return mean.detach(), slope.detach(), torch.autograd.grad((slope * vector).sum(), live)[0]

    found = derived(lambda live: loss.mean(live, (None, targets)))
    truth = derived(lambda live: by_definition(loss, live, targets))
    for one, other in zip(found, truth, strict=True):
        assert (one - other).abs().max() <= 1e-14 * max(1.0, float(other.abs().max()))
    closed = softmax_products(loss, outputs, (None, targets))
    assert closed is not None
    assert (closed(vector) - truth[2]).abs().max() <= 1e-14
    summed = softmax_products(Summed(loss, 3.0), outputs, (None, targets))
    assert summed is not None
    scale = Summed(loss, 3.0).share((None, targets))
    assert (summed(vector) - scale * truth[2]).abs().max() <= 1e-14 * scale


# -- Of a model ------------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(x)).tanh())


def language(vocabulary: int, sequences: int, tokens: int) -> Problem:
    model = Tokens(vocabulary).double()
    x = torch.randint(vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(1))
    data = FrozenData(((x, x.roll(1, 1)),), (sequences,), sequences, True, "x")
    return Problem(model, "language_model", data)


@pytest.mark.parametrize("matrix", ["Hessian", "GaussNewton", "EmpiricalFisher"])
@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse", "finite-difference"])
def test_operators_are_the_same_in_every_mode(
    matrix: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(hesscli, matrix)(language(6, 3, 4), mode="double-backward").to_dense()
    monkeypatch.setattr(chunks, "CHUNK", 10)
    parted = getattr(hesscli, matrix)(language(6, 3, 4), mode=mode).to_dense()
    # Differences have lost half of a step's digits.
    bound = 1e-6 if mode == "finite-difference" else 1e-13
    assert (parted - whole).norm() <= bound * whole.norm()


def test_of_the_logits_size_a_graph_keeps_the_logits_and_their_slope(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = language(300, 4, 8)
    size = 4 * 8 * 300 * 8

    def kept(matrix: str) -> int:
        found = set[int]()

        def note(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().nbytes() >= size:
                found.add(tensor.untyped_storage().data_ptr())
            return tensor

        operator = getattr(hesscli, matrix)(problem, mode="double-backward")
        batch = problem.batch(0)
        noted = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with noted, problem.forward_context():
            apply = operator.live(batch)
        assert apply(torch.ones(1, problem.parameters.size, dtype=F64)).isfinite().all()
        return len(found)

    whole = kept("Hessian")
    monkeypatch.setattr(chunks, "CHUNK", 1000)
    assert kept("Hessian") == 2 < whole
    assert kept("GaussNewton") == 0
