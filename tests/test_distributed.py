"""The loss of points spread over processes against one process with all of them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import COSTS, Clouds, clouds
from torch.testing import assert_close

import otloss
import otloss.distributed

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no torch.distributed")


Case = dict[str, Any]
CASES: list[Case] = [
    *(
        {"cost": cost, "objective": objective, "n_iters": n_iters}
        for cost, objective, n_iters in itertools.product(
            COSTS, ["regularized", "transport"], [None, 3]
        )
    ),
    {"dtype": torch.float32},
    {"dtype": torch.float32, "d": 40, "eps": 20.0},
    {"dtype": torch.bfloat16, "n_iters": 5},
    {"weighted": True},
    {"weighted": True, "n_iters": 4, "cost": "euclidean"},
    {"eps": 0.02},
    {"n": 3, "m": 50},
]


def clouds_of(case: Case) -> Clouds:
    """The same on every rank; a point of each has weight 0."""
    n, m, d = case.get("n", 41), case.get("m", 34), case.get("d", 3)
    c = clouds(torch.Generator().manual_seed(n * m + d), n, m, d, weights="random")
    c.a[1], c.b[2] = 0, 0
    return Clouds(c.x, c.y, c.a / c.a.sum(), c.b / c.b.sum()).to(case.get("dtype", torch.float64))


def settings(case: Case) -> Case:
    kept = {k: case[k] for k in ("cost", "objective", "n_iters") if k in case}
    eps = case.get("eps", 0.1)
    return {"eps": eps, "tol": 1e-9 if "dtype" not in case else 1e-5, "max_iters": 5000, **kept}


def cuts(size: int, ranks: int) -> list[int]:
    """Uneven shards: the first rank has one point."""
    rest = size - 1
    return [0, 1, *(1 + rest * k // (ranks - 1) for k in range(1, ranks))]


# What one rank, of many, may do differently, and what all of them say to that.
REFUSED: list[tuple[Case, str]] = [
    ({"eps": 0.2}, "eps must be the same on every rank"),
    ({"cost": "euclidean"}, "cost must be the same on every rank"),
    ({"n_iters": 4}, "n_iters must be the same on every rank"),
    ({"tol": 1e-2}, "tol must be the same on every rank"),
    ({"dtype": torch.float32}, "the dtype must be the same on every rank"),
    ({"d": 2}, "the dimension d must be the same on every rank"),
    ({"weighted": True}, "whether weights are given must be the same on every rank"),
    ({"first": math.nan}, "finite"),
    ({"first": 1e30, "eps": 0.1}, "eps=0.1 is below what torch.float64 can resolve"),
]


def refusal(case: Case, group: dist.ProcessGroup | None = None) -> str:
    """What a call raises on a rank that differs from the others by ``case``."""
    x, y = (torch.rand(4, case.get("d", 3), dtype=case.get("dtype")) for _ in range(2))
    x[0, 0] = case.get("first", 0.5)
    kept = {k: case[k] for k in ("cost", "tol", "n_iters") if k in case}
    if case.get("weighted"):
        kept["a_local"] = torch.full_like(x[:, 0], 0.25)
    try:
        otloss.distributed.sinkhorn_divergence(x, y, case.get("eps", 0.1), group, **kept)
    except ValueError as error:
        return str(error)
    return ""


def work(rank: int, ranks: int, folder: str) -> None:
    """Every case on one rank: the loss and the gradients of its points."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    results = []
    for case in CASES:
        parts = [t[slice(*cuts(len(t), ranks)[rank : rank + 2])] for t in clouds_of(case).inputs()]
        x_local, y_local = (t.requires_grad_() for t in parts[:2])
        weights = dict(zip(("a_local", "b_local"), parts[2:], strict=True))
        weights = weights if case.get("weighted") else {}
        loss = otloss.distributed.sinkhorn_divergence(x_local, y_local, **settings(case), **weights)
        loss.backward()
        results.append((loss.detach(), x_local.grad, y_local.grad))
    torch.set_default_dtype(torch.float64)
    refusals = [refusal(case if rank == ranks - 1 else {}) for case, _ in REFUSED]
    refusals.append(refusal({}, dist.new_group([0])))
    torch.save((results, refusals), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_is_the_loss_of_one_process(results, number):
    case = CASES[number]
    c = clouds_of(case)
    c = c if case.get("weighted") else Clouds(c.x, c.y, None, None)
    loss = c.require_grad().loss(backward="envelope", **settings(case))
    expected = c.grads(loss)[:2]
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}.get(c.x.dtype, 1e-6)
    ranks = [cases[number] for cases, _ in results]
    for value, _, _ in ranks:
        assert bool(value == ranks[0][0])
        assert_close(value, loss.detach(), rtol=tolerance, atol=tolerance)
    for side, grad in enumerate(expected):
        found = torch.cat([rank[1 + side] for rank in ranks])
        assert found.dtype == c.x.dtype
        scale = float(grad.abs().max())
        assert_close(found / scale, grad / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=lambda number: str(REFUSED[number][0]))
def test_every_rank_refuses(results: list[Any], number: int) -> None:
    for _, refusals in results:
        assert REFUSED[number][1] in refusals[number]


def test_ranks_outside_the_group_are_refused(results: list[Any]) -> None:
    inside, *outside = (refusals[-1] for _, refusals in results)
    assert inside == ""
    assert all("group must contain this process" in message for message in outside)


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A group of one rank, in this process."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_bad_input(alone):
    loss = otloss.distributed.sinkhorn_divergence
    x, y = torch.rand(5, 2), torch.rand(4, 2)
    with pytest.raises(TypeError, match="cost must be a name"):
        loss(x, y, 0.1, cost=torch.cdist)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps must be finite"):
        loss(x, y, 0.0)
    with pytest.raises(NotImplementedError, match="batches"):
        loss(x[None], y[None], 0.1)
    with pytest.raises(NotImplementedError, match="weights"):
        loss(x, y, 0.1, a_local=torch.full((5,), 0.2).requires_grad_())
    with pytest.raises(ValueError, match="same total mass"):
        loss(x, y, 0.1, a_local=torch.ones(5))
    with pytest.raises(ValueError, match=r"y_local\[1, 0\] is nan"):
        loss(x, y.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(math.nan)), 0.1)
    with pytest.warns(otloss.ConvergenceWarning, match="max_iters"):
        loss(x, y, 0.01, tol=1e-7, max_iters=3)
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, y, 0.1), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
