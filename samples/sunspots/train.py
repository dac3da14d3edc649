"""Rebuild model.pt, sunspots.safetensors and held_out.safetensors from sunspots.csv.

The yearly sunspot numbers 1700 to 2008 lie beside this script, as statsmodels distributes them
(statsmodels/datasets/sunspots/sunspots.csv). Training ends at a true minimum, in float64: L-BFGS
finds a basin, Newton's method with the dense Hessian its bottom.
"""

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from net import SunspotNet
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector, vector_to_parameters

HERE = Path(__file__).parent
LAGS = 12
SEEN = 256  # the years 1712 to 1967; those after them are held out
WEIGHT_DECAY = 1e-2

Objective = Callable[[Tensor], Tensor]


def read_years(path: Path) -> tuple[Tensor, Tensor]:
    """Read the lagged years (n, LAGS) and the years that follow them (n, 1).

    A square root evens out the variance of counts; the years trained on set mean and scale.
    The targets are only centred: against an error in root counts the weight decay is light
    enough for the hidden units to stay distinct. Were the targets scaled too, those of the second
    layer would end as copies of one another, and the Hessian's eigenvalues repeat.
    """
    with path.open(newline="") as file:
        counts = [float(row["SUNACTIVITY"]) for row in csv.DictReader(file)]
    years = torch.tensor(counts, dtype=torch.float64).sqrt()
    seen = years[: LAGS + SEEN]
    rows = (years - seen.mean()).unfold(0, LAGS + 1, 1)
    return rows[:, :-1] / seen.std(), rows[:, -1:].contiguous()


def objective_of(net: nn.Module, lags: Tensor, following: Tensor) -> Objective:
    """Return the training loss as a function of all parameters in one vector.

    It is the mean squared error plus half the weight decay times the vector's squared norm.
    """
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def objective(theta: Tensor) -> Tensor:
        parts = zip(shapes.items(), theta.split(sizes), strict=True)
        parameters = {name: part.view(shape) for (name, shape), part in parts}
        error = mse_loss(functional_call(net, parameters, lags), following)
        return error + WEIGHT_DECAY / 2 * theta @ theta

    return objective


def descend(objective: Objective, start: Tensor, iterations: int) -> Tensor:
    """Follow L-BFGS from `start` until the gradient is small or the iterations are spent."""
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-7,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(theta)
        loss.backward()
        return loss

    optimizer.step(closure)
    print(f"L-BFGS, {optimizer.state[theta]['n_iter']} iterations: ", end="")
    return theta.detach()


def polish(objective: Objective, theta: Tensor) -> Tensor:
    """Follow Newton's method, away from saddles: curvature counts by its absolute value."""
    for step in range(100):
        slope = grad(objective)(theta)
        if slope.norm() < 1e-12:
            print(f"Newton, {step} steps: ", end="")
            return theta
        eigenvalues, vectors = torch.linalg.eigh(hessian(objective)(theta))
        direction = vectors @ ((slope @ vectors) / eigenvalues.abs().clamp(min=1e-4))
        length, ceiling = 1.0, objective(theta) + 1e-12
        while length > 1e-6 and objective(theta - length * direction) > ceiling:
            length /= 2
        theta = theta - length * direction
    raise SystemExit("no minimum found: try more epochs or another seed")


def main() -> None:
    """Train to the minimum, show that it is one, and write the files beside this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "sunspots.csv")
    parser.add_argument("--epochs", type=int, default=1500, help="at most, of L-BFGS")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # the same sums, hence the same weights, on any number of cores
    torch.manual_seed(args.seed)
    lags, following = read_years(args.data)
    net = SunspotNet(LAGS)
    objective = objective_of(net, lags[:SEEN], following[:SEEN])

    theta = parameters_to_vector(net.parameters()).detach()
    for method in partial(descend, iterations=args.epochs), polish:
        theta = method(objective, theta)
        slope = grad(objective)(theta).norm()
        print(f"loss {objective(theta):.15f}, gradient norm {slope:.1e}")
    eigenvalues = torch.linalg.eigvalsh(hessian(objective)(theta))
    print(f"{len(theta)} Hessian eigenvalues, {eigenvalues[0]:.6f} to {eigenvalues[-1]:.3f}")
    if eigenvalues[0] <= 0:
        raise SystemExit("a saddle, not a minimum: try another seed")

    vector_to_parameters(theta, net.parameters())
    torch.save(net.state_dict(), HERE / "model.pt")
    for name, part in ("sunspots", slice(SEEN)), ("held_out", slice(SEEN, None)):
        inputs, targets = lags[part].contiguous(), following[part].contiguous()
        save_file({"lags": inputs, "next": targets}, HERE / f"{name}.safetensors")
        error = mse_loss(net(inputs), targets).item()
        explained = 1 - error / targets.var(correction=0).item()
        print(f"{name}: mean squared error {error:.4f}, {explained:.1%} of the variance explained")


if __name__ == "__main__":
    main()
