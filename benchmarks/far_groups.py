"""Thirty groups far apart, most points in three of them: ``python -m benchmarks.far_groups``.

Small mass goes from group to group, and the plan falls apart: the multiscale engine shifts whole
groups against each other.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torch import Tensor

import otloss

GROUPS, EPS, PASSES = 30, 0.1, 300


def cloud(n: int, centres: Tensor) -> Tensor:
    group = torch.randint(GROUPS, (n,))
    group = torch.where(torch.rand(n) < 0.985, group % 3, group)
    return (centres[group] + 0.1 * torch.randn(n, 3)).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", type=int, nargs="+", default=[3000, 5000, 9900, 11_000])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", otloss.ConvergenceWarning)
    for n in parser.parse_args().points:
        torch.manual_seed(0)
        centres = 60 * torch.randn(GROUPS, 3)
        x, y = cloud(n, centres), cloud(n, centres)
        start = time.process_time()
        with torch.no_grad():
            r = otloss.solve_sample(x, y, EPS, method="multiscale", max_iters=PASSES)
        seconds = time.process_time() - start
        print(f"{n:>7} points: {seconds:.1f} s, {r.n_iters} passes, error {r.marginal_error:.1e}")


if __name__ == "__main__":
    main()
