"""Which functions of which libraries answer which question, and what they pay for it."""

from __future__ import annotations

from dataclasses import dataclass

from curves import Quantity


@dataclass(frozen=True)
class Method:
    """A way to an estimate.

    Attributes:
        curve: whose errors these are.
        call: whose price a product has.
        each: gradients for a product by counted operations; the graph is made once a call, or
            with every product.
        calls: graphs besides.
        by_hand: the library makes the products, its user the estimate.
        by_layer: a unit is one product for every layer.
    """

    quantity: Quantity
    library: str
    name: str
    curve: str
    call: str
    each: int
    calls: int = 0
    by_hand: bool = False
    by_layer: bool = False

    def counted(self, products: float) -> float:
        """Gradients by counted operations."""
        return self.each * products + self.calls


PYHESSIAN, CURVLINOPS, EIGENTHINGS = "pyhessian", "curvlinops-for-pytorch", "hessian-eigenthings"

METHODS = (
    Method("trace", PYHESSIAN, "trace, loader", "signs", "pyhessian", 3),
    Method("trace", PYHESSIAN, "trace, batch by batch", "fresh", "pyhessian batches", 2, 1),
    Method("trace", CURVLINOPS, "hutchinson_trace", "signs", "hutchinson_trace", 2, 1),
    Method("trace", CURVLINOPS, "hutchpp_trace", "hutchpp", "hutchpp_trace", 2, 3),
    Method("trace", CURVLINOPS, "xtrace", "xtrace", "xtrace", 2, 2),
    Method("trace", EIGENTHINGS, "trace, hutchinson", "signs", "eigenthings hutchinson", 3),
    Method("trace", EIGENTHINGS, "trace, hutch++", "hutchpp", "eigenthings hutch++", 3),
    Method("layers", PYHESSIAN, "batch by batch", "fresh", "pyhessian batches", 2, 1, by_hand=True),
    Method("layers", CURVLINOPS, "hutchinson_diag, summed", "signs", "hutchinson_diag", 2, 1),
    Method("layers", CURVLINOPS, "xdiag, summed", "xdiag", "xdiag", 2, 2),
    Method(
        "layers",
        EIGENTHINGS,
        "trace, hutchinson, an operator a layer",
        "each layer",
        "eigenthings layers",
        3,
        by_layer=True,
    ),
    Method(
        "diagonal", PYHESSIAN, "batch by batch", "fresh", "pyhessian batches", 2, 1, by_hand=True
    ),
    Method("diagonal", CURVLINOPS, "hutchinson_diag", "signs", "hutchinson_diag", 2, 1),
    Method("diagonal", CURVLINOPS, "xdiag", "xdiag", "xdiag", 2, 2),
)
"""Hutch++ of both libraries is one estimator: from the same signs they give the same numbers."""
