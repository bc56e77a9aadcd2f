"""The registered operations: iteration by iteration against the oracle, shapes that end in the
middle of a vector, inputs that trip the kernels' guards, torch's own checks."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from backends import BACKENDS, Backend
from helpers import DTYPES, clouds, make_weights, name, rand, randn, rho, solved, some_of
from torch import Tensor
from torch.testing import assert_close

import otloss
from otloss import ops, reference
from otloss.costs import COSTS as COST_NUMBERS
from otloss.method import MULTISCALE_TOL
from otloss.reference.arguments import Arguments
from otloss.reference.marginals import plan

INF = math.inf


def assert_same_iterations(
    backend: Backend, C: Tensor, a: Tensor, b: Tensor, eps: float, count: int = 4,
    rho: tuple[float, float] = (INF, INF),
) -> None:  # fmt: skip
    """Every iterate equals the oracle's, to some roundings of the potentials and the exponent."""
    module = reference if backend.method == "reference" else ops
    given = [t[None].to(backend.device) for t in (C, a, b)]
    problem = ops.problems(given[1:], [0, 1], [1.0], eps, costs=given[:1], rho=rho)
    _, _, _, _, (trace,), *_ = solved(problem, module=module, n_iters=count, trace=True)
    got = trace[0].cpu()
    steps = oracle.iterate(C.double(), a.double(), b.double(), eps, count, rho)
    expected = torch.stack([torch.cat(step) for step in steps])
    unit = torch.finfo(C.dtype).eps
    size = float(expected.abs().max()) + float(C.abs().max())
    # Iterations do not amplify an error in the maximum norm, but add to it: f and g, each rounded.
    allowed = 4 * count * unit * (size + 4 * eps)
    assert float((got.double() - expected).abs().max()) <= allowed


STORED = [name for name in BACKENDS if "streamed" not in name]  # of costs that are given
WIDTHS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130]


@some_of("backend, m, dtype", STORED, WIDTHS, DTYPES)
def test_sizes(backend, m, dtype, rng):
    """Rows are taken by four and columns by vectors: every remainder of both."""
    for n in (1, 3, 4, 5, 6, 11):
        C = randn(rng, n, m, dtype=dtype)
        a, b = (make_weights(rng, (k,), "random").to(dtype) for k in (n, m))
        assert_same_iterations(backend, C, a, b, 0.3)


DAMPED = [0.3, (2.0, 0.1), (None, 1e-3), (1e-3, None), (1e-4, 1e6)]


@some_of("backend, strength, eps, dtype", STORED, DAMPED, [0.5, 1e-2], DTYPES)
def test_damped_iterations(backend, strength, eps, dtype, rng):
    """Down to where most points give up all but e^-1000 of their weight, which trips the guards."""
    C = randn(rng, 37, 45, dtype=dtype).square()
    C[:3] += 5
    a, b = (make_weights(rng, (k,), "random").to(dtype) for k in (37, 45))
    assert_same_iterations(backend, C, a, 7 * b, eps, rho=rho(strength))


Case = tuple[Tensor, Tensor, Tensor, float]


def uniform(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def cold_start(rng: torch.Generator) -> Case:
    """exp(-C / eps) is 0 in every entry."""
    C = 50 + rand(rng, 9, 21)
    return C, uniform(9), uniform(21), 0.02


def extreme_weights(rng: torch.Generator) -> Case:
    """Twelve orders of magnitude."""
    a, b = (10 ** (-12 * rand(rng, k)) for k in (10, 19))
    return randn(rng, 10, 19), a / a.sum(), b / b.sum(), 0.1


def extreme_weights_and_costs(rng: torch.Generator) -> Case:
    a, b = (10 ** (-12 * rand(rng, k)) for k in (10, 19))
    return 100 * rand(rng, 10, 19), a / a.sum(), b / b.sum(), 0.2


def far_row_and_column(rng: torch.Generator) -> Case:
    """Outliers: their sums underflow beside the others'."""
    C = rand(rng, 8, 70)
    C[3] += 300
    C[:, 66] += 500
    return C, uniform(8), uniform(70), 0.5


def clamped_column(rng: torch.Generator) -> Case:
    """All row sums are near the least that is trusted, and a light column is below what an
    exponential can hold: its sum is made of clamped terms alone and looks reasonable."""
    C = 58 * math.log(2) + 0.1 * rand(rng, 8, 8)
    C[:, -1] = 100 * math.log(2)
    b = uniform(8)
    b[-1] = 1e-10
    return C, uniform(8), b / b.sum(), 1.0


def negative_costs(rng: torch.Generator) -> Case:
    return -200 * rand(rng, 7, 9), uniform(7), uniform(9), 0.4


def padded_weights(rng: torch.Generator) -> Case:
    a, b = (make_weights(rng, (k,), "padded") for k in (9, 18))
    return 30 * rand(rng, 9, 18), a, b, 0.1


GUARDED = [cold_start, extreme_weights, extreme_weights_and_costs, far_row_and_column]
GUARDED += [clamped_column, negative_costs, padded_weights]


@some_of("backend, case, dtype", STORED, GUARDED, DTYPES)
def test_guards(backend, case, dtype, rng):
    C, a, b, eps = case(rng)
    C, a, b = (t.to(dtype) for t in (C, a, b))
    assert_same_iterations(backend, C, a, b, eps, count=6)
    assert_same_iterations(backend, C.T.contiguous(), b, a, eps, count=6)


@pytest.mark.parametrize("case", GUARDED, ids=lambda case: case.__name__)
def test_guards_until_converged(case, rng):
    C, a, b, eps = case(rng)
    eps = max(eps, 0.01 * float(C.max() - C.min()))  # where plain iterations end in time
    truth = oracle.solve(C, a, b, eps)
    for method in ("dense", "reference"):
        result = otloss.solve(C, eps, a=a, b=b, tol=1e-6, max_iters=30_000, method=method)
        size = float(C.abs().max())
        assert float((result.value - truth.value).abs()) <= 1e-6 * size
        assert float((result.plan - truth.P).abs().sum()) <= 1e-3
        assert result.marginal_error <= 2e-6


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_start_far_away(shift, rng):
    """Potentials that make every exponential overflow or underflow are only a bad start."""
    C, eps = rand(rng, 20, 30), 0.05
    far = (torch.zeros(20).double(), shift * rand(rng, 30))
    result = otloss.solve(C, eps, tol=1e-8, max_iters=5000, init=far)
    truth = oracle.solve(C, uniform(20), uniform(30), eps)
    assert_close(result.plan, truth.P, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_status(dtype, rng):
    """Iterations, error, convergence and the largest cost that counts, for each problem."""
    c = clouds(rng, 6, 5, 3, weights="random", batch=2, dtype=dtype)
    C = torch.cdist(c.x, c.y)
    C[0, 2, 3] = 77
    C[1, 0, 0] = 1e5
    a, b = c.a.clone(), c.b.clone()
    a[1, 0] = 0  # so that the 1e5 does not count
    a /= a.sum(-1, keepdim=True)
    problem = ops.problems([a, b], [0, 1], [1.0], 0.5, costs=[C])
    for module in (ops, reference):
        _, status, f, g, *_ = solved(problem, module=module, tol=1e-4)
        assert status.dtype == torch.float64
        assert status.shape == (1, 2, 5)
        assert status[0, :, ops.MAX_COST].tolist() == [77.0, float(C[1, 1:].max())]
        assert bool((status[0, :, ops.CONVERGED] == 1).all())
        assert bool((status[0, :, ops.ERROR] <= 1e-4).all())
        P = plan(0.5, C, f[0], g[0], a, b)
        error = (P.sum(1) - b).abs().sum(1) + (P.sum(2) - a).abs().sum(1)
        assert bool((error <= 2.5e-4).all())
        assert float(f[0][1, 0]) == 0  # padding keeps potential 0


def test_lists_of_costs_agree():
    """Python's names and numbers are those of the C++ enumeration."""
    header = Path(__file__).parent.parent / "csrc" / "core" / "costs.h"
    body = re.search(r"enum class CostKind : int \{(.*?)\}", header.read_text(), re.DOTALL)[1]
    entries = dict(re.findall(r"k(\w+)\s*=\s*(\d+)", body))
    assert {k.lower(): int(v) for k, v in entries.items()} == COST_NUMBERS


def test_lists_of_status_fields_and_objectives_agree():
    header = (Path(__file__).parent.parent / "csrc" / "kernels.h").read_text()
    fields = re.findall(r"^  kStatus(\w+),", header, re.MULTILINE)
    numbers = [ops.ITERATIONS, ops.ERROR, ops.CONVERGED, ops.MAX_COST, ops.TERM]
    assert fields == ["Iterations", "Error", "Converged", "MaxCost", "Term"]
    assert numbers == list(range(5))
    from otloss import _options

    body = re.search(r"enum class Objective : int \{(.*?)\}", header)[1]
    entries = [(k.lower(), int(v)) for k, v in re.findall(r"k(\w+)\s*=\s*(\d+)", body)]
    assert entries == [(word, k) for k, word in enumerate(_options.OBJECTIVES)]


def test_native_kernels_are_in_use():
    config = otloss.show_config(mode="dicts")
    assert ops.NATIVE
    assert config["kernels"] == "native"
    assert config["simd"]


LOSSES = """
import torch, otloss
print(otloss.ops.build_info()["simd"])
rng = torch.Generator().manual_seed(0)
for d in (3, 50):
    x, y = torch.randn(2, 45, d, generator=rng, dtype=torch.float64)[:, :37].requires_grad_()
    for dtype, method in ((torch.float32, "dense"), (torch.float64, "dense"),
                          (torch.float32, "streamed"), (torch.float64, "streamed")):
        found = []
        for dtype, method in ((dtype, method), (torch.float64, "reference")):
            one = otloss.sinkhorn_divergence(x.to(dtype), y.to(dtype), d, n_iters=5, method=method)
            found.append([one, *torch.autograd.grad(one, (x, y))])
        tol = 1e-4 if found[0][0].dtype == torch.float32 else 1e-11
        for got, expected in zip(*found):
            torch.testing.assert_close(got.double(), expected, rtol=tol, atol=tol)
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_instruction_levels(level):
    """Products and sweeps at every level that the machine has."""
    command = [sys.executable, "-c", LOSSES]
    environment = {**os.environ, "OTLOSS_SIMD": level}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = {"baseline": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
    own = ops.build_info()["simd"]
    assert run.stdout.strip() == (min(own, names[level]) if own in names.values() else own)


def packed_solution(problem: Any) -> tuple[tuple[list[Tensor], list[Tensor]], Tensor]:
    """f and g as one tensor, and what is kept."""
    limits = ops.number(1e-3), 1000, -1, False, True, True
    _, _, f, g, _, _, (kept,) = ops.solve(*problem, [], *limits)
    return (f, g), kept


def sample_arguments() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation, small and valid; after a colon, which of several."""
    generator = torch.Generator().manual_seed(0)
    x, y = randn(generator, 2, 4, 3), randn(generator, 2, 5, 3)
    a, b = uniform(4).repeat(2, 1), uniform(5).repeat(2, 1)
    pairs, weights, coefficients = [0, 1, 0, 0], [a, b], [1.0, -0.5]
    C = ops.cost([x, y], weights, pairs, 1)
    rho = (2.0, INF)
    stored = ops.problems(weights, pairs, coefficients, 0.5, costs=C, rho=rho)
    made = ops.problems(weights, pairs, coefficients, 0.5, points=[x, y], kind=1, rho=rho)
    multiscale = made._replace(kind=0, multiscale=True)
    both = ops.problems(weights, pairs, coefficients, 0.5, costs=C, points=[x, y], kind=1, rho=rho)
    _, _, f, g, *_ = solved(stored)
    *_, (prepared,) = solved(made)
    packed, kept = packed_solution(made)
    _, _, _, _, traces, *_ = solved(stored, n_iters=3, trace=True)
    grads = [torch.ones_like(v) for v in f], [torch.ones_like(v) for v in g]
    ones = torch.ones(2, dtype=torch.float64)
    fg = [t for two in zip(f, g, strict=True) for t in two]
    limits = (ops.number(1e-3), 1000, -1, False)
    axes = [uniform(2).repeat(2, 1), 2 * uniform(2).repeat(2, 1)]
    densities, half, penalties = [a, a.flip(1)], ops.number(0.5), ops.penalties(*rho)
    given = {
        "": (stored, ([0], [], True)),
        ":points": (made, ([], [1, 0], True)),
        ":both": (both, ([1], [0], True)),
    }
    return {
        "cost": ([x, y], weights, pairs, 0),
        "cost_backward": ([torch.ones_like(c) for c in C], C, [x, y], weights, pairs, 1, [0, 1]),
        "solve": (*stored, fg, *limits, False, False, None),
        "solve:points": (*made, [], *limits, False, False, None),
        "solve:multiscale": (*multiscale, [], *limits, False, False, None),
        "solve:dense": (*made, [], *limits, True, False, None),
        "solve:packed": (*made, [], *limits, True, True, None),
        "plan_gap:multiscale": (*multiscale, f, g, [a, a], [b, a]),
        "extend:multiscale": (*multiscale, g),
        "plan_product:multiscale": (*multiscale, f, g, [b.unsqueeze(-1), a.unsqueeze(-1)]),
        "grid_means": (axes, half, f[0], f[0].unsqueeze(1)),
        "grid_adjoint": (axes, half, penalties, *densities, f[0], f[1], f[0], f[1]),
        "grid_solve": (axes, [1.0, 1.0], densities, pairs, half, penalties, [], half, 1000),
        "envelope_backward:multiscale": (ones, *multiscale, f, g, [], [1, 0], True),
        "envelope_backward:prepared": (ones, *made, f, g, *given[":points"][1], prepared),
        "envelope_backward:packed": (ones, *made, *packed, *given[":points"][1], kept),
        "envelope_backward:weights": (ones, *stored._replace(costs=[]), f, g, [], [], True),
        **{f"envelope_backward{k}": (ones, *p, f, g, *w) for k, (p, w) in given.items()},
        **{
            f"unrolled_backward{k}": (ones, *grads, *p, [], traces, *w)
            for k, (p, w) in given.items()
        },
        **{f"implicit_backward{k}": (ones, *grads, *p, f, g, *w) for k, (p, w) in given.items()},
    }


def test_sample_arguments_name_every_operation():
    registered = {
        schema.name.removeprefix("otloss::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("otloss::")
    }
    assert {key.partition(":")[0] for key in sample_arguments()} == registered


def operation_named(key: str) -> Any:
    return getattr(torch.ops.otloss, key.partition(":")[0]).default


@pytest.mark.parametrize("operation", sample_arguments())
def test_opcheck(operation):
    """torch's own tests: the schema tells the truth, fake kernels have the shapes of the real."""
    torch.library.opcheck(operation_named(operation), sample_arguments()[operation])


@pytest.mark.parametrize("operation", sample_arguments())
def test_fake_kernels(operation):
    """Shapes, dtypes and nothing else: on the meta device no data is read."""

    def to_meta(value: Any) -> Any:
        if isinstance(value, list):
            return [to_meta(v) for v in value]
        return value.to("meta") if isinstance(value, Tensor) else value

    def shapes(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [shapes(v) for v in value]
        return tuple(value.shape), value.dtype

    call = operation_named(operation)
    arguments = sample_arguments()[operation]
    made = call(*[to_meta(v) for v in arguments])
    assert shapes(made) == shapes(call(*arguments))
    flat = made if isinstance(made, list) else [t for t in made if isinstance(t, Tensor)]
    assert all(t.device.type == "meta" for t in flat)


EXACT = [
    operation
    for operation in sample_arguments()
    if not operation.endswith((":multiscale", "envelope_backward:packed"))
]


@pytest.mark.parametrize("operation", EXACT)
def test_native_equals_reference(operation):
    """Every operation on its sample arguments: the same tensors from both. (test_multiscale.py has
    what is left out of a plan.)"""
    arguments = list(sample_arguments()[operation])
    plain, call = getattr(reference, operation.partition(":")[0]), operation_named(operation)
    if operation.startswith("solve"):  # exact iterations, because stopping tests differ
        names = [argument.name for argument in call._schema.arguments]
        arguments[names.index("n_iters")] = 7
        arguments[names.index("init")] = []
        arguments[names.index("trace")] = True
    got, expected = call(*arguments), plain(*arguments)
    if operation == "solve:points":  # without C the largest cost is only bounded, by the norms
        most, exact = (out[1][..., ops.MAX_COST] for out in (got, expected))
        assert bool((exact <= most).all() and (most <= 4 * exact).all())
        got[1][..., ops.MAX_COST] = exact
    if operation.startswith("solve"):  # plain torch keeps nothing of the points
        got, expected = got[:6], expected[:6]
    if operation.startswith("implicit_backward"):  # solved in other ways; the last item says how
        got, expected = got[:4], expected[:4]
    assert_close(list(got), list(expected), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("single", [False, True])
def test_a_packed_solve_is_the_same(single, rng):
    """To the last bit, and so is the gradient of what it gives back; of a target that is known the
    costs are not made."""
    x, y = randn(rng, 9, 50), randn(rng, 21, 50)
    points = [x, y] if single else [x[None], y[None]]
    weights, pairs = [uniform(9)[None], uniform(21)[None]], [0, 1, 0, 0, 1, 1]
    problem = ops.problems(weights, pairs, [1.0, -0.5, -0.5], 30.0, points=points)
    limits = [], ops.number(1e-6), 1000, -1, False, True
    loss, status, f, g, _, _, (prepared,) = ops.solve(*problem, *limits)
    known = torch.cat([f[2].double(), status[2]], dim=-1)
    costs = ops.solve(*problem, *limits)[5]
    wanted = [], [0], False
    expected = ops.envelope_backward(
        torch.ones_like(loss), *problem._replace(costs=costs), f, g, *wanted, prepared
    )
    potentials = torch.cat([v[0] for both in zip(f, g, strict=True) for v in both])
    for target in (None, known):
        packed = ops.solve(*problem, *limits, True, target)
        assert [len(part) for part in packed[2:]] == [1, 0, 0, 0, 1]
        assert_close(packed[0], loss, rtol=0, atol=1e-12)
        assert_close(packed[2][0], potentials, rtol=0, atol=0)
        found = ops.envelope_backward(
            torch.ones_like(loss), *problem, packed[2], [], *wanted, *packed[6]
        )
        assert_close(found[1][0], expected[1][0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_operations_refuse_other_dtypes(dtype):
    x = torch.ones(1, 2, 3, dtype=dtype)
    with pytest.raises(RuntimeError, match="float32 and float64"):
        ops.cost([x], [], [0, 0], 0)


def test_operations_refuse_wrong_layouts():
    """The bindings check what the kernels assume, and name the tensor."""
    x, a = torch.ones(1, 4, 6), torch.full((1, 4), 0.25)
    with pytest.raises(RuntimeError, match=r"points must be contiguous"):
        ops.cost([x.mT], [], [0, 0], 0)
    with pytest.raises(RuntimeError, match=r"weights must be .*shape \(1, 4\).*but is \(1, 3\)"):
        ops.cost([x], [a[:, :3]], [0, 0], 0)
    with pytest.raises(RuntimeError, match=r"costs must be .*shape \(1, 4, 4\).*but is .*6\)"):
        solved(ops.problems([a], [0, 0], [1.0], 0.5, costs=[x]))
    square = ops.problems([a.double()], [0, 0], [1.0], 0.5, costs=[x[:, :, :4].contiguous()])
    with pytest.raises(RuntimeError, match=r"costs must be .*of one dtype"):
        solved(square)


FAULTS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "no costs": ("there must be costs or points", lambda p: {"costs": [], "points": []}),
    "too few costs": ("costs must have 2 entries, but has 1", lambda p: {"costs": p.costs[:1]}),
    "a cloud that is not there": (r"pairs must be in \[0, 2\)", lambda p: {"pairs": [0, 2, 0, 0]}),
    "half a pair": ("even number", lambda p: {"pairs": [0, 1, 0]}),
    "too few coefficients": ("coefficients must have 2", lambda p: {"coefficients": [1.0]}),
    "an unknown cost": ("no cost of number 7", lambda p: {"kind": 7}),
    "a cost beyond 32 bits": ("no cost of number", lambda p: {"kind": 2**32}),
    "an objective beyond 32 bits": ("no objective of number", lambda p: {"objective": 2**32}),
    "an unknown objective": ("no objective of number 2", lambda p: {"objective": 2}),
    "an eps too many": ("eps must be a float64", lambda p: {"eps": p.eps.repeat(3)}),
    "eps in float32": ("eps must be a float64", lambda p: {"eps": p.eps.float()}),
    "eps of 0": ("eps must be > 0", lambda p: {"eps": 0 * p.eps}),
    "eps that is NaN": ("eps must be > 0", lambda p: {"eps": INF * 0 * p.eps}),
    "eps without end": ("eps must be finite", lambda p: {"eps": INF * p.eps}),
    "eps whose inverse has no end": ("1 / eps must be", lambda p: {"eps": 1e-309 * p.eps}),
    "eps without memory": ("eps must be a", lambda p: {"eps": without_memory(p.eps)}),
    "a negative rho": ("rho must be > 0", lambda p: {"rho": -p.rho}),
    "one rho": ("rho must be a float64", lambda p: {"rho": p.rho[:1]}),
    "points of another dtype": ("must be .*of one dtype", lambda p: {"points": cast(p.points)}),
    "weights of another dtype": ("must be .*of one dtype", lambda p: {"weights": cast(p.weights)}),
    "no points": ("must not be empty", lambda p: emptied(p, 1)),
    "no problems in a batch": ("must not be empty", lambda p: emptied(p, 0)),
    "weights without memory": (
        "must not be empty",
        lambda p: {"weights": [without_memory(t) for t in p.weights]},
    ),
    "weights of one cloud": ("weights must have 2", lambda p: {"weights": p.weights[:1]}),
}


def cast(tensors: list[Tensor]) -> list[Tensor]:
    return [t.float() for t in tensors]


def emptied(problem: Arguments, dim: int) -> dict[str, Any]:
    tensors = {key: getattr(problem, key) for key in ("costs", "points", "weights")}
    return {key: [t.narrow(dim, 0, 0) for t in value] for key, value in tensors.items()}


def without_memory(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("operation", ["solve", "unrolled_backward", "implicit_backward"])
@pytest.mark.parametrize(("message", "change"), FAULTS.values(), ids=FAULTS)
def test_operations_refuse_problems_they_would_misread(message, change, operation):
    before, problem, after = parts_of(operation)
    with pytest.raises(RuntimeError, match=message):
        operation_named(operation)(*before, *problem._replace(**change(problem)), *after)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("tol must be > 0", {"tol": ops.number(math.nan)}),
        ("max_iters must be > 0", {"max_iters": 0}),
        ("a trace is of a number of iterations", {"trace": True}),
        ("a trace is of a number of iterations", {"trace": True, "n_iters": 2**62}),
        ("init must have 4 entries", {"init": [torch.zeros(2, 4)]}),
        (
            "init must not be empty",
            {"init": [without_memory(torch.zeros(2, n).double()) for n in (4, 5, 4, 4)]},
        ),
        ("target is a cloud against itself", {"target": torch.zeros(2, 9, dtype=torch.float64)}),
    ],
)
def test_a_solve_refuses_limits_that_are_none(message, change):
    call = operation_named("solve")
    names = [argument.name for argument in call._schema.arguments]
    arguments = dict(zip(names, sample_arguments()["solve"], strict=True)) | change
    with pytest.raises(RuntimeError, match=message):
        call(*arguments.values())


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_multiscale_refuses_clouds_without_weight(weight):
    costs, points, weights, *others = sample_arguments()["solve:multiscale"]
    weights[1][1] = weight
    with pytest.raises(RuntimeError, match="multiscale needs a weight > 0 in each cloud"):
        operation_named("solve")(costs, points, weights, *others)


@pytest.mark.parametrize(
    ("message", "dims", "change"),
    [
        ("multiscale has a tol of at least 1e-5", 3, {"tol": ops.number(0.99 * MULTISCALE_TOL)}),
        ("multiscale has up to 8 coordinates", 9, {}),
        ("rho must not be subnormal", 3, {"rho": torch.full((2,), 1e-320, dtype=torch.float64)}),
        ("multiscale has no cosine of points of norm 0", 3, {"kind": COST_NUMBERS["cosine"]}),
    ],
)
def test_multiscale_refuses_what_it_cannot_do(message, dims, change):
    call = operation_named("solve")
    names = [argument.name for argument in call._schema.arguments]
    arguments = dict(zip(names, sample_arguments()["solve:multiscale"], strict=True))
    call(*(arguments | {"tol": ops.number(MULTISCALE_TOL)}).values())
    points = [torch.zeros(*x.shape[:-1], dims, dtype=x.dtype) for x in arguments["points"]]
    with pytest.raises(RuntimeError, match=message):
        call(*(arguments | {"points": points} | change).values())


def test_wrong_arguments_crash_nothing():
    """In a process of its own, which a crash would end."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz_ops.py")), "--calls", "300"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("operation", ["envelope", "unrolled", "implicit"])
def test_gradients_refuse_what_they_would_misread(operation):
    name = f"{operation}_backward"
    before, problem, (first, second, *wanted) = parts_of(name)
    call = operation_named(name)

    def refused(message: str, *arguments: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)

    loss, *seeds = before
    refused("grad_loss must be", loss.float(), *seeds, *problem, first, second, *wanted)
    refused("grad_loss must be", loss[:1], *seeds, *problem, first, second, *wanted)
    for seed in seeds:
        refused("grad_f must have 2", loss, seed[:1], seed, *problem, first, second, *wanted)
    refused("must have 2 entries", *before, *problem, first, second[:1], *wanted)
    refused("must be .*of one dtype", *before, *problem, first, cast(second), *wanted)
    only_points = problem._replace(costs=[])
    refused(r"want_costs must be in \[0, 0\)", *before, *only_points, first, second, *wanted)
    refused(r"want_points must be in \[0, 2\)", *before, *problem, first, second, [], [-1], True)


def parts_of(operation: str) -> tuple[list[Any], Any, list[Any]]:
    """What is before the problem in the sample arguments, with matrices and points, and after."""
    names = [argument.name for argument in operation_named(operation)._schema.arguments]
    arguments = sample_arguments()["solve" if operation == "solve" else f"{operation}:both"]
    start, count = names.index("costs"), len(Arguments._fields)
    problem = Arguments(*arguments[start : start + count])
    if not problem.points:
        points = [torch.zeros(2, n, 3, dtype=torch.float64) for n in (4, 5)]
        problem = problem._replace(points=points)
    return list(arguments[:start]), problem, list(arguments[start + count :])
