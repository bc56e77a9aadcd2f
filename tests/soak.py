"""Resident memory must not grow: neither over calls of every kind, nor in an hour of training.

    PYTHONPATH=. python tests/soak.py --calls 100000
    PYTHONPATH=. python tests/soak.py --minutes 60

Training descends warm-started losses over minibatches whose sizes change. Now and then it
evaluates, which an alarm interrupts half of the time: what comes next must not show it. Memory is
read once the first tenth has filled the caches, and at the end.
"""

from __future__ import annotations

import argparse
import functools
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import otloss

MOST_GROWTH = 5.0  # MB
COSTS = ("sqeuclidean", "euclidean", "cosine")


def resident() -> float:
    """In MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def clouds(pick: random.Random, batch: bool) -> tuple[Tensor, Tensor]:
    lead = (pick.randint(1, 3),) if batch else ()
    d = pick.randint(1, 20)
    x = torch.randn(*lead, pick.randint(1, 60), d, requires_grad=True)
    return x, torch.randn(*lead, pick.randint(1, 60), d)


def loss(pick: random.Random) -> None:
    x, y = clouds(pick, batch=pick.random() < 0.3)
    options = pick.choice([{}, {"objective": "transport"}, {"n_iters": 5}, {"unbalanced": 1.0}])
    method = pick.choice(["dense", "streamed"])
    value = otloss.sinkhorn_divergence(x, y, 1.0, cost=pick.choice(COSTS), method=method, **options)
    value.sum().backward()


def result(pick: random.Random) -> None:
    x, y = clouds(pick, batch=False)
    solved = otloss.solve_sample(x, y, 1.0)
    torch.autograd.grad(solved.plan.square().sum() + solved.value, x)
    otloss.solve_sample(x, y, 0.9, init=solved)


def second_order(pick: random.Random) -> None:
    x, y = clouds(pick, batch=False)
    (grad,) = torch.autograd.grad(otloss.sinkhorn_loss(x, y, 1.0), x, create_graph=True)
    torch.autograd.grad(grad.square().sum(), x)


def refused(pick: random.Random) -> None:
    x, y = clouds(pick, batch=False)
    try:
        otloss.sinkhorn_loss(x, torch.cat([y, y], -1), 1.0)
    except ValueError:
        return
    raise AssertionError("a wrong call was accepted")


def multiscale(pick: random.Random) -> None:
    x, y = torch.randn(2, pick.randint(1, 300), 2)
    x.requires_grad_()
    otloss.sinkhorn_divergence(x, y, 0.1, method="multiscale").backward()


def of_a_cost_function(pick: random.Random) -> None:
    x, y = clouds(pick, batch=False)
    eps = torch.tensor(0.5, requires_grad=True)
    otloss.sinkhorn_loss(x, y, eps, cost=torch.cdist).backward()


def forbidden(pick: random.Random) -> None:
    C = torch.rand(pick.randint(1, 40), pick.randint(1, 40), requires_grad=True)
    costs = C.masked_fill(torch.rand(C.shape) < 0.1, torch.inf)
    otloss.solve(costs, 0.1, unbalanced=1.0).value.backward()


def grid(pick: random.Random) -> None:
    a, b = torch.rand(2, 1, pick.randint(2, 20), pick.randint(2, 20)).requires_grad_()
    otloss.sinkhorn_divergence_grid(a / a.sum(), b / b.sum(), 2.0).backward()
    otloss.barycenter_grid(torch.cat([a, b]), torch.ones(2), 2.0, tol=1e-2)


def without_solving(pick: random.Random) -> None:
    x, y = clouds(pick, batch=False)
    (otloss.energy_distance(x, y) + otloss.sliced_wasserstein(x, y, 8)).sum().backward()


COMMON = [loss, loss, loss, result, refused, second_order, without_solving]
RARE = [multiscale, of_a_cost_function, forbidden, grid]
KINDS: list[Callable[[random.Random], None]] = [*COMMON, *COMMON, *RARE]


def mixed(pick: random.Random) -> Iterator[str]:
    while True:
        pick.choice(KINDS)(pick)
        yield ""


def interrupted(function: Callable[[], Tensor], after: float) -> bool:
    """Whether an alarm ended it. One that rings as the function returns is heard here, too."""

    def ring(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, after)
            function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeoutError:
        return True
    return False


def training(pick: random.Random) -> Iterator[str]:
    """Steps of a small generator; what is said counts those that were evaluated."""
    data, probe = torch.randn(2000, 8) * torch.linspace(0.2, 2, 8), torch.randn(100, 8)
    model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = [
        otloss.SinkhornDivergence(1.0, warm_start=True, method=method, objective=objective)
        for method in ("dense", "streamed")
        for objective in ("regularized", "transport")
    ]
    evaluations = ended = 0
    while True:
        n, m = pick.choice([(256, 256), (256, 256), (pick.randint(1, 300), pick.randint(1, 300))])
        criterion = pick.choice(losses)
        optimizer.zero_grad()
        value = criterion(model(torch.randn(n, 4)), data[torch.randint(len(data), (m,))])
        value.backward()
        optimizer.step()
        if not value.isfinite():
            raise AssertionError(f"the loss is {float(value)}")
        if pick.random() < 0.05:
            with pick.choice([torch.no_grad, torch.inference_mode])():
                before = otloss.sinkhorn_divergence(probe, data[:200], 0.5)
                made = model(torch.randn(1000, 4))
                limit = pick.choice([30.0, 10 ** pick.uniform(-4, -1)])
                ended += interrupted(functools.partial(criterion, made, data[:1000]), limit)
                evaluations += 1
                if not torch.equal(before, otloss.sinkhorn_divergence(probe, data[:200], 0.5)):
                    raise AssertionError("an evaluation changed the next one")
        yield f", {evaluations} evaluations, {ended} of them interrupted, last loss {value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000, help="of every kind")
    parser.add_argument("--minutes", type=float, help="of training instead")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(given.seed)
    start, settled, call, told = time.monotonic(), 0.0, 0, ""
    steps = (training if given.minutes else mixed)(random.Random(given.seed))
    done = 0.0
    while done < 1:
        told = next(steps)
        call += 1
        late = (time.monotonic() - start) / 60
        done = late / given.minutes if given.minutes else call / given.calls
        settled = settled or (resident() if done >= 0.1 else 0.0)
    growth = resident() - settled
    kind = f"steps of training in {late:.0f} minutes{told}" if given.minutes else "calls"
    print(f"{call} {kind}: resident memory grew by {growth:.1f} MB from {settled:.0f} MB")
    raise SystemExit(growth > MOST_GROWTH)


if __name__ == "__main__":
    main()
