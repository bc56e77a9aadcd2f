// The entropic potential between two Gaussians, for host and device.
//
// Transport between N(mx, A) and N(my, B) has quadratic potentials. For the cost |x - y|^2 / 2 and
// e the regularisation (Janati, Muzellec, Peyre, Cuturi 2020):
//
//     M = I - A^1/2 ((A^1/2 B A^1/2 + e^2/4 I)^1/2 + e/2 I)^-1 A^1/2
//     g(y) = (y - my)^T M (y - my) / 2 + (y - my)^T (my - mx)
//
// Our cost is |x - y|^2: twice the potential at e = eps / 2. Any L with A = L L^T may stand for
// A^1/2 (L^T at its right): the two differ by a rotation, which cancels. So L is a Cholesky factor,
// and one eigenvalue problem is left.
//
// The work is shared by cooperating threads: threads.each(count, f) calls f(0), ..., f(count - 1)
// in any order and returns when all are done. On a GPU they are a block, on the CPU there is one.
#pragma once

#include <cmath>

#include "core/math.h"

namespace otloss {

constexpr int kGaussianDims = 64;  // matrices stay small: four fit into the memory of a block

struct GaussianWork {
  double* A;        // (d, d) in: the covariance of x
  double* B;        // (d, d) in: that of y, out: M
  double* L;        // (d, d)
  double* V;        // (d, d)
  double* scratch;  // (3 kGaussianDims,)
};

// The lower L with A = L L^T; A is used up. Columns without variance are 0.
template <class Threads>
OTLOSS_COOPERATIVE void factor(Threads& threads, int d, double* A, double* L) {
  constexpr double kLeast = 1e-13;  // of the trace
  double trace = 0;
  for (int k = 0; k < d; ++k) trace += A[k * d + k];
  threads.each(d * d, [&](int e) { L[e] = 0; });
  for (int k = 0; k < d; ++k) {
    const double pivot = A[k * d + k];  // read before each() returns: A is written after that
    const bool varies = pivot > 0 && pivot > kLeast * trace;  // rounding makes either negative
    threads.each(d - k, [&](int i) {
      L[(k + i) * d + k] = varies ? A[(k + i) * d + k] / std::sqrt(pivot) : 0;
    });
    const int rest = d - k - 1;
    threads.each(rest * rest, [&](int e) {
      const int i = k + 1 + e / rest, j = k + 1 + e % rest;
      A[i * d + j] -= L[i * d + k] * L[j * d + k];
    });
  }
}

// S = V^T diag(S) V with eigenvectors as rows of V, by Jacobi rotations. Those of a round touch
// disjoint rows and columns, as the games of a round of a tournament: all are made at once.
template <class Threads>
OTLOSS_COOPERATIVE void diagonalise(Threads& threads, int d, double* S, double* V,
                                    double* scratch) {  // (2 kGaussianDims,)
  constexpr int kSweeps = 30;
  constexpr double kLeast = 1e-12;  // of the trace
  const int rounds = d + d % 2 - 1, games = (rounds + 1) / 2;
  double trace = 0;  // rounding makes small eigenvalues negative
  for (int k = 0; k < d; ++k) trace += std::abs(S[k * d + k]);
  threads.each(d * d, [&](int e) { V[e] = e / d == e % d ? 1 : 0; });
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    double* const moved = scratch + (2 + sweep % 2) * games;  // (games,)
    threads.each(games, [&](int game) { moved[game] = 0; });
    for (int round = 0; round < rounds; ++round) {
      const auto first = [&](int game) { return game ? (round + game) % rounds : rounds; };
      const auto second = [&](int game) { return game ? (round - game + rounds) % rounds : round; };
      threads.each(games, [&](int game) {
        const int p = first(game), q = second(game);
        double c = 1, s = 0;
        if (p < d && std::abs(S[p * d + q]) > kLeast * trace) {
          const double theta = (S[q * d + q] - S[p * d + p]) / (2 * S[p * d + q]);
          const double t =
              std::copysign(1 / (std::abs(theta) + std::sqrt(theta * theta + 1)), theta);
          c = 1 / std::sqrt(t * t + 1), s = t * c;
          moved[game] = 1;
        }
        scratch[2 * game] = c, scratch[2 * game + 1] = s;
      });
      const auto rotate = [&](int game, double& p, double& q) {
        const double c = scratch[2 * game], s = scratch[2 * game + 1], old = p;
        p = c * old - s * q, q = s * old + c * q;
      };
      threads.each(games * d, [&](int e) {
        const int game = e / d, k = e % d, p = first(game), q = second(game);
        if (p >= d) return;
        rotate(game, S[k * d + p], S[k * d + q]);
        rotate(game, V[p * d + k], V[q * d + k]);
      });
      threads.each(games * d, [&](int e) {
        const int game = e / d, k = e % d, p = first(game), q = second(game);
        if (p < d) rotate(game, S[p * d + k], S[q * d + k]);
      });
    }
    double any = 0;
    for (int game = 0; game < games; ++game) any += moved[game];
    if (any == 0) break;
  }
}

// M of the formula, to w.B.
template <class Threads>
OTLOSS_COOPERATIVE void gaussian_matrix(Threads& threads, int d, double eps,
                                        const GaussianWork& w) {
  const double e = eps / 2;
  // out_ij = term_ij + sum_k factor_k left(i, k) right(k, j)
  const auto product = [&](double* out, auto&& term, auto&& left, auto&& right) {
    threads.each(d * d, [&](int at) {
      const int i = at / d, j = at % d;
      double sum = term(i, j);
      for (int k = 0; k < d; ++k) sum += left(i, k) * right(k, j);
      out[at] = sum;
    });
  };
  const auto none = [](int, int) { return 0.0; };
  const auto A = [&](int i, int j) { return w.A[i * d + j]; };
  const auto B = [&](int i, int j) { return w.B[i * d + j]; };
  const auto L = [&](int i, int j) { return w.L[i * d + j]; };
  factor(threads, d, w.A, w.L);
  product(w.A, none, B, L);
  product(w.B, none, [&](int i, int k) { return L(k, i); }, A);
  diagonalise(threads, d, w.B, w.V, w.scratch);
  double* const inverse = w.scratch + 2 * kGaussianDims;  // (d,)
  threads.each(d, [&](int k) {
    const double value = B(k, k) > 0 ? B(k, k) : 0;
    inverse[k] = 1 / (std::sqrt(value + e * e / 4) + e / 2);
  });
  product(w.A, none, L, [&](int k, int j) { return w.V[j * d + k]; });
  product(
      w.B, [](int i, int j) { return i == j ? 1.0 : 0.0; },
      [&](int i, int k) { return -inverse[k] * A(i, k); }, [&](int k, int j) { return A(j, k); });
}

// What coordinate l adds to g at the point my + z(0), ..., z(d - 1); shift: my - mx.
template <class Point>
OTLOSS_COOPERATIVE double gaussian_term(int d, const double* M, const double* shift, int l,
                                        Point&& z) {
  double slope = 2 * shift[l];
  for (int k = 0; k < d; ++k) slope += M[k * d + l] * z(k);
  return z(l) * slope;
}

}  // namespace otloss
