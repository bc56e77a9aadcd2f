"""A wrong call never returns a number: it raises, names the argument and says what it was."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import otloss

X, Y = torch.randn(5, 3), torch.randn(6, 3)
LOSSES: list[Callable[..., Any]] = [
    otloss.sinkhorn_divergence,
    otloss.sinkhorn_loss,
    otloss.solve_sample,
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


def uniform(n: int, **kwargs: Any) -> torch.Tensor:
    return torch.full((n,), 1 / n, **kwargs)


# -------------------------------------------------------------------------- keyword arguments


@every_loss
@pytest.mark.parametrize("eps", [0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_eps_must_be_finite_and_positive(loss: Callable[..., Any], eps: float) -> None:
    with pytest.raises(ValueError, match=rf"eps must be finite and > 0, got {eps!r}"):
        loss(X, Y, eps)


@pytest.mark.parametrize("eps", ["1", None, True, torch.tensor(1.0)])
def test_eps_must_be_a_number(eps: Any) -> None:
    with pytest.raises(TypeError, match="eps must be a number, got"):
        otloss.sinkhorn_divergence(X, Y, eps)


@every_loss
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cost", "l1", "cost must be one of 'sqeuclidean', 'euclidean', 'cosine', got 'l1'"),
        (
            "objective",
            "primal",
            "objective must be one of 'regularized', 'transport', got 'primal'",
        ),
        ("backward", "autodiff", "backward must be one of 'auto', .*, got 'autodiff'"),
        ("method", "gpu", "method must be one of 'auto', .*, got 'gpu'"),
        ("tol", 0, "tol must be finite and > 0, got 0"),
        ("max_iters", 0, "max_iters must be at least 1, got 0"),
        ("n_iters", 0, "n_iters must be at least 1, got 0"),
        ("backward", "unrolled", 'backward="unrolled" .* give n_iters, which was None'),
        ("unbalanced", -1.0, r"unbalanced must be finite and > 0, got -1\.0"),
        ("unbalanced", (1.0, 2.0, 3.0), "unbalanced must be one number or a pair"),
    ],
)
def test_choices_and_ranges(loss: Callable[..., Any], name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(X, Y, 1.0, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cost", 2, r"cost must be a name or a function \(x, y\) -> C, got int"),
        ("tol", "small", "tol must be a number, got str"),
        ("max_iters", 1.5, r"max_iters must be an integer, got float: 1\.5"),
        ("n_iters", True, "n_iters must be an integer, got bool"),
    ],
)
def test_kinds(name: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        otloss.sinkhorn_divergence(X, Y, 1.0, **{name: value})


def test_modules_check_when_they_are_made() -> None:
    with pytest.raises(ValueError, match="eps must be finite and > 0"):
        otloss.SinkhornDivergence(0)
    with pytest.raises(ValueError, match="cost must be one of"):
        otloss.MinibatchEnergyDistance(0.1, cost="l1")
    with pytest.raises(TypeError, match="unexpected keyword argument 'blur'"):
        otloss.SinkhornLoss(0.1, blur=0.05)


# ----------------------------------------------------------------------------------- clouds


@every_loss
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.empty(0, 3), Y, r"x must not be empty, got a tensor of shape \(0, 3\)"),
        (X, torch.empty(6, 0), r"y must not be empty, got a tensor of shape \(6, 0\)"),
        (X[0], Y, r"x must have shape \(n, d\) or \(B, n, d\), got a tensor of shape \(3,\)"),
        (X, torch.randn(6, 4), "x and y must have the same dimension d, got 3 and 4"),
        (
            X[None],
            torch.randn(2, 6, 3),
            "x and y must have the same batch size B, got 1 and 2",
        ),
        (X, Y[None], "x and y must both be single clouds or both batches"),
        (X, Y.double(), "x and y must have one dtype, got torch.float32 and torch.float64"),
        (X, Y.to("meta"), "x and y must be on one device, got cpu and meta"),
    ],
)
def test_clouds_that_do_not_fit(
    loss: Callable[..., Any], x: torch.Tensor, y: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(x, y, 1.0)


@every_loss
def test_tensors_of_the_wrong_kind(loss: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor .*torch.int64"):
        loss(X.long(), Y, 1.0)
    with pytest.raises(TypeError, match=r"y must be a torch\.Tensor, got list"):
        loss(X, Y.tolist(), 1.0)
    with pytest.raises(TypeError, match=r"x must be a dense tensor, got layout torch\.sparse_coo"):
        loss(X.to_sparse(), Y, 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@every_loss
def test_data_that_is_not_finite(loss: Callable[..., Any], value: float) -> None:
    bad = Y.clone()
    bad[4, 1] = value
    with pytest.raises(ValueError, match=re.escape(f"y must be finite, but y[4, 1] is {value}")):
        loss(X, bad, 1.0)
    with pytest.raises(ValueError, match=r"x must be finite, but x\[4, 1\] is .*1 of 18 values"):
        loss(bad, X, 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_other_functions_say_where_it_is_too(value: float) -> None:
    bad = X.clone()
    bad[2, 0] = value
    for call in (otloss.cost_matrix, otloss.energy_distance):
        with pytest.raises(ValueError, match=r"x must be finite, but x\[2, 0\]"):
            call(bad, Y)
    with pytest.raises(ValueError, match=r"y1 must be finite, but y1\[2, 0\]"):
        otloss.minibatch_energy_distance(Y, Y, bad, X, 0.1)
    C = torch.rand(4, 4)
    C[1, 3] = value
    with pytest.raises(ValueError, match=r"C must be finite, but C\[.*1, 3\]"):
        otloss.solve(C, 1.0)


def test_minibatches_are_named() -> None:
    with pytest.raises(ValueError, match="x1 and y2 must have the same dimension d, got 3 and 2"):
        otloss.minibatch_energy_distance(X, X, Y, Y[:, :2], 0.1)


def test_eps_below_what_the_dtype_resolves() -> None:
    message = r"eps=1e-08 is below what torch.float32 can resolve against costs up to .*float64"
    with pytest.raises(ValueError, match=message):
        otloss.sinkhorn_divergence(X, Y, 1e-8)


# ---------------------------------------------------------------------------------- weights


@every_loss
@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("a", uniform(6), r"a must have shape \(5,\), one weight per point of x, got .*\(6,\)"),
        ("b", uniform(6)[:, None], r"b must have shape \(6,\), one weight per point of y"),
        ("a", torch.tensor([2.0, -1.0, 0, 0, 0]), "a must be non-negative, .* least value is -1.0"),
        ("a", torch.tensor([float("nan"), 0, 0, 0, 1]), "a must be non-negative, .* is nan"),
        ("b", torch.tensor([float("inf"), 0, 0, 0, 0, 1]), "b must be finite, .* value is inf"),
        ("a", torch.zeros(5), "a must have a positive total"),
        (
            "b",
            uniform(6) * 2,
            "a and b must have the same total mass .* got .*1.* and .*2.*normalise them",
        ),
        ("a", uniform(5, dtype=torch.float64), "x and a must have one dtype"),
        ("b", uniform(6, device="meta"), "y and b must be on one device, got cpu and meta"),
    ],
)
def test_weights(loss: Callable[..., Any], name: str, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(X, Y, 1.0, **{name: weight})


def test_weights_must_be_floats() -> None:
    with pytest.raises(TypeError, match="a must be a floating-point tensor"):
        otloss.sinkhorn_loss(X, Y, 1.0, a=torch.ones(5, dtype=torch.long))


# --------------------------------------------------------------------------- matrices, results


def test_matrices() -> None:
    with pytest.raises(
        ValueError, match=r"C must have shape \(n, m\) or \(B, n, m\), got .*\(4,\)"
    ):
        otloss.solve(torch.rand(4), 1.0)
    with pytest.raises(ValueError, match=r"C must not be empty, got a tensor of shape \(0, 4\)"):
        otloss.solve(torch.rand(0, 4), 1.0)
    with pytest.raises(TypeError, match="C must be a floating-point tensor"):
        otloss.solve(torch.ones(4, 4, dtype=torch.int32), 1.0)
    with pytest.raises(ValueError, match=r"a must have shape \(4,\), one weight per point of C"):
        otloss.solve(torch.rand(4, 5), 1.0, a=uniform(5))


def test_a_cost_function_must_return_a_matrix() -> None:
    message = (
        r"cost must return a tensor of shape \(5, 6\) for clouds of shapes \(5, 3\) and \(6, 3\)"
    )
    with pytest.raises(ValueError, match=message):
        otloss.sinkhorn_loss(X, Y, 1.0, cost=lambda x, y: x.sum())


def test_results_check_what_they_are_asked() -> None:
    result = otloss.solve(torch.rand(4, 5), 1.0)
    with pytest.raises(ValueError, match="axis must be 0 or 1, got 2"):
        result.apply(torch.rand(5), axis=2)
    with pytest.raises(ValueError, match=r"v must have 5 rows for axis=1, got .*\(4,\)"):
        result.apply(torch.rand(4))
    with pytest.raises(ValueError, match="barycentric_map needs the points: use solve_sample"):
        result.barycentric_map()
    with pytest.raises(ValueError, match="extend needs the points"):
        result.extend(X)
    with pytest.raises(ValueError, match=r"init g must have shape \(6,\), got .*\(5,\)"):
        otloss.solve_sample(X, Y, 1.0, init=(torch.zeros(5), torch.zeros(5)))
    with pytest.raises(ValueError, match="y and x_new must have the same dimension d"):
        otloss.solve_sample(X, Y, 1.0).extend(X[:, :2])


# -------------------------------------------------------------------------------- convergence


def test_stopping_early_warns_once_and_says_what_to_do() -> None:
    message = (
        r"stopped after 3 iterations at a marginal error of \S+, above tol=1e-06\. "
        r"Raise max_iters \(3\), eps \(0\.01; costs are up to \S+\) or tol\."
    )
    with pytest.warns(otloss.ConvergenceWarning, match=message) as caught:
        otloss.sinkhorn_divergence(X, Y, 0.01, tol=1e-6, max_iters=3)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_fixed_number_of_iterations_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = otloss.solve_sample(X, Y, 0.01, n_iters=1, tol=1e-9)
    assert not result.converged
    assert result.n_iters == 1


@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_ctrl_c_stops_a_long_solve(method: str) -> None:
    script = (
        "import torch, otloss\n"
        "x, y = torch.rand(2, 3000, 3, dtype=torch.float64)\n"
        "print('ready', flush=True)\n"
        f"otloss.sinkhorn_loss(x, y, 1e-3, n_iters=10**6, backward='envelope', method='{method}')\n"
        "print('finished')"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    assert "finished" not in out


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacrev])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: otloss.sinkhorn_divergence(x, x + 1, 0.5),
        lambda x: otloss.energy_distance(x, x + 1),
        lambda x: otloss.solve(x, 0.5).value,
    ],
)
def test_function_transforms_are_refused_by_name(function, transform):
    x = torch.rand(2, 4, 3) if transform is torch.func.vmap else torch.rand(4, 3)
    with pytest.raises(NotImplementedError, match=r"batch \(B, n, d\) in place of vmap"):
        transform(function)(x)
