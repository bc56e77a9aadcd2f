"""A minute of tests/fuzz, and its oracle against the other one."""

from __future__ import annotations

import math
import os
import time

import certified
import oracle
import pytest
import torch
from conftest import VARIABLE
from fuzz.__main__ import examine
from helpers import STRENGTHS, clouds, rho

SECONDS = 60


@pytest.mark.slow
def test_random_problems_are_within_their_bounds():
    seed = 10**6 * (1 + int(os.environ[VARIABLE]))
    end, failures = time.monotonic() + SECONDS, []
    while time.monotonic() < end:
        line = examine(seed)
        if line["failed"]:
            failures.append(f"python -m tests.fuzz --seed {seed} --count 1: {line['notes']}")
        seed += 1
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("strength", [None, *STRENGTHS])
def test_the_interval_holds_the_value_of_the_other_oracle(strength, rng):
    """It is narrow at the solution, and holds the value at any potentials."""
    c = clouds(rng, 7, 5, 2, weights="wide")
    C, eps = oracle.cost(c.x, c.y, "sqeuclidean"), 0.1
    penalties = oracle.HARD if strength is None else rho(strength)
    right = oracle.solution(C, c.a, c.b, eps, penalties).value
    problem = certified.Problem(C.numpy(), c.a.numpy(), c.b.numpy(), eps, *penalties)
    proof = certified.solve(problem)
    assert proof.width < 1e-9
    assert math.isclose(proof.low, right, rel_tol=1e-9, abs_tol=1e-9)
    f, g = (v + 0.1 * torch.randn(len(v), generator=rng).numpy() for v in (proof.f, proof.g))
    far = certified.prove(problem, f, g)
    assert far.low < proof.low
    assert far.high > proof.high
