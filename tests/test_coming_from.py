"""docs/coming-from.md: every line of its tables beside the installed peers, and every claim."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import oracle
import pytest
import torch
from helpers import close, rand, randn, simplex

import otloss
from otloss.compat import geomloss as ours

geomloss, ot = pytest.importorskip("geomloss"), pytest.importorskip("ot")

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| `(SamplesLoss\(.+|ot\..+)` \| `(otloss\..+)` \|$", PAGE, re.MULTILINE)
OTT_LINES = re.findall(
    r"^\| `(linear\..+|sinkhorn_div.+)` \| `(otloss\..+)` \|$", PAGE, re.MULTILINE
)
KEOPS_LINES = re.findall(
    r"^\| `(.*\(G - D.+|.*F \+ G.+)` \| `(otloss\..+)` \|$", PAGE, re.MULTILINE
)
# Looser where one side is random or a limit.
LOOSE = {"sliced": 0.05, "emd2": 0.02, "partial": 0.02}
pytestmark = pytest.mark.filterwarnings("ignore:Sinkhorn did not converge")


def test_tables_are_read():
    calls = re.findall(r"^\| `(SamplesLoss\(|ot\.)", PAGE, re.MULTILINE)
    assert len(LINES) == len(calls) > 20
    assert (len(OTT_LINES), len(KEOPS_LINES)) == (7, 2)


@pytest.mark.parametrize(("theirs", "call"), LINES, ids=[theirs for theirs, _ in LINES])
def test_both_calls_agree(theirs, call, rng):
    careful = functools.partial(geomloss.SamplesLoss, scaling=0.998)
    names = {
        "SamplesLoss": careful, "ot": ot, "otloss": otloss, "s": 0.5, "r": 0.7, "eps": 0.5,
        "x": rand(rng, 9, 2), "y": 0.3 + rand(rng, 7, 2), "a": simplex(randn(rng, 9)),
        "b": simplex(randn(rng, 7)), "C": rand(rng, 9, 7), "B": simplex(randn(rng, 3, 7)).mT,
    }  # fmt: skip
    tol = next((tol for word, tol in LOOSE.items() if word in theirs), 3e-3)
    got, expected = (torch.as_tensor(eval(code, names)) for code in (call, theirs))
    close(got.reshape(expected.shape), expected, tol)


@pytest.mark.parametrize(("theirs", "call"), OTT_LINES, ids=[theirs for theirs, _ in OTT_LINES])
def test_calls_of_ott_agree(theirs, call, rng):
    jax, linear = pytest.importorskip("jax"), pytest.importorskip("ott.solvers.linear")
    from ott.geometry import costs
    from ott.geometry.geometry import Geometry
    from ott.geometry.pointcloud import PointCloud
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    given = {
        "x": rand(rng, 9, 2), "y": 0.3 + rand(rng, 7, 2), "a": simplex(randn(rng, 9)),
        "b": simplex(randn(rng, 7)), "C": rand(rng, 9, 7),
    }  # fmt: skip
    in_jax = {name: jax.numpy.array(t.float().numpy()) for name, t in given.items()}
    names = {
        "linear": linear, "costs": costs, "Geometry": Geometry, "PointCloud": PointCloud,
        "sinkhorn_divergence": sinkhorn_divergence, "otloss": otloss, "r": 0.7, "eps": 0.5,
    }  # fmt: skip
    expected = torch.tensor(eval(theirs, names | in_jax).tolist(), dtype=torch.float64)
    close(eval(call, names | given), expected, 3e-3)


@pytest.mark.parametrize(("theirs", "call"), KEOPS_LINES, ids=[theirs for theirs, _ in KEOPS_LINES])
def test_calls_of_keops_agree(theirs, call, rng):
    LazyTensor = pytest.importorskip("pykeops.torch").LazyTensor
    x, y, eps = rand(rng, 9, 2), 0.3 + rand(rng, 7, 2), 0.5
    f, g = otloss.solve_sample(x, y, eps, tol=1e-8).potentials
    uniform = [torch.full_like(v, 1 / len(v)).log() for v in (f, g)]
    rows, columns = (slice(None), None, None), (None, slice(None), None)
    names = {
        "D": ((LazyTensor(x[:, None]) - LazyTensor(y[None])) ** 2).sum(-1),
        "F": LazyTensor(f[rows]), "loga": LazyTensor(uniform[0][rows]),
        "G": LazyTensor(g[columns]), "logb": LazyTensor(uniform[1][columns]),
        "otloss": otloss, "x": x, "y": y, "f": f, "g": g, "eps": eps,
    }  # fmt: skip
    expected = eval(theirs, names)
    close(eval(call, names).reshape(expected.shape), expected, 3e-3)


def weighted(rng):
    """Clouds and unequal weights, as leaves."""
    x, y = randn(rng, 30, 2).requires_grad_(), 0.5 * randn(rng, 25, 2) + 1
    a, b = (simplex(2 * randn(rng, n)).requires_grad_() for n in (30, 25))
    return x, y, a, b


def error_of_gradient(value, x, exact):
    (grad,) = torch.autograd.grad(value, x)
    return float((grad - exact).norm() / exact.norm())


@pytest.mark.parametrize(("reach", "least"), [(None, 0.01), (0.5, 0.05)])
def test_gradients_of_geomloss(reach, least, rng):
    x, y, a, b = weighted(rng)
    rho = None if reach is None else (2 * reach**2,) * 2
    (exact,) = oracle.loss(x, y, 2 * 0.2**2, a.detach(), b.detach(), rho=rho).grads(x)
    options = {"blur": 0.2, "reach": reach}
    theirs = geomloss.SamplesLoss(**options, backend="tensorized")(a, x, b, y)
    assert error_of_gradient(theirs, x, exact / 2) > least
    assert error_of_gradient(ours.SamplesLoss(**options)(a, x, b, y), x, exact / 2) < 0.01


def test_unbalanced_value_of_pot(rng):
    C, a, b = rand(rng, 6, 5), simplex(randn(rng, 6)), 1.5 * simplex(randn(rng, 5))
    theirs = ot.solve(C, a, b, reg=0.5, unbalanced=0.7)
    exact = oracle.soft_solve(C, a, b, 0.5, (0.7, 0.7)).value
    close(otloss.solve(C, 0.5, a=a, b=b, unbalanced=0.7, tol=1e-8).value, exact, 1e-6)
    assert abs(theirs.value / exact - 1) > 0.01


def test_envelope_of_pot(rng):
    """Along a change of the weights of total 0, which leaves no constant open."""
    C, a, b = rand(rng, 6, 5), simplex(randn(rng, 6)), simplex(randn(rng, 5))
    a.requires_grad_()
    towards = randn(rng, 6)
    towards = towards - towards.mean()
    s = oracle.solve(C, a.detach(), b, 0.5)
    (theirs,) = torch.autograd.grad(ot.solve(C, a, b, reg=0.5, grad="envelope").value, a)
    (grad,) = torch.autograd.grad(otloss.solve(C, 0.5, a=a, b=b, tol=1e-9).value, a)
    close(grad @ towards, s.f @ towards, 1e-6, scale=1)
    assert abs((theirs - s.f) @ towards) > 1e-3
