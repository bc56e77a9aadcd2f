"""What is demanded of an answer: the table of __main__.py, one check each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import certified
import numpy as np
import oracle
import torch
from certified import Array, Proof
from torch import Tensor

from .problems import UNIT, Answer, Case, Pair, kept

U64 = 2.0**-52
UNDERFLOW = 1e-30  # of the weights: less is not transported in float32
PROVEN = 1e-6  # the width of the oracle's interval over its value


@dataclass
class Term:
    """One of the problems of a call, solved by the oracle."""

    coefficient: float
    x: Tensor
    y: Tensor
    C: Array
    proof: Proof
    steepest: float  # G
    rough: float  # G where differences of points are rounded
    unit: float
    largest: float  # bound of |C| and of potentials to start from, for rounding

    @property
    def spread(self) -> float:
        return float(self.C.max() - self.C.min())

    @property
    def mass(self) -> float:
        p = self.proof.problem
        return max(self.proof.mass, float(p.a.sum()) if p.balanced else 0.0)

    @property
    def rounding(self) -> float:
        eps = self.proof.problem.eps
        return 128 * self.unit * (abs(self.proof.low) + self.work) + U64 * eps * self.mass

    @property
    def work(self) -> float:
        """The size of what a value is made of."""
        p = self.proof.problem
        soft = [rho for rho in (p.rho_x, p.rho_y) if math.isfinite(rho)]
        return self.mass * (self.largest + sum(soft))

    def promise(self, tol: float) -> float:
        """How far below OT a converged dual value may be."""
        first = 2 * tol * self.mass * (self.spread + self.proof.problem.eps)
        return min(first, 20 * tol * abs(self.proof.high)) if self.proof.problem.balanced else first

    def apart(self, delta: float) -> float:
        """The L1 distance of a plan whose dual value is delta below OT from the oracle's."""
        eps, width = self.proof.problem.eps, self.proof.width
        return math.sqrt(3 * self.mass * max(delta, 0) / eps) + math.sqrt(
            3 * self.mass * width / eps
        )

    def noise(self, f: Array, g: Array) -> float:
        """Relative rounding of the entries of a plan and of the marginals it is held to."""
        size = float(np.abs(f).max() + np.abs(g).max()) + self.largest
        p = self.proof.problem
        return self.unit * (128 + 16 * size / min(p.eps, p.rho_x, p.rho_y))


def make_term(case: Case, pair: Pair, k: int) -> Term:
    coefficient, x, y, a, b, p, q = pair
    with torch.no_grad():
        C = (
            case.kept(case.costs[k], k).double() if case.call == "solve" else case.matrix(x, y)
        ).numpy()
    problem = certified.Problem(C, a.numpy(), b.numpy(), case.eps, p, q)
    proof = certified.solve(problem)
    if problem.balanced and not case.balanced:  # a self problem, with the KL of the others
        mass = certified.with_total(problem.a)[1]
        proof.low, proof.high = (v + case.eps * mass * (mass - 1) for v in (proof.low, proof.high))
    largest = float(np.abs(C).max())
    if case.cost == "cosine" and case.call != "solve":
        largest = 2.0
    largest += 4 * case.init * case.eps
    steepest = _steepest(case, x, y, C)
    rough = steepest * _roughness(case, proof.P, C)
    return Term(coefficient, x, y, C, proof, steepest, rough, UNIT[case.x.dtype], largest)


def _roughness(case: Case, P: Array, C: Array) -> float:
    """Directions of near points are quotients of small numbers, made from large coordinates."""
    if case.cost != "euclidean":
        return 1.0
    near = P[C > 0] / C[C > 0]
    return max(1.0, float(near.sum() / max(P.sum(), 1e-300) * C.max()))


def _steepest(case: Case, x: Tensor, y: Tensor, C: Array) -> float:
    if case.cost == "sqeuclidean":
        return 2 * math.sqrt(C.max())
    if case.cost == "euclidean":
        return 1.0
    if case.cost == "cosine":
        norms = torch.cat([x, y]).double().norm(dim=-1)
        return float(1 / norms[norms > 0].min()) if bool((norms > 0).any()) else 0.0
    n, m = len(x), len(y)
    u = x.double().repeat_interleave(m, 0)[:, None].requires_grad_()
    v = y.double().repeat(n, 1)[:, None].requires_grad_()
    grads = torch.autograd.grad(case.cost(u, v).sum(), (u, v))
    return max(float(t.norm(dim=-1).max()) for t in grads)


class Judge:
    """Collects the ratio of each deviation to its bound; more than 1 is a failure."""

    def __init__(self, case: Case, answer: Answer) -> None:
        self.case, self.answer = case, answer
        self.ratios: dict[str, float] = {}
        self.notes: list[str] = []
        self.proven = True

    def check(self, name: str, deviation: float, bound: float) -> None:
        least = torch.finfo(self.case.x.dtype).tiny  # no number is finer
        ratio = float(deviation / max(bound, least)) if deviation > 0 else 0.0
        ratio = math.inf if math.isnan(deviation) or math.isnan(bound) else ratio
        if ratio > 1:
            self.notes.append(f"{name}: {deviation:.3g}, allowed {bound:.3g}")
        self.ratios[name] = max(self.ratios.get(name, 0.0), ratio)

    def demand(self, name: str, right: bool, note: str) -> None:
        self.check(name, 0.0 if right else math.inf, 1.0)
        if not right:
            self.notes.append(note)

    # ------------------------------------------------------------------------------ the whole call

    def judge(self) -> str:
        case, answer = self.case, self.answer
        if answer.raised is not None:
            return self.refusal(answer.raised)
        self.demand("warnings", not answer.other, f"{answer.other}")
        tensors = [answer.value, *answer.grads.values()]
        finite = all(bool(t.isfinite().all()) for t in tensors)
        self.demand("finite", finite, "NaN or infinity in the value or a gradient")
        if case.options["n_iters"] is None:
            right = answer.warned != all(answer.converged)
            self.demand("flag", right, f"converged {answer.converged}, warned {answer.warned}")
        if finite:
            for k in range(len(case.x)):
                self.problem(k)
        if case.options["n_iters"] is not None:
            return "iterations"
        return "converged" if all(answer.converged) else "not converged"

    def refusal(self, error: Exception) -> str:
        case = self.case
        unit, bound, largest = UNIT[case.x.dtype], 0.0, 0.0
        for k in range(len(case.x)):
            for _, x, y, *_ in case.pairs(k):
                with torch.no_grad():
                    largest = max(largest, float(case.matrix(x, y).abs().max()))
                norms = [float(t.double().norm(dim=-1).max()) for t in (x, y)]
                power = {"sqeuclidean": 2, "euclidean": 1}.get(case.cost)
                bound = max(bound, 2.0 if power is None else sum(norms) ** power)
        if case.options["method"] == "dense" or callable(case.cost) or case.call == "solve":
            bound = 1.0 if case.cost == "cosine" and case.call != "solve" else 0.0
        limit = 4 * unit * max(largest, bound)
        right = isinstance(error, ValueError) and "can resolve" in str(error)
        right &= case.eps < 1.01 * limit
        if isinstance(error, ValueError) and "overflow" in str(error):
            right = any(self.overflows(k) for k in range(len(case.x)))
        self.demand("refused", right, self.answer.trace[-1500:])
        return "refused"

    def overflows(self, k: int) -> bool:
        """Negative costs and a weak penalty make plans of any mass."""
        terms = [make_term(self.case, pair, k) for pair in self.case.pairs(k)]
        most = 1e-3 * torch.finfo(self.case.x.dtype).max
        return not all(t.mass * t.largest < most and abs(t.proof.low) < most for t in terms)

    # ---------------------------------------------------------------------- problem k of the batch

    def problem(self, k: int) -> None:
        case = self.case
        if case.options["n_iters"] is not None:
            self.iterations(k)
            return
        terms = [make_term(case, pair, k) for pair in case.pairs(k)]
        # A thousandth of the rounding of eps is as good a proof, where costs are equal.
        sizes = [
            max(abs(t.proof.low), t.mass * (t.spread + 1e-3 / PROVEN * U64 * case.eps))
            for t in terms
        ]
        widths = [t.proof.width / size for t, size in zip(terms, sizes, strict=True)]
        self.proven &= all(w <= PROVEN for w in widths)
        value = float(self.answer.value[k])
        converged = self.answer.converged[k]
        tol = case.options["tol"]
        deltas: list[float] | None = [t.promise(tol) for t in terms] if converged else None
        if self.answer.f is not None:
            deltas = [self.potentials(k, terms[0])]
        if not case.transport:
            self.value(k, terms, value, converged)
        if not self.proven:
            return
        if deltas is None:
            if len(terms) > 1 or case.transport:
                return
            deltas = [max(0.0, terms[0].proof.high - value) + terms[0].rounding]
        self.gradients(k, terms, value, deltas)

    def value(self, k: int, terms: list[Term], value: float, converged: bool) -> None:
        tol, eps = self.case.options["tol"], self.case.eps
        low = sum(
            t.coefficient * (t.proof.low if t.coefficient > 0 else t.proof.high) for t in terms
        )
        high = sum(
            t.coefficient * (t.proof.high if t.coefficient > 0 else t.proof.low) for t in terms
        )
        if len(terms) > 1 and not self.case.balanced:
            p = terms[0].proof.problem
            apart = certified.with_total(p.a)[1] - certified.with_total(p.b)[1]
            low, high = (v + eps / 2 * apart**2 for v in (low, high))
        r = sum(t.rounding for t in terms)
        if len(terms) > 1:  # eps times masses cancels on paper
            r = 128 * terms[0].unit * (abs(low) + sum(t.work for t in terms))
            r += U64 * eps * terms[0].mass + 64 * 2.0**-63 * sum(abs(t.proof.low) for t in terms)
        up = sum(t.promise(tol) for t in terms if t.coefficient < 0) / 2
        down = sum(t.promise(tol) for t in terms if t.coefficient > 0)
        if converged or len(terms) == 1:
            self.check("above", value - high, up + r)
        if converged:
            self.check("value", low - value, down + r)
            if len(terms) > 1 and self.case.symmetric:
                self.check("sign", -value, 0.0)
        if self.answer.gap is not None:
            pair, proof = self.case.pairs(k, exactly=True)[0], terms[0].proof
            p = replace(proof.problem, a=pair.a.numpy(), b=pair.b.numpy())
            exactly = certified.prove(p, proof.f, proof.g)
            masses = terms[0].mass + float(p.a.sum() * p.b.sum())
            own = r if callable(self.case.cost) else r * U64 / terms[0].unit  # costs of a function
            gap = self.answer.gap[k] + own + 16 * U64 * eps * masses
            self.check("gap", max(value - exactly.high, exactly.low - value), gap)

    def potentials(self, k: int, term: Term) -> float:
        """Checks of the potentials returned; how far their dual value is below OT."""
        case, answer, p = self.case, self.answer, term.proof.problem
        f, g = (kept(v[k], w, k).numpy() for v, w in ((answer.f, case.a), (answer.g, case.b)))
        with np.errstate(all="ignore"):
            P = certified.plan(p, f, g)
            A, B = certified.wanted(p.a, f, p.rho_x), certified.wanted(p.b, g, p.rho_y)
            rows, columns = np.abs(P.sum(1) - A).sum(), np.abs(P.sum(0) - B).sum()
            e = float(max(rows / max(A.sum(), 1e-300), columns / max(B.sum(), 1e-300)))
            delta = certified.gap_of(p, term.proof.P, f, g)
        if e < 1:
            self.check("error", abs(answer.error[k] - e), 0.1 * e + term.noise(f, g))
        if answer.converged[k]:
            # Costs made from points have a rounding of their own, and so have potentials that
            # unequal totals move.
            made = 8 * term.largest if case.call == "solve_sample" else 0.0
            moved = 0.0 if case.balanced else float(np.abs(f).max() + np.abs(g).max())
            rounding = term.unit * (made + moved) / case.eps
            if rounding < 1:
                self.check("converged", e, 1.1 * case.options["tol"] + 64 * U64 + rounding)
        return delta if math.isfinite(delta) else math.inf

    # -------------------------------------------------------------------------------- its gradients

    def gradients(self, k: int, terms: list[Term], value: float, deltas: list[float]) -> None:
        case = self.case
        implicit = case.transport and case.options["backward"] != "envelope"
        weights, bounds = [], []  # of the gradients in the cost matrices
        for term, delta in zip(terms, deltas, strict=True):
            apart = term.apart(delta)
            noise = term.noise(term.proof.f, term.proof.g)
            if noise > 0.5 or not math.isfinite(apart):
                return
            W, factor = term.proof.P, 1.0
            if implicit:
                if term.C.size > 10_000:
                    return
                W, factor = implicit_gradient(term)
                if not factor < 1e30:
                    return
                noise += 1e-12 if term.unit == U64 else 1e-7  # what conjugate gradients leave
            weights.append(term.coefficient * W)
            size = abs(term.coefficient) * factor
            bounds.append((size * apart, size * noise * term.mass))
            if case.transport and len(terms) == 1:
                e = 2 * (self.answer.error[k] if self.answer.error else case.options["tol"])
                bound = term.spread * (apart + e * term.mass)
                off = abs(value - term.proof.transport())
                self.check(
                    "transport", off, bound + noise * term.mass * term.largest + term.rounding
                )
        name = "implicit" if implicit else "plan"
        self.in_costs(k, terms, weights, bounds, name)
        # Of an asymmetric cost the two potentials of a self problem do not determine their sum.
        if not case.transport and (len(terms) == 1 or case.symmetric):
            self.in_weights(k, terms, value, deltas)

    def in_costs(
        self,
        k: int,
        terms: list[Term],
        W: list[Array],
        bounds: list[tuple[float, float]],
        name: str,
    ) -> None:
        """Gradients in C or in the points against sum W dC."""
        case, grads = self.case, self.answer.grads
        if "C" in grads:
            got = grads["C"][k]
            self.check(name, float(np.abs(case.kept(got, k).numpy() - W[0]).sum()), sum(bounds[0]))
        own = {"x": (case.x, case.a), "y": (case.y, case.b)}
        leaves = {s: kept(t[k], w, k).double().requires_grad_() for s, (t, w) in own.items()}
        chosen = [("x", "y"), ("x", "x"), ("y", "y")][: len(terms)]
        total = sum(
            (torch.from_numpy(V) * self.double_matrix(leaves[i], leaves[j])).sum()
            for V, (i, j) in zip(W, chosen, strict=True)
        )
        expected = dict(zip("xy", torch.autograd.grad(total, list(leaves.values())), strict=True))
        for side in {"x", "y"} & set(grads):
            # Rounding is that of sums that cancel where a cloud is small beside the other.
            rough = max(t.rough for t in terms)
            bound = sum(
                (apart * t.steepest + noise * rough) * pair.count(side)
                for (apart, noise), t, pair in zip(bounds, terms, chosen, strict=True)
            )
            bound += UNDERFLOW * rough * sum(float(t.proof.problem.a.sum()) for t in terms)
            got = grads[side][k]
            off = (kept(got, own[side][1], k) - expected[side]).norm(dim=-1).sum()
            label = "points" if name == "plan" else name
            self.check(label, float(off), bound)
            if own[side][1] is not None:
                padding = got[own[side][1][k] == 0]
                self.demand("padding", not bool(padding.any()), "a gradient at a point of weight 0")

    def double_matrix(self, x: Tensor, y: Tensor) -> Tensor:
        cost = self.case.cost
        return oracle.cost(x, y, cost) if isinstance(cost, str) else cost(x, y)

    def in_weights(self, k: int, terms: list[Term], value: float, deltas: list[float]) -> None:
        case, grads = self.case, self.answer.grads
        p, eps, unit = terms[0].proof.problem, case.eps, terms[0].unit
        r = sum(t.rounding + t.proof.width for t in terms)
        allowed = sum(deltas) * (1 if len(terms) == 1 else 8) + r
        sides = [("a", case.a, p, 0), ("b", case.b, p.transposed(), 1)]
        both = []
        for name, w, q, own in sides:
            if name not in grads:
                continue
            grad = kept(grads[name][k], w, k).numpy()
            both.append(float((q.a * grad).sum()))
            if len(terms) > 1:
                grad = grad + self.weight_gradient(terms[1 + own].proof) / 2
            if not case.balanced:  # what the total of the weights itself adds
                grad = grad - eps * (q.b.sum() - 1)
                grad = grad - (eps * (q.a.sum() - q.b.sum()) if len(terms) > 1 else 0.0)
            proof = terms[0].proof
            f, P = (proof.f, proof.P) if own == 0 else (proof.g, proof.P.T)
            if math.isinf(q.rho_x):  # a potential: with the best other one nearly optimal
                g = certified.damping(q.rho_y, eps) * certified.softmin(q.C.T, grad, q.a, eps)
                size = float(np.abs(q.a * grad).sum() + np.abs(q.b * g).sum())
                if w is not None:
                    self.empty_bins(k, terms, own, grads[name][k], g)
                if terms[0].noise(grad, g) < 0.1:
                    off = certified.gap_of(q, P, grad, g)
                    self.check("weights", off, allowed + 64 * unit * size)
            else:
                scale, target = q.rho_x + eps, certified.wanted(q.a, f, q.rho_x)
                off = float((q.a * np.abs(grad + scale * np.expm1(-f / q.rho_x))).sum())
                returned = (
                    q.a.sum() - (q.a * grad).sum() / scale
                )  # the total asked for by the gradient
                parts = [q.a.sum(), target.sum(), abs(returned), *(t.mass for t in terms)]
                bound = scale * (
                    math.sqrt(3 * max(parts) * allowed / q.rho_x) + 64 * unit * sum(parts)
                )
                self.check("weights", off, bound + 64 * unit * eps * float(q.a.sum() * q.b.sum()))
        if case.balanced and len(both) == 2:
            mass = float(p.a.sum()) if len(terms) == 1 else 0.0
            middle = sum(t.coefficient * (t.proof.low + t.proof.high) / 2 for t in terms)
            right = middle - eps * mass
            self.check("together", abs(sum(both) - right), allowed + 64 * unit * eps * mass)

    def empty_bins(self, k: int, terms: list[Term], own: int, grad: Tensor, g: Array) -> None:
        """The gradient at points of weight 0 that are somewhere: the softmin of the best other
        potential ``g``, which changes by no more than the density of the plan times its error."""
        case, eps = self.case, self.case.eps
        clouds, weights = [(case.x, case.y), (case.a, case.b)]
        if own:
            clouds, weights = clouds[::-1], weights[::-1]
        points, empty = clouds[0][k], weights[0][k] == 0
        if case.call == "solve":
            C = (case.costs[k].mT if own else case.costs[k])[empty]
            C = kept(C.mT, weights[1], k).mT.double().numpy()
        else:
            empty &= points.isfinite().all(-1)
            other = kept(clouds[1][k], weights[1], k)
            with torch.no_grad():
                pair = (other, points[empty]) if own else (points[empty], other)
                C = case.matrix(*pair).numpy()
                C = C.T if own else C
        if not bool(empty.any()):
            return
        q = terms[0].proof.problem.transposed() if own else terms[0].proof.problem
        f = certified.softmin(C, g, q.b, eps)
        if not case.balanced:
            f += eps * (q.b.sum() - 1)
        e = case.options["tol"]
        if self.answer.error is not None:
            e = max(e, self.answer.error[k])
        elif not self.answer.converged[k]:
            return
        slack = e * terms[0].mass * density(f, g, C, eps)
        if len(terms) > 1:
            self_term = terms[1 + own].proof
            with torch.no_grad():
                C = case.matrix(points[empty], kept(points, weights[0], k)).numpy()
            v = (self_term.f + self_term.g) / 2
            v_empty = certified.softmin(C, v, q.a, eps)
            slack += e * terms[0].mass * density(v_empty, v, C, eps)
            f += eps * (q.a.sum() - q.b.sum()) * (not case.balanced)
            f -= v_empty + eps * (q.a.sum() - 1) * (not case.balanced)
        if slack < 0.1:
            noise = 4 * eps * terms[0].noise(f, g)
            off = float(np.abs(grad[empty].numpy() - f).max())
            self.check("empty bins", off, 4 * eps * slack + noise)

    def weight_gradient(self, proof: Proof) -> Array:
        """Of OT(w, w) in w, exact up to a constant where it is balanced."""
        p = proof.problem
        f = (proof.f + proof.g) / 2
        if math.isinf(p.rho_x):
            one = f + (0.0 if self.case.balanced else p.eps * (p.b.sum() - 1))
        else:
            one = -(p.rho_x + p.eps) * np.expm1(-f / p.rho_x) + p.eps * (p.b.sum() - 1)
        return 2 * one

    # -------------------------------------------------------------- a fixed number of iterations

    def iterations(self, k: int) -> None:
        case = self.case
        L, objective = case.options["n_iters"], case.options["objective"]
        fixed = case.options["backward"] == "envelope"
        own = {"x": (case.x, case.a), "y": (case.y, case.b)}
        leaves = {s: kept(t[k], w, k).double().requires_grad_() for s, (t, w) in own.items()}
        if case.call == "solve":
            leaves["C"] = case.kept(case.costs[k], k).double().requires_grad_()
        chosen = [("x", "y"), ("x", "x"), ("y", "y")]
        rho = None if case.balanced else case.rho
        pairs = case.pairs(k)
        total, scale, noise, steepest = torch.zeros(()).double(), 0.0, 0.0, 0.0
        value = 0.0
        for (coefficient, x, y, a, b, p, q), (i, j) in zip(pairs, chosen, strict=False):
            C = leaves["C"] if "C" in leaves else self.double_matrix(leaves[i], leaves[j])
            strength = None if rho is None else (p, q)
            found = oracle.unrolled_term(C, a, b, case.eps, objective, L, strength)
            f, g = oracle.iterate(C.detach(), a, b, case.eps, L, (p, q))[-1]
            P = oracle.plan(C.detach(), f, g, a, b, case.eps)
            term = (P * C).sum() if fixed else found.surrogate
            total = total + coefficient * term
            value += coefficient * float(found.value)
            # What soft marginals ask for: rounding of a potential v is one of rho share(v) in them.
            asked = [(w * (-v / r).exp(), v, r) for w, v, r in ((a, f, p), (b, g, q))]
            # On the way there the plan's mass is as much as is given or asked for.
            mass = max(float(t.sum()) for t in (P, a, b, *(t for t, *_ in asked)))
            soft = [(t * (r + v.abs())).sum() for t, v, r in asked if math.isfinite(r)]
            largest = float(C.detach().abs().max()) if case.cost != "cosine" else 2.0
            scale += mass * largest + float((a * f).abs().sum() + (b * g).abs().sum() + sum(soft))
            kappa = (float(f.abs().max() + g.abs().max()) + largest) / case.eps
            stretch = 1.0 if fixed else L
            if objective == "transport" and not fixed:
                stretch *= 1 + 2 * largest / case.eps
            unit = UNIT[case.x.dtype]
            noise += 16 * unit * L * (4 + kappa) * stretch * mass
            of_pair = C.detach().numpy()
            rough = _steepest(case, x, y, of_pair) * _roughness(case, P.numpy(), of_pair)
            steepest = max(steepest, rough)
            if objective == "transport":
                scale += 16 * kappa * mass * largest
        if len(pairs) > 1 and not case.balanced and objective == "regularized":
            value += case.eps / 2 * float(pairs[0][3].sum() - pairs[0][4].sum()) ** 2
        masses = [float(pair[3].sum() * (1 if case.balanced else pair[4].sum())) for pair in pairs]
        r = 16 * UNIT[case.x.dtype] * (L * scale + (not case.balanced) * case.eps * max(masses))
        r += 64 * U64 * case.eps * max(mass, *masses)
        self.check("iterations", abs(float(self.answer.value[k]) - value), r)
        for side in set(leaves) & set(self.answer.grads):
            (right,) = torch.autograd.grad(total, leaves[side], retain_graph=True)
            got = self.answer.grads[side][k]
            if side == "C":
                off, bound = (case.kept(got, k) - right).abs().sum(), 2 * noise
            else:
                off = (kept(got, own[side][1], k) - right).norm(dim=-1).sum()
                bound = 2 * noise * steepest
            self.check("unrolled", float(off), bound)


def density(f: Array, g: Array, C: Array, eps: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp((f[:, None] + g - C) / eps).max())


def implicit_gradient(term: Term) -> tuple[Array, float]:
    """d<P, C>/dC at the optimum, and what it multiplies an error of the plan with."""
    proof, C, p = term.proof, term.C, term.proof.problem
    P = certified.plan(p, proof.f, proof.g)
    r, c = P.sum(1), P.sum(0)
    diagonal = np.concatenate([r * (1 + p.eps / p.rho_x), c * (1 + p.eps / p.rho_y)])
    n = len(r)
    M = np.diag(diagonal)
    M[:n, n:], M[n:, :n] = P, P.T
    root = np.sqrt(np.maximum(diagonal, 1e-300))
    values, vectors = np.linalg.eigh(M / root[:, None] / root)
    right = np.concatenate([(P * C).sum(1), (P * C).sum(0)]) / root
    counted = values > (1e-12 if not p.balanced else max(1e-12, 1.5 * values[0]))
    least = float(values[counted].min()) if counted.any() else 1.0
    z = (vectors[:, counted] * (1 / values[counted])) @ (vectors[:, counted].T @ right) / root
    inside = (C - z[:n, None] - z[n:]) / p.eps
    q = float(np.abs(inside).max())
    share = float(min(r.min(), c.min())) / term.mass
    factor = 1 + q + 2 * q / (least * math.sqrt(max(share, 1e-300)))
    return P * (1 - inside), factor
