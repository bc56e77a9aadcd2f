"""Cost functions whose matrix is not stored: values and gradients are those of the stored one."""

from __future__ import annotations

import pytest
import torch
from helpers import STRENGTHS, close, clouds, randn, some_of, unequal
from torch import Tensor, nn
from torch.testing import assert_close

import otloss
from otloss import method as methods

EXACT = {"tol": 1e-10, "max_iters": 20_000}
MODES = {
    "regularized": {},
    "envelope": {"objective": "transport", "backward": "envelope"},
    "n_iters": {"n_iters": 6, "backward": "envelope"},
    "n_iters transport": {"n_iters": 6, "objective": "transport", "backward": "envelope"},
}


class Bent(nn.Module):
    """|x - W y|^2, symmetric where W is the identity."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.W = nn.Parameter(W)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(-2) - (y @ self.W).unsqueeze(-3)).square().sum(-1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(methods, "BLOCK_BYTES", 8 * 7 * 3)  # three rows over seven columns


@some_of(
    "mode, weights, strength, batch, symmetric, debiased",
    [*MODES], ["uniform", "random", "padded"], [None, *STRENGTHS], [None, 2], [True, False],
    [True, False],
    whole=3,
)  # fmt: skip
def test_values_and_gradients(mode, weights, strength, batch, symmetric, debiased, rng):
    c = clouds(rng, 8, 7, 2, weights=weights, batch=batch)
    c = unequal(c, 0.7, strength)
    cost = Bent(torch.eye(2).double() + (0 if symmetric else 0.3 * randn(rng, 2, 2)))
    sources = [c.x.requires_grad_(), c.y.requires_grad_(), cost.W]
    if c.a is not None and weights == "random":
        sources += [c.a.requires_grad_(), c.b.requires_grad_()]
    found = []
    for method in ("dense", "streamed"):
        options = {"method": method, "unbalanced": strength, **EXACT, **MODES[mode]}
        loss = c.loss(0.5, debiased=debiased, cost=cost, **options)
        found.append([loss, *torch.autograd.grad(loss.sum(), sources, materialize_grads=True)])
    assert_close(*found, rtol=1e-7, atol=1e-9)


def test_padding_of_whole_blocks(rng):
    """NaN where no row of a block counts."""
    c = clouds(rng, 8, 7, 2, weights="random")
    c.a[:4] = 0
    c.a /= c.a.sum()
    c.x[:4] = torch.nan
    cost, found = Bent(torch.eye(2).double()), []
    c.x.requires_grad_()
    for method in ("dense", "streamed"):
        result = c.solve(0.5, cost=cost, method=method, **EXACT)
        told = [c.loss(0.5, cost=cost, method=method, **EXACT), c.energy(cost=cost, method=method)]
        grads = [torch.autograd.grad(t, (c.x, cost.W)) for t in told]
        found.append([*told, *grads, result.plan.detach(), result.value_linear.detach()])
    assert_close(*found, rtol=1e-7, atol=1e-9)


def test_results(rng):
    """What a result computes, in blocks too; potentials and plans have no gradient."""
    c, cost = clouds(rng, 8, 7, 2, weights="random", batch=2), Bent(torch.eye(2).double())
    new, v, found = randn(rng, 2, 4, 2), randn(rng, 2, 7, 3), []
    for method in ("dense", "streamed"):
        with torch.no_grad():
            r = c.solve(0.5, cost=cost, method=method, **EXACT)
            told = [r.value, r.value_linear, *r.potentials, r.plan, *r.marginals, r.apply(v)]
            told += [r.barycentric_map(), r.extend(new)]
        found.append([*told, r.argmax()])
    close(*found, 1e-7)
    r = c.solve(0.5, cost=cost, method="streamed")
    assert r.explain() == "streamed on cpu"
    for of in (r.potentials[0], r.plan):
        with pytest.raises(NotImplementedError, match='use method="dense"'):
            of.sum().backward()


def test_eps_as_a_tensor(rng):
    c, W = clouds(rng, 6, 5, 2, batch=2), torch.eye(2).double()
    eps = torch.tensor([0.4, 0.7], dtype=torch.float64, requires_grad=True)

    def loss(eps, W):
        def cost(x, y):  # a closure
            return (x.unsqueeze(-2) - (y @ W).unsqueeze(-3)).square().sum(-1)

        return otloss.sinkhorn_divergence(c.x, c.y, eps, cost=cost, method="streamed", **EXACT)

    assert torch.autograd.gradcheck(loss, (eps, W.requires_grad_()), atol=1e-6)
    values = loss(eps, W), loss(eps.detach(), W)
    assert_close(*values)


@pytest.mark.parametrize("of", ["energy", "minibatch"])
def test_other_losses(of, rng):
    cost = Bent(randn(rng, 2, 2))
    x1, x2, y1, y2 = (randn(rng, n, 2).requires_grad_() for n in (7, 7, 5, 5))
    found = []
    for method in ("dense", "streamed"):
        if of == "energy":
            loss = otloss.energy_distance(x1, y1, cost=cost, method=method)
        else:
            options = {"cost": cost, "method": method, **EXACT}
            loss = otloss.minibatch_energy_distance(x1, x2, y1, y2, 0.5, **options)
        found.append([loss, *torch.autograd.grad(loss, (x1, y1, cost.W))])
    assert_close(*found, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("of", ["loss", "energy"])
def test_a_change_in_place_before_the_gradient_is_noticed(of, rng):
    """Costs are made again for it, and would be other ones."""
    c, cost = clouds(rng, 8, 7, 2), Bent(randn(rng, 2, 2))
    for changed in (c.x, c.y, cost.W):
        c.x.requires_grad_()
        if of == "loss":
            loss = c.loss(0.5, cost=cost, method="streamed")
        else:
            loss = otloss.energy_distance(c.x, c.y, cost=cost, method="streamed")
        with torch.no_grad():
            changed.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    result = c.solve(0.5, cost=cost, method="streamed")
    with torch.no_grad():
        cost.W.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"^a parameter of cost was changed in place"):
        _ = result.plan


def test_auto_streams_above_the_budget(rng, monkeypatch):
    x, y, cost = randn(rng, 8, 2).requires_grad_(), randn(rng, 7, 2), Bent(torch.eye(2).double())
    assert otloss.solve_sample(x, y, 0.5, cost=cost).explain() == "dense on cpu"
    monkeypatch.setattr(methods, "dense_budget", 8 * 7 * 8 - 1)
    assert otloss.solve_sample(x, y, 0.5, cost=cost).explain() == "streamed on cpu"
    # whose gradient takes the whole matrix
    stored = otloss.solve_sample(x, y, 0.5, cost=cost, objective="transport")
    assert stored.explain() == "dense on cpu"
    rows = []
    otloss.energy_distance(x, y, cost=lambda u, v: rows.append(len(u)) or torch.cdist(u, v))
    assert max(rows) == 3


def test_symmetric_matrices_are_solved_with_one_potential(rng):
    """Told, or found by one reading of each."""
    x, calls = randn(rng, 12, 2), []

    def cost(u, v):
        calls.append(1)
        return (u.unsqueeze(-2) - v.unsqueeze(-3)).square().sum(-1)

    counts = {}
    for symmetric in (True, None):
        calls.clear()
        otloss.sinkhorn_divergence(
            x, x + 3, 0.05, cost=cost, method="streamed", symmetric=symmetric, tol=1e-6
        )
        counts[symmetric] = len(calls)
    assert counts[None] == counts[True] + 2 * 6  # blocks of two rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_iters": 3}, 'backward="unrolled"'),
        ({"objective": "transport"}, '"implicit"'),
        ({"a": torch.tensor([0.5, 0.5, 0.0]).requires_grad_()}, "weights of 0"),
    ],
    ids=["unrolled", "implicit", "empty bins"],
)
def test_what_is_not_available_is_refused(options, message, rng):
    x, y = randn(rng, 3, 2).requires_grad_(), randn(rng, 4, 2)
    with pytest.raises(NotImplementedError, match=f"{message}.*dense"):
        otloss.sinkhorn_loss(x, y, 0.5, cost=torch.cdist, method="streamed", **options).backward()


def test_second_derivatives_are_refused(rng):
    x, y = randn(rng, 3, 2).requires_grad_(), randn(rng, 4, 2)
    cost = Bent(torch.eye(2).double())
    loss = otloss.sinkhorn_loss(x, y, 0.5, cost=cost, method="streamed")
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match='use method="dense"'):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (lambda x, y: torch.cdist(x, y) / 0, "forbidden pairs"),
        (lambda x, y: torch.cdist(x, y).T, r"cost must return a tensor of shape \(6, 7\)"),
        (lambda x, y: 1e12 * torch.cdist(x, y), "is below what torch.float32 can resolve"),
    ],
    ids=["infinite", "shape", "resolution"],
)
def test_errors(cost, message, rng):
    x, y = randn(rng, 6, 2, dtype=torch.float32), randn(rng, 7, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        otloss.sinkhorn_loss(x, y, 0.5, cost=cost, method="streamed")
