"""Do intervals from a quarter of the examples hold the trace over all of them?

200 draws of examples and probes on the fashion and text samples, each an interval for the whole
loader. The truth on fashion is exact by another route: without curved operations between weights
and logits, the Hessian's trace is that of Jᵀ(diag p − ppᵀ)J, from explicit Jacobians. On text it
is one long run over all examples, whose own standard error is printed.

    python tests/benchmarks/coverage.py [fashion] [text] [--seeds 200] [--method auto]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.func import functional_call, jacrev, vmap

import hesscli

SAMPLES = Path(__file__).parents[2] / "samples"
CHECKPOINTS = {"fashion": "model.pt", "text": "model.safetensors"}
CHUNK = 50


def jacobian_trace(problem: hesscli.Problem) -> float:
    """Mean over examples of tr Jᵀ(diag p − ppᵀ)J, J the Jacobian of the logits."""
    theta = {name: t.detach() for name, t in problem.model.named_parameters()}

    def logits(theta: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return functional_call(problem.model, theta, (image[None],))[0]

    total = 0.0
    for batch in problem.batches():
        for images in batch.data[0].split(CHUNK):
            p = vmap(logits, (None, 0))(theta, images).softmax(-1)
            for jacobian in vmap(jacrev(logits), (None, 0))(theta, images).values():
                j = jacobian.flatten(2)
                mean = torch.einsum("nk,nkd->nd", p, j)
                total += float(torch.einsum("nk,nkd->", p, j.square()) - mean.square().sum())
    return total / problem.data.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", nargs="*", default=list(CHECKPOINTS))
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--method", default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.samples:
        path = SAMPLES / name / CHECKPOINTS[name]
        whole = hesscli.load(path, examples="all")
        if name == "fashion":
            truth, stderr = jacobian_trace(whole), 0.0
        else:
            long = hesscli.trace(whole, probes=48, budget=None, seed=10**6).trace
            truth, stderr = long.estimate, long.probe_stderr
        print(f"{name}: trace {truth:.5g}, standard error of this truth {stderr:.2g}", flush=True)
        hits, widths = 0, []
        for seed in range(arguments.seeds):
            part = hesscli.load(path, examples=whole.data.count // 4, seed=seed)
            result = hesscli.trace(part, probes=2, budget=None, seed=seed, method=arguments.method)
            low, high = result.trace.interval
            hits += low <= truth <= high
            widths.append((high - low) / 2 / truth)
            if (seed + 1) % 20 == 0:
                width = sorted(widths)[len(widths) // 2]
                print(
                    f"  {hits}/{seed + 1} intervals hold it ({hits / (seed + 1):.1%}), "
                    f"median half-width {width:.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
