// In double: what a duality gap takes of the plan, over the pairs of leaves that hold something.
//
// P_L, the plan on the pairs that are kept and 0 on all others, is what becomes feasible:
//     P'_ij = s_i t_j P_L,ij + u_i v_j,  s and t <= 1, u what rows lack, v the part of what columns
//     do
// so that of the pairs that are not kept, whose mass is at most E,
//     KL(P'|P) = sum of phi(P', P) over kept pairs + sum of (R log(R / P) - R) over others + E,
// phi(p, q) = p log(p / q) - p + q, R = u v^T. The second sum is that over all pairs, which splits
// into sums over x and over y, as log P does, less that over the kept.
#include <algorithm>
#include <cmath>

#include "cpu/multiscale/lanes.h"
#include "cpu/multiscale/plan.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu::multiscale {
namespace {

constexpr double kTiny = 1e-300;

// A row of the plan on a leaf of y.
struct LeafRow {
  int64_t count, stride;  // columns
  double k, F;            // F of x, with log2 of the weight
  const double *x, *y;    // (d,), (d, stride)
  const double* G;        // (count,), with log2 of the weights
  double *z, *P;          // (count,) out: log2 P, P
};

template <int kD>
struct MakeRow {
  template <int kBytes>
  static OTLOSS_INLINE void run(const LeafRow& t) {
#pragma omp simd
    for (int64_t j = 0; j < t.count; ++j) {
      double square = 0;
      for (int c = 0; c < kD; ++c) {
        const double delta = t.x[c] - t.y[c * t.stride + j];
        square += delta * delta;
      }
      t.z[j] = t.F + t.G[j] - t.k * square;
      t.P[j] = fast_exp2(t.z[j]);
    }
  }
};

double log2_of(double v) { return std::log2(std::max(v, kTiny)); }

// Sum of phi(s t P + u v, P) - (R log(R / P) - R), R = u v, over columns.
OTLOSS_SIMD double row_divergence(int64_t count, const double* z, const double* P, double s,
                                  double u, const double* t, const double* v,
                                  const double* log2_v) {
  const double log2_u = fast_log2(u > kTiny ? u : kTiny);
  double bits = 0, plain = 0;
#pragma omp simd reduction(+ : bits, plain)
  for (int64_t j = 0; j < count; ++j) {
    const double Q = s * t[j] * P[j], R = u * v[j], p = Q + R;
    bits += p * (fast_log2(p > kTiny ? p : kTiny) - z[j]) - R * (log2_u + log2_v[j] - z[j]);
    plain += P[j] - Q;
  }
  return kLn2 * bits + plain;
}

// The part of what there is that leaves no more than what is wanted.
double shrink(double wanted, double has) { return has > wanted ? wanted / has : 1; }

// sum over i of w_i, w_i v_i, w_i (x_i - c), w_i |x_i - c|^2
struct Moments {
  double mass = 0, value = 0, square = 0, first[kMultiscaleDims] = {};

  Moments(const Cloud& cloud, const double* w, const double* v, const double* centre) {
    for (int64_t i = 0; i < cloud.n; ++i) {
      double along = 0;
      for (int64_t c = 0; c < cloud.d; ++c) {
        const double delta = cloud.X[i * cloud.d + c] - centre[c];
        first[c] += w[i] * delta, along += delta * delta;
      }
      mass += w[i], value += w[i] * v[i], square += w[i] * along;
    }
  }
};

// (n,) factor times the potential, and log2 of the weight.
std::vector<double> with_weights(const Cloud& cloud, double factor, const double* potential) {
  std::vector<double> V(cloud.size);
  for (int64_t i = 0; i < cloud.n; ++i) V[i] = factor * potential[i] + std::log2(cloud.w[i]);
  return V;
}

// A row on all tiles that are kept of it.
struct ExactRow {
  int64_t part, L, columns;  // worker; points of a leaf; of y
  const Tile* tile;          // (count,)
  int64_t count;
  const double *z, *P;  // (count, L), as in LeafRow
  double missing;       // of the row's sum, at most, relative to 2^V

  // Calls entry(j, P_ij).
  template <typename F>
  OTLOSS_INLINE void for_each(F&& entry) const {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t j = tile[q].leaf * L, h = 0; h < std::min(L, columns - j); ++h)
        entry(j + h, P[q * L + h]);
  }
};

}  // namespace

// Calls row(i, ExactRow) for all rows: of V (n,) and g (m,) in base 2, with log2 of the weights.
template <typename F>
void Engine::for_each_exact_row(const Pass& pass, const double* V, const double* g, F&& row) {
  const int64_t d = X.d, L = X.L, m = Y.n;
  std::vector<double> points(Y.size * d);  // (leaves, d, L)
  for (int64_t j = 0; j < Y.size; ++j)
    for (int64_t c = 0; c < d; ++c) points[(j / L * d + c) * L + j % L] = Y.X[j * d + c];
  for_each_part([&](Worker& worker, int64_t begin, int64_t end) {
    std::vector<double> z, P;
    worker.pairs(pass, begin, end, [&](int64_t I, const Tile* tile, int64_t count) {
      z.resize(count * L), P.resize(count * L);
      const ExactRow made{&worker - workers_.data(), L, m, tile, count, z.data(), P.data(),
                          worker.missing()};
      for (int64_t i = I * L; i < std::min(X.n, (I + 1) * L) && !interrupted(); ++i) {
        for (int64_t q = 0; q < count; ++q) {
          const int64_t j = tile[q].leaf * L;
          const LeafRow task{std::min(L, m - j), L,     pass.k,    V[i],     &X.X[i * d],
                             &points[j * d],     &g[j], &z[q * L], &P[q * L]};
          run_in_dimension<MakeRow>(d, task);
        }
        row(i, made);
      }
    });
  });
}

double Engine::divergence(double eps, const double* F, const double* g, const double* A,
                          const double* B, double* rows, double* columns) {
  const int64_t d = X.d, L = X.L, n = X.n, m = Y.n;
  const std::vector<double> V_x = with_weights(X, 1, F), V_y = with_weights(Y, kLog2E / eps, g);
  std::vector<double> fixed(F, F + X.size), s(n), u(n), t(m), v(m), log2_v(m);
  const Pass pass = begin(eps, g, fixed.data(), nullptr);
  struct Part {
    std::vector<double> column, shrunk;
    double divergence = 0;
  };
  std::vector<Part> parts(workers_.size());
  for (Part& part : parts) part.column.assign(m, 0), part.shrunk.assign(m, 0);
  for_each_exact_row(pass, V_x.data(), V_y.data(), [&](int64_t i, const ExactRow& row) {
    Part& part = parts[row.part];
    rows[i] = 0;
    row.for_each([&](int64_t, double P) { rows[i] += P; });
    s[i] = shrink(A[i], rows[i]);
    row.for_each([&](int64_t j, double P) { part.column[j] += P, part.shrunk[j] += s[i] * P; });
  });
  finish(false);
  double missing = 0;
  for (int64_t j = 0; j < m; ++j) {
    double shrunk = columns[j] = 0;
    for (const Part& part : parts) columns[j] += part.column[j], shrunk += part.shrunk[j];
    t[j] = shrink(B[j], shrunk), v[j] = std::max(0.0, B[j] - shrunk), missing += v[j];
  }
  for (int64_t j = 0; j < m; ++j) v[j] /= std::max(missing, kTiny), log2_v[j] = log2_of(v[j]);
  for_each_exact_row(pass, V_x.data(), V_y.data(), [&](int64_t i, const ExactRow& row) {
    double held = 0;
    row.for_each([&](int64_t j, double P) { held += t[j] * P; });
    u[i] = std::max(0.0, A[i] - s[i] * held);
    for (int64_t q = 0; q < row.count; ++q) {
      const int64_t j = row.tile[q].leaf * L;
      parts[row.part].divergence += row_divergence(std::min(L, m - j), row.z + q * L, row.P + q * L,
                                                   s[i], u[i], &t[j], &v[j], &log2_v[j]);
    }
  });
  double sum = left_out() * y.mass;
  for (const Part& part : parts) sum += part.divergence;
  std::vector<double> along_x(n), along_y(m);
  for (int64_t i = 0; i < n; ++i) along_x[i] = log2_of(u[i]) - V_x[i];
  for (int64_t j = 0; j < m; ++j) along_y[j] = log2_v[j] - V_y[j];
  const double* centre = X.super.centre.data();
  const Moments x_side(X, u.data(), along_x.data(), centre);
  const Moments y_side(Y, v.data(), along_y.data(), centre);
  double square = x_side.square * y_side.mass + x_side.mass * y_side.square;
  for (int64_t c = 0; c < d; ++c) square -= 2 * x_side.first[c] * y_side.first[c];
  const double bits =
      x_side.value * y_side.mass + x_side.mass * y_side.value + pass.k * std::max(0.0, square);
  return sum + kLn2 * bits - x_side.mass * y_side.mass;
}

// What decides at the middle of each leaf is likely in the leaf of y of the largest bound there,
// and that one in the super of the largest: from its points alone.
void Engine::guess_rows(double k, double* F) const {
  const int64_t d = X.d, L = X.L;
  const auto bound = [&](const Nodes& nodes, const float* top, const float* slope, int64_t J,
                         const double* x) {
    double result = static_cast<double>(top[J]), along = 0;
    for (int64_t c = 0; c < d; ++c) {
      const int64_t at = c * nodes.stride + J;
      const double delta = x[c] - nodes.at[at];
      along += std::abs(static_cast<double>(slope[at]) + 2 * k * delta) *
               static_cast<double>(nodes.half[at]);
      result -= k * delta * delta;
    }
    return result + along;
  };
  const auto largest = [](int64_t begin, int64_t end, auto&& value) {
    int64_t best = begin;
    double most = -std::numeric_limits<double>::infinity();
    for (int64_t J = begin; J < end; ++J)
      if (const double next = value(J); next > most) most = next, best = J;
    return best;
  };
  const auto guess_some = [&](int64_t begin, int64_t end) {
    for (int64_t I = begin; I < end && !interrupted(); ++I) {
      const double* middle = &X.leaf.centre[I * d];
      const int64_t T = largest(0, Y.super.count, [&](int64_t S) {
        return bound(Y.super, py_.super_top.data(), py_.super_slope.data(), S, middle);
      });
      const int64_t last = std::min(Y.leaf.count, (T + 1) * kSuper);
      const int64_t J = largest(T * kSuper, last, [&](int64_t leaf) {
        return bound(Y.leaf, py_.top.data(), py_.slope.data(), leaf, middle);
      });
      for (int64_t i = I * L; i < std::min(X.n, (I + 1) * L); ++i) {
        double most = -std::numeric_limits<double>::infinity();
        for (int64_t j = J * L; j < std::min(Y.n, (J + 1) * L); ++j) {
          double value = G_[j] + static_cast<double>(Y.log_w[j]);
          for (int64_t c = 0; c < d; ++c) value -= k * std::pow(X.X[i * d + c] - Y.X[j * d + c], 2);
          most = std::max(most, value);
        }
        F[i] = -most;
      }
    }
  };
  constexpr int64_t kGrain = 64;
  if (precision_.split)
    parallel_for(0, X.leaf.count, kGrain, guess_some);
  else
    guess_some(0, X.leaf.count);
}

// A pass in single precision makes the guess a potential, of which one in double is good.
void Engine::extend(double eps, const double* g, double most, double* F) {
  const double k = kLog2E / eps;
  std::vector<double> sums(X.size);
  begin(eps, g, F, nullptr);
  guess_rows(k, F);
  update_rows(eps, g, F, sums.data());
  const std::vector<double> at(F, F + X.size), V_y = with_weights(Y, k, g);
  std::vector<std::vector<double>> parts(workers_.size());
  const Pass pass = begin(eps, g, F, nullptr);
  for_each_exact_row(pass, at.data(), V_y.data(), [&](int64_t i, const ExactRow& row) {
    double sum = 0;
    row.for_each([&](int64_t, double P) { sum += P; });
    F[i] = row.missing <= most * sum ? at[i] - std::log2(sum)
                                     : -log2_sum_of_all(X, i, Y, k, 1, G_.data(), parts[row.part]);
  });
}

}  // namespace otloss::cpu::multiscale

namespace otloss::cpu {
namespace {

// Values of the points in order go back to all points; others get 0.
void put_back(const std::vector<double>& values, const std::vector<int32_t>& in, int64_t count,
              double* out) {
  std::fill_n(out, count, 0.0);
  for (size_t i = 0; i < in.size(); ++i) out[in[i]] = values[i];
}

}  // namespace

void plan_gaps(const std::vector<PlanGapGroup>& groups, double eps) {
  constexpr double kMissing = 1e-7;  // of the mass: it widens the gap
  multiscale::for_each_problem(groups, [&](const PlanGapGroup& group, int64_t p, bool split) {
    const int64_t n = group.n, m = group.m;
    const multiscale::Fixed fixed(group.points, p, n, group.a, group.f, m, group.b, group.g, false,
                                  eps, split, group.penalties, kMissing);
    multiscale::Engine engine = fixed.engine(eps, false, split);
    std::vector<double> rows(fixed.x.size), columns(fixed.y.size);
    group.numbers[2 * p] = engine.divergence(
        eps, fixed.F.data(), fixed.g.data(),
        multiscale::in_order(group.A + p * n, fixed.in_x).data(),
        multiscale::in_order(group.B + p * m, fixed.in_y).data(), rows.data(), columns.data());
    group.numbers[2 * p + 1] = engine.left_out() * engine.y.mass;
    put_back(rows, fixed.in_x, n, group.rows + p * n);
    put_back(columns, fixed.in_y, m, group.columns + p * m);
  });
}

void extend(const std::vector<ExtendGroup>& groups, double eps) {
  constexpr double kMissing = 1e-7, kMost = 1e-6;  // of all sums, of one
  multiscale::for_each_problem(groups, [&](const ExtendGroup& group, int64_t p, bool split) {
    const int64_t n = group.n;
    const std::vector<double> none(group.batch * n);
    const multiscale::Fixed fixed(group.points, p, n, group.a, none.data(), group.m, group.b,
                                  group.g, false, eps, split, Penalties{}, kMissing);
    multiscale::Engine engine = fixed.engine(eps, false, split);
    std::vector<double> F = fixed.F;
    engine.extend(eps, fixed.g.data(), kMost, F.data());
    for (double& value : F) value *= eps / kLog2E;
    put_back(F, fixed.in_x, n, group.out + p * n);
  });
}

}  // namespace otloss::cpu
