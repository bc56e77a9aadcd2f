"""Random problems against a float64 oracle that proves itself (tests/certified.py).

    python -m tests.fuzz --out results.jsonl --count 20000      resumes where the file ends
    python -m tests.fuzz --seed 1234 --count 1                  one problem again, in full
    python -m tests.fuzz --report results.jsonl                 the table

Every seed is one problem: clouds, weights, cost, eps, options and a call, drawn over all that is
accepted. OT is the optimal value, which the oracle knows to lie in [low, high]; J the value that
is returned, e the marginal error of the potentials returned, in float64; m the plan's mass, R =
max C - min C, G the largest gradient of the cost between two points, u the machine epsilon of the
dtype. Rounding is r = 128 u (|J| + m (max C + rho)), 2 for max C with the cosine cost, and
relative to the plan w = u (128 + 16 k), k = (max|f| + max|g| + max C) / min(eps, rho). delta is
how far a dual value may be below OT.

check       | bound
refused     | a ValueError only for eps < 4 u max C (1 for the cosine cost, an upper bound where
            | costs are not stored) and for plans that overflow; no other exception
warnings    | none beside ConvergenceWarning
finite      | no NaN, no infinity
flag        | a ConvergenceWarning exactly where `converged` is False
converged   | if `converged`, e <= 1.1 tol, and 8 u max C / eps more where costs are made from
            | points, u (max|f| + max|g|) / eps more where a marginal is soft, since unequal totals
            | move f and g
error       | |marginal_error - e| <= 0.1 e + w
above       | J <= high + r: it is a dual value, converged or not
value       | if converged, J >= low - delta - r, with delta the smaller of 2 tol m (R + eps) (the
            | dual is concave, potentials differ by R) and, balanced, 20 tol |J| (docs/solver.md)
gap         | |J - OT| <= duality_gap, but for rounding in float64, of costs that a function makes
            | for r
sign        | a converged divergence is not negative, where e^(-C / eps) is positive definite
transport   | R (|P - P*| + e m) + w m max C + r, where |P - P*| <= sqrt(3 m delta / eps) in L1
            | (Pinsker), delta that of the potentials returned, or else the one of "value"
plan        | the gradient in C: that L1 distance + w m
points      | the gradient in x and y, norms summed over points: G times that, G of the whole call
            | for w
implicit    | those of transport values: times what the linear system makes of an error in the
            | plan
weights     | as dual potentials the gradients are within delta + r of OT, 8 delta in a
            | divergence; where the marginal is soft (rho + eps) sqrt(3 m (delta + r) / rho) in
            | L1(a)
together    | <a, da> + <b, db> is the derivative of the value as both weights grow, delta + r off
empty bins  | the gradient in a weight of 0 is the softmin of the other potential, 4 eps e m times
            | the largest density of the plan there off (tol for e of a loss), and 4 eps w
padding     | gradient 0 at points of weight 0
iterations  | L of them: 16 u L (m max C + <a, |f|> + <b, |g|>), m the largest total of the weights,
            | the plan and the marginals that it is held to; where a marginal is soft also 16 u
            | eps m_a m_b, and L times 16 u (rho + |f|) of each point of that marginal
unrolled    | their gradients: 2 w L m G, L times that if not at fixed potentials, and 1 + 2 max C
            | / eps times that for transport values

Where the oracle's interval is wider than 1e-6 of its value ("unproven") only values are judged.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from .bounds import Judge
from .command import arguments, report, run
from .problems import draw
from .problems import run as answer_to


def examine(seed: int) -> dict[str, Any]:
    """All that is to be known of one seed, as a line of the results."""
    start = time.process_time()
    case = draw(seed)
    answer = answer_to(case)
    used = time.process_time() - start
    judge = Judge(case, answer)
    outcome = judge.judge()
    failed = [name for name, ratio in judge.ratios.items() if ratio > 1]
    return {
        "seed": seed, "outcome": outcome, "proven": judge.proven, "failed": failed,
        "ratios": {k: float(f"{v:.3g}") for k, v in judge.ratios.items()}, "notes": judge.notes,
        "case": case.kind, "seconds": round(used, 3),
        "all_seconds": round(time.process_time() - start, 3),
    }  # fmt: skip


def main() -> int:
    return run(arguments(__doc__, count=20_000).parse_args(), "tests.fuzz", examine, report)


if __name__ == "__main__":
    sys.exit(main())
