// Solves and envelope gradients on stored cost matrices.
//
// Problems run in parallel first, each on one thread from start to end. When there are fewer
// problems than threads, each large problem splits its rows instead, with private column sums.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "math.h"
#include "parallel.h"
#include "solver.h"
#include "sweep.h"

namespace otloss::cpu {
namespace {

// Rows given to one thread of a split problem hold at least so many entries: 50 us of work, some
// ten times what starting a parallel region costs.
constexpr int64_t kSplitGrain = 1 << 18;

// Each scratch row starts on its own cache line.
template <typename T>
int64_t padded(int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (count + kLine - 1) / kLine * kLine;
}

template <typename T>
class DenseEngine {
 public:
  const int64_t n, m;
  const T* const a;
  const T* const b;

  DenseEngine(int64_t n, int64_t m, const T* C, const T* a, const T* b, bool split)
      : n(n), m(m), a(a), b(b), C_(C), parts_(1), G_(m) {
    if (split) parts_ = std::clamp<int64_t>(n * m / kSplitGrain, 1, std::min(thread_count(), n));
    c_stride_ = padded<T>(m);
    c_.resize(parts_ * c_stride_);
    e_.resize(parts_ * kSweepScratchRows * m);
  }

  void update_rows(double eps, const T* g, T* F, T* s) {
    absorb(eps, g);
    for_each_part([&](int64_t part, int64_t begin, int64_t end) {
      sweep_rows(sweep(eps, part, begin, end, F, s, nullptr));
    });
  }

  void iterate(double eps, const T* g, T* F, T* gt, T* q) {
    absorb(eps, g);
    s_.resize(n);
    for_each_part([&](int64_t part, int64_t begin, int64_t end) {
      T* c = c_.data() + part * c_stride_;
      std::fill(c, c + m, T(0));
      sweep_rows(sweep(eps, part, begin, end, F, s_.data(), c));
    });
    T* c = c_.data();
    for (int64_t part = 1; part < parts_; ++part)
      for (int64_t j = 0; j < m; ++j) c[j] += c[part * c_stride_ + j];
    update_columns(eps, g, F, c, gt, q);
  }

  double transport(double eps, const T* F, const T* g) {
    absorb(eps, g);
    std::vector<double> sums(parts_);
    for_each_part([&](int64_t part, int64_t begin, int64_t end) {
      sums[part] = transport_rows({end - begin, m, factor(eps), T(1), C_ + begin * m, a + begin,
                                   F + begin, G_.data(), nullptr});
    });
    return total(parts_, sums.data());
  }

  // max |C_ij| over points of positive weight, NaN if one is not finite.
  double max_cost() {
    std::vector<double> largest(parts_);
    for_each_part([&](int64_t part, int64_t begin, int64_t end) {
      largest[part] = max_abs(MaxAbs<T>{end - begin, m, C_ + begin * m, a + begin, b});
    });
    double max = 0;
    for (const double value : largest) max = max >= value ? max : value;  // NaN is kept
    return max;
  }

  // Standard deviation of C_ij - mean_i - mean_j + mean on at most 256 x 256 points: against eps,
  // how hard the problem is.
  double sigma() const {
    const std::vector<int64_t> rows = sample(n, a), columns = sample(m, b);
    if (rows.size() < 2 || columns.size() < 2) return 0;
    const size_t r = rows.size(), c = columns.size();
    std::vector<double> row(r), column(c);
    double mean = 0, sum = 0;
    for (size_t i = 0; i < r; ++i)
      for (size_t j = 0; j < c; ++j) {
        const double value = C_[rows[i] * m + columns[j]];
        row[i] += value / c, column[j] += value / r, mean += value / (r * c);
      }
    for (size_t i = 0; i < r; ++i)
      for (size_t j = 0; j < c; ++j) {
        const double value = C_[rows[i] * m + columns[j]] - row[i] - column[j] + mean;
        sum += value * value;
      }
    return std::sqrt(sum / (r * c));
  }

 private:
  static T factor(double eps) { return static_cast<T>(kLog2E / eps); }

  template <typename F>
  void for_each_part(F&& function) {
    if (parts_ == 1) return function(int64_t{0}, int64_t{0}, n);
    const int64_t rows = (n + parts_ - 1) / parts_;
    parallel_tasks(parts_, [&](int64_t part) {
      const int64_t begin = std::min(n, part * rows);
      function(part, begin, std::min(n, begin + rows));
    });
  }

  RowSweep<T> sweep(double eps, int64_t part, int64_t begin, int64_t end, T* F, T* s, T* c) {
    return {end - begin, m,
            factor(eps), C_ + begin * m,
            a + begin,   G_.data(),
            F + begin,   s + begin,
            c,           e_.data() + part * kSweepScratchRows * m};
  }

  void absorb(double eps, const T* g) { absorb_weights(m, factor(eps), g, b, G_.data()); }

  // gt_j = g_j - eps log q_j with q_j = c_j / b_j, in whole blocks, then again with the maximum
  // subtracted where a block holds a sum that cannot be trusted.
  void update_columns(double eps, const T* g, const T* F, const T* c, T* gt, T* q) {
    const T to_cost = static_cast<T>(eps / kLog2E);
    const T least = least_column_sum();
    for (int64_t begin = 0; begin < m; begin += kColumnBlock) {
      const int64_t end = std::min(m, begin + kColumnBlock);
      bool good = true;
      for (int64_t j = begin; j < end; ++j) {
        q[j] = b[j] > T(0) ? c[j] / b[j] : T(1);
        good &= trusted(q[j]) && (b[j] == T(0) || c[j] > least);
        gt[j] = 0;
      }
      if (good) {
        subtract_log2(end - begin, q + begin, gt + begin);
        for (int64_t j = begin; j < end; ++j) gt[j] = b[j] > T(0) ? g[j] + to_cost * gt[j] : T(0);
      } else {
        guarded_columns(eps, begin, end, g, F, gt, q);
      }
    }
  }

  // Column sums that are smaller may owe a digit to exponentials clamped at 2^-kExp2Limit: row i
  // adds a_i / s_i of them.
  T least_column_sum() const {
    double clamped = 0;
    for (int64_t i = 0; i < n; ++i)
      if (a[i] > T(0)) clamped += a[i] / (trusted(s_[i]) ? s_[i] : T(1));
    clamped *= std::exp2(-kExp2Limit);
    return static_cast<T>(clamped / std::numeric_limits<T>::epsilon());
  }

  void guarded_columns(double eps, int64_t begin, int64_t end, const T* g, const T* F, T* gt,
                       T* q) {
    const T k = factor(eps), to_cost = static_cast<T>(eps / kLog2E);
    std::vector<T> A(n);
    for (int64_t i = 0; i < n; ++i)
      A[i] = a[i] > T(0) ? F[i] + fast_log2(a[i]) : static_cast<T>(kLog2Zero);
    T lse[kColumnBlock];
    column_lse(ColumnLse<T>{n, m, begin, end, k, C_, A.data(), lse});
    for (int64_t j = begin; j < end; ++j) {
      gt[j] = b[j] > T(0) ? -to_cost * lse[j - begin] : T(0);
      q[j] = fast_exp2(k * (g[j] - gt[j]));
    }
  }

  static std::vector<int64_t> sample(int64_t count, const T* weight) {
    constexpr int64_t kSample = 256;
    std::vector<int64_t> chosen;
    const int64_t wanted = std::min(count, kSample);
    for (int64_t i = 0; i < wanted; ++i) {
      const int64_t index = i * count / wanted;
      if (weight[index] > T(0)) chosen.push_back(index);
    }
    return chosen;
  }

  const T* C_;
  int64_t parts_;
  int64_t c_stride_;
  std::vector<T> G_;  // (m,)
  std::vector<T> c_;  // (parts, c_stride)
  std::vector<T> e_;  // (parts, kSweepScratchRows, m)
  std::vector<T> s_;  // (n,)
};

template <typename T>
void solve_problem(const SolveGroup<T>& group, int64_t p, const SolveOptions& options, bool split) {
  const int64_t n = group.n, m = group.m;
  T *f = group.f + p * n, *g = group.g + p * m;
  DenseEngine<T> engine(n, m, group.C + p * n * m, group.a + p * n, group.b + p * m, split);
  const double max_cost = engine.max_cost();
  double* status = group.status + p * kStatusFields;
  status[kStatusMaxCost] = max_cost;

  Outcome outcome;
  if (!std::isfinite(max_cost)) {
    std::fill(f, f + n, std::numeric_limits<T>::quiet_NaN());
    std::fill(g, g + m, std::numeric_limits<T>::quiet_NaN());
    group.value[p] = std::numeric_limits<T>::quiet_NaN();
  } else {
    const T to_base2 = static_cast<T>(kLog2E / options.eps);
    std::vector<T> F(n);
    if (options.warm_start)
      for (int64_t i = 0; i < n; ++i) F[i] = to_base2 * f[i];
    else
      std::fill(g, g + m, T(0));
    const bool one_potential = group.symmetric && options.n_iters < 0;
    if (options.n_iters >= 0) {
      T* trace = group.trace ? group.trace + p * options.n_iters * (n + m) : nullptr;
      outcome = solve_fixed(engine, options, F.data(), g, trace);
    } else if (one_potential) {
      outcome = solve_symmetric(engine, options, F.data());
    } else {
      outcome = solve_pair(engine, options, F.data(), g);
    }
    const T to_cost = static_cast<T>(options.eps / kLog2E);
    for (int64_t i = 0; i < n; ++i) f[i] = to_cost * F[i];
    if (one_potential) std::copy(f, f + n, g);
    group.value[p] = static_cast<T>(options.objective == Objective::kTransport
                                        ? engine.transport(options.eps, F.data(), g)
                                        : dot(n, engine.a, f) + dot(m, engine.b, g));
  }
  status[kStatusIterations] = static_cast<double>(outcome.iterations);
  status[kStatusError] = outcome.error;
  status[kStatusConverged] = outcome.converged ? 1.0 : 0.0;
}

// Calls function(group, problem, split) for all problems of all groups.
template <typename Group, typename F>
void for_each_problem(const std::vector<Group>& groups, F&& function) {
  struct Item {
    const Group* group;
    int64_t problem;
  };
  std::vector<Item> items;
  for (const Group& group : groups)
    for (int64_t p = 0; p < group.batch; ++p) items.push_back({&group, p});
  const int64_t count = static_cast<int64_t>(items.size());
  if (count >= thread_count()) {
    parallel_tasks(count, [&](int64_t i) { function(*items[i].group, items[i].problem, false); });
  } else {
    for (const Item& item : items) function(*item.group, item.problem, true);
  }
}

template <typename T>
void backward_problem(const EnvelopeGroup<T>& group, int64_t p, double eps, Objective objective,
                      bool split) {
  const int64_t n = group.n, m = group.m;
  const T k = static_cast<T>(kLog2E / eps), scale = group.coefficient * group.grad[p];
  const T *a = group.a + p * n, *b = group.b + p * m;
  const T *f = group.f + p * n, *g = group.g + p * m;
  if (group.grad_C) {
    std::vector<T> F(n), G(m);
    for (int64_t i = 0; i < n; ++i) F[i] = k * f[i];
    absorb_weights(m, k, g, b, G.data());
    const auto rows = [&](int64_t begin, int64_t end) {
      const int64_t offset = (p * n + begin) * m;
      plan_rows(PlanRows<T>{end - begin, m, k, scale, group.C + offset, a + begin, F.data() + begin,
                            G.data(), group.grad_C + offset});
    };
    if (split)
      parallel_for(0, n, std::max<int64_t>(1, kSplitGrain / m), rows);
    else
      rows(0, n);
  }
  // dOT/da = f up to a constant; the one with <a, f> = <b, g>. The transport objective's plan is
  // held constant, so its weights receive nothing.
  const T on = objective == Objective::kRegularized ? scale : T(0);
  const T shift = static_cast<T>((dot(m, b, g) - dot(n, a, f)) / (2 * total(n, a)));
  if (group.grad_a)
    for (int64_t i = 0; i < n; ++i)
      group.grad_a[p * n + i] = a[i] > T(0) ? on * (f[i] + shift) : T(0);
  if (group.grad_b)
    for (int64_t j = 0; j < m; ++j)
      group.grad_b[p * m + j] = b[j] > T(0) ? on * (g[j] - shift) : T(0);
}

}  // namespace

template <typename T>
void solve(const std::vector<SolveGroup<T>>& groups, const SolveOptions& options) {
  for_each_problem(groups, [&](const SolveGroup<T>& group, int64_t p, bool split) {
    solve_problem(group, p, options, split);
  });
}

template <typename T>
void envelope_backward(const std::vector<EnvelopeGroup<T>>& groups, double eps,
                       Objective objective) {
  for_each_problem(groups, [&](const EnvelopeGroup<T>& group, int64_t p, bool split) {
    backward_problem(group, p, eps, objective, split);
  });
}

template void solve(const std::vector<SolveGroup<float>>&, const SolveOptions&);
template void solve(const std::vector<SolveGroup<double>>&, const SolveOptions&);
template void envelope_backward(const std::vector<EnvelopeGroup<float>>&, double, Objective);
template void envelope_backward(const std::vector<EnvelopeGroup<double>>&, double, Objective);

}  // namespace otloss::cpu
