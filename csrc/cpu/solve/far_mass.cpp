#include "cpu/solve/far_mass.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "core/math.h"
#include "cpu/grid/engine.h"
#include "cpu/multiscale/all_pairs.h"
#include "cpu/multiscale/engine.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/group_shifts.h"

namespace otloss::cpu {
namespace {

using Vector = std::vector<double>;

// x log(x / y), 0 for x = 0.
double x_log_ratio(double x, double y) { return x > 0 ? x * std::log(x / y) : 0.0; }

// log2 of the entries of a row in some columns, of which G is.
template <typename T>
OTLOSS_SIMD void entries_of_row(int64_t count, T F, T k, const T* G, const int32_t* column,
                                const T* C, T* entry) {
#pragma omp simd
  for (int64_t e = 0; e < count; ++e) entry[e] = F + G[e] - k * C[column[e]];
}

// log2 of the sum of 2^entry, at any size of the entries.
template <typename T>
OTLOSS_SIMD T log2_sum(int64_t count, const T* entry) {
  T largest = std::numeric_limits<T>::lowest(), sum = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t e = 0; e < count; ++e) largest = entry[e] > largest ? entry[e] : largest;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < count; ++e) sum += fast_exp2(entry[e] - largest);
  return largest + fast_log2(sum);
}

// What each row with mass sends of the plan (F, g) to the columns `excess` (m,), over its sum, and
// the mean of its costs in the weights v (m,).
template <typename T>
void read_rows(Engine<T>& engine, const PlanMarginals<T>& plan, double eps, const T* F, const T*,
               const std::vector<T>& excess, const std::vector<T>& v, Vector& sent, Vector& far) {
  const int64_t m = engine.y.count;
  CostBlocks<T>& costs = engine.costs();
  double s = 0;
  for (const T weight : v) s += static_cast<double>(weight);
  costs.for_each([&](int64_t, const T* C, int64_t first, int64_t rows) {
    std::vector<T> P(m);
    for (int64_t i = first; i < first + rows; ++i, C += costs.source().stride()) {
      if (!(plan.row[i] > 0)) continue;
      const T one = T(1);
      plan_rows(
          PlanRows<T>{1, m, factor<T>(eps), T(1), C, m, &one, F + i, plan.G.data(), P.data()});
      sent[i] = dot(m, P.data(), excess.data());
      for (int64_t j = 0; j < m; ++j)
        if (v[j] > T(0)) far[i] += static_cast<double>(C[j]) * static_cast<double>(v[j]) / s;
    }
  });
}

// The costs from moments of v.
void read_rows(multiscale::Engine& engine, const PlanMarginals<double>&, double eps,
               const double* F, const double* g, const Vector& excess, const Vector& v,
               Vector& sent, Vector& far) {
  const multiscale::Cloud &X = engine.X, &Y = engine.Y;
  const int64_t d = X.d, n = engine.x.count, m = engine.y.count;
  Vector mean(d);
  engine.apply(eps, F, g, 1, excess.data(), sent.data());
  double s = 0, square = 0;
  for (int64_t j = 0; j < m; ++j) {
    s += v[j];
    for (int64_t c = 0; c < d; ++c) mean[c] += v[j] * Y.X[j * d + c];
  }
  for (double& value : mean) value /= s;
  for (int64_t j = 0; j < m; ++j)
    for (int64_t c = 0; c < d && v[j] > 0; ++c)
      square += v[j] / s * std::pow(Y.X[j * d + c] - mean[c], 2);
  for (int64_t i = 0; i < n; ++i) {
    far[i] = square;
    for (int64_t c = 0; c < d; ++c) far[i] += std::pow(X.X[i * d + c] - mean[c], 2);
  }
}

void read_rows(grid::Engine& engine, const PlanMarginals<double>&, double eps, const double*,
               const double* g, const Vector& excess, const Vector& v, Vector& sent, Vector& far) {
  sent = engine.row_means(eps, g, excess), far = engine.mean_costs(v);
}

// Sets of columns that are joined.
class Sets {
 public:
  explicit Sets(int64_t count) : parent_(count) { std::iota(parent_.begin(), parent_.end(), 0); }

  int32_t root(int32_t j) {
    while (parent_[j] != j) j = parent_[j] = parent_[parent_[j]];
    return j;
  }
  void join(int32_t i, int32_t j) { parent_[root(i)] = root(j); }
  void join(Sets& other) {
    for (int32_t j = 0; j < static_cast<int32_t>(parent_.size()); ++j) join(j, other.root(j));
  }

 private:
  std::vector<int32_t> parent_;
};

}  // namespace

template <typename T, typename E>
double FarMass<T, E>::size(double eps, const T* F, const SemidualPoint<T>& point) const {
  if (x_.hard() && y_.hard())
    return std::max(std::abs(point.value), point.value - y_.mass * engine_.cost_range().least);
  const double unit = x_.damping(eps) * eps / kLog2E;
  return std::abs(soft_value(x_, y_, x_.mass, y_.mass, eps, x_.soft_mean(F, unit).mean,
                             y_.soft_mean(point.g.data(), 1).mean));
}

// What the plan lacks and has too much could go as far as any pair of points is apart, but for what
// rounding of the column sums makes of nothing.
template <typename T, typename E>
double FarMass<T, E>::cheap_bound(const SemidualPoint<T>& point) const {
  const double range = engine_.cost_range().most - engine_.cost_range().least;
  double lacking = 0, along = 0;
  for (int64_t j = 0; j < y_.count; ++j) {
    const double d = static_cast<double>(point.target[j]) * (1 - static_cast<double>(point.q[j]));
    lacking += std::max(d, 0.0), along += d * static_cast<double>(point.g[j]);
  }
  constexpr double kUnseen = 4 * static_cast<double>(std::numeric_limits<T>::epsilon());
  lacking = std::max(0.0, lacking - kUnseen * y_.mass);
  return mass(point) * std::min(lacking * range - along, own_gap(point));
}

// Where the columns need not have a given sum the plan is feasible as it is.
template <typename T, typename E>
double FarMass<T, E>::own_gap(const SemidualPoint<T>& point) const {
  if (y_.hard()) return std::numeric_limits<double>::infinity();
  double sum = 0;
  for (int64_t j = 0; j < y_.count; ++j) {
    const double d = static_cast<double>(point.q[j]) - 1;
    sum += static_cast<double>(point.target[j]) * ((1 + d) * std::log1p(d) - d);
  }
  return sum / y_.rate;
}

// The feasible plan is P with columns that have too much scaled down, and a plan of rank 1,
// u v^T / s, for what rows and columns lack then. Its divergence from P is bounded by that of the
// two parts (KL is jointly convex), which takes no logarithm of an entry.
template <typename T, typename E>
double FarMass<T, E>::gap(double eps, const T* F, const SemidualPoint<T>& point) {
  const int64_t n = x_.count, m = y_.count;
  plan_ = PlanMarginals<T>(n, m);
  plan_.set(eps, x_, y_, F, point);
  const double kappa = mass(point), to_cost = x_.damping(eps) * eps / kLog2E;
  std::vector<T> excess(m), v(m);
  double s = 0, total = 0, kept = 0, sum = 0;
  for (int64_t j = 0; j < m; ++j) {
    const double w = static_cast<double>(point.target[j]), c = w * static_cast<double>(point.q[j]);
    if (!(w > 0)) continue;
    total += c;
    kept += x_log_ratio(std::min(w, c), c);
    if (c > w) excess[j] = static_cast<T>(1 - w / c);
    if (!(w > c)) continue;
    v[j] = static_cast<T>(w - c), s += w - c;
    sum += eps * x_log_ratio(w - c, static_cast<double>(y_.weight[j])) -
           (w - c) * static_cast<double>(point.g[j]);
  }
  if (!(s > 0)) return 0;
  kept -= x_log_ratio(total - s, total);
  sum += eps * (kept - x_log_ratio(s, total) - s * std::log(s) + s * std::log(kappa));
  Vector sent(n), far(n);
  read_rows(engine_, plan_, eps, F, point.g.data(), excess, v, sent, far);
  for (int64_t i = 0; i < n; ++i) {
    if (!(plan_.row[i] > 0)) continue;
    const double u = plan_.row[i] * sent[i];
    sum += u * (far[i] - to_cost * static_cast<double>(F[i])) +
           eps * x_log_ratio(u, static_cast<double>(x_.weight[i]));
  }
  return kappa * std::min(sum, own_gap(point));
}

// No entry of the plan is looked at, so there are no groups.
template <>
FarMass<double, grid::Engine>::Shift FarMass<double, grid::Engine>::shift(
    double, const double*, const SemidualPoint<double>&, int64_t) {
  return {};
}

// By readings of all pairs, which the solver only asks for where passes took as long.
template <>
FarMass<double, multiscale::Engine>::Shift FarMass<double, multiscale::Engine>::shift(
    double eps, const double* F, const SemidualPoint<double>& point, int64_t most_readings) {
  const Penalties penalties = {1 / x_.rate, 1 / y_.rate, x_.hard() && y_.hard()};
  const multiscale::AllPairs pairs(engine_.X, engine_.Y, x_.count, y_.count, penalties);
  Engine<double> engine(pairs.x, pairs.y, pairs.group, 0, eps, false);
  auto found = FarMass<double, Engine<double>>(engine).shift(eps, F, point, most_readings);
  return {std::move(found.g), found.largest, found.gain, found.readings};
}

template <typename T, typename E>
typename FarMass<T, E>::Shift FarMass<T, E>::shift(double eps, const T* F,
                                                   const SemidualPoint<T>& point,
                                                   int64_t most_readings) {
  constexpr int64_t kGroups = 64;
  constexpr double kLeast = -10, kFewer = 2;  // log2 of the entries that join; times, where too few
  const int64_t m = y_.count;
  Shift result;
  plan_ = PlanMarginals<T>(x_.count, y_.count);
  plan_.set(eps, x_, y_, F, point);
  int64_t k = kGroups + 1;
  for (double least = kLeast; k > kGroups; least *= kFewer) {
    if (result.readings + 2 > most_readings) return result;
    ++result.readings;
    k = find_groups(eps, F, least);
  }
  if (k < 2) return result;
  RowsAndGroups groups{k, {}, plan_.row, Vector(k), 0, x_, y_, eps};
  Vector lacking(k);
  for (int64_t j = 0; j < m; ++j) {
    if (group_[j] < 0) continue;
    groups.B[group_[j]] += static_cast<double>(point.target[j]);
    lacking[group_[j]] += static_cast<double>(point.target[j]) - plan_.column[j];
  }
  for (const double mass : lacking) groups.lacking += std::max(mass, 0.0);
  ++result.readings;
  groups.M = between_groups(eps, F, k);
  const Vector t = best_shifts(groups);
  for (int64_t K = 0; K < k; ++K) {
    if (!std::isfinite(t[K])) return result;
    result.largest = std::max(result.largest, std::abs(t[K]));
    result.gain += lacking[K] * t[K];
  }
  result.gain *= mass(point);
  result.g.resize(m);
  for (int64_t j = 0; j < m; ++j) result.g[j] = group_[j] < 0 ? T(0) : static_cast<T>(t[group_[j]]);
  return result;
}

// Groups are the connected components of the entries of more than 2^least of their row's or
// column's sum. Returns how many there are.
template <typename T, typename E>
int64_t FarMass<T, E>::find_groups(double eps, const T* F, double least) {
  const int64_t m = y_.count;
  CostBlocks<T>& costs = engine_.costs();
  std::vector<Sets> parts(costs.parts().count(), Sets(m));
  costs.for_each([&](int64_t part, const T* C, int64_t first, int64_t rows) {
    std::vector<uint8_t> marks(m + kEntriesAtOnce);
    std::vector<int32_t> column(m + kEntriesAtOnce);
    std::vector<T> cost(m + kEntriesAtOnce);
    for (int64_t i = first; i < first + rows; ++i, C += costs.source().stride()) {
      const int64_t listed =
          list_large(plan_.large(eps, F, least, C, i), marks.data(), column.data(), cost.data());
      for (int64_t e = 1; e < listed; ++e) parts[part].join(column[e], column[0]);
    }
  });
  for (size_t part = 1; part < parts.size(); ++part) parts[0].join(parts[part]);
  std::vector<int32_t> number(m, -1);  // of a root
  int32_t k = 0;
  group_.assign(m, -1);
  for (int32_t j = 0; j < m; ++j) {
    if (!(plan_.column[j] > 0)) continue;
    int32_t& of_root = number[parts[0].root(j)];
    if (of_root < 0) of_root = k++;
    group_[j] = of_root;
  }
  return k;
}

// M (n, k) of RowsAndGroups.
template <typename T, typename E>
std::vector<double> FarMass<T, E>::between_groups(double eps, const T* F, int64_t k) {
  // The columns with mass in the order of their groups, and where each group ends.
  std::vector<int64_t> end(k + 1);
  for (const int32_t K : group_)
    if (K >= 0) ++end[K + 1];
  for (int64_t K = 0; K < k; ++K) end[K + 1] += end[K];
  const int64_t count = end[k];
  std::vector<int32_t> column(count);
  std::vector<T> G(count);
  for (int32_t j = 0; j < y_.count; ++j)
    if (group_[j] >= 0) {
      const int64_t e = end[group_[j]]++;
      column[e] = j, G[e] = plan_.G[j];
    }
  CostBlocks<T>& costs = engine_.costs();
  Vector M(x_.count * k);
  costs.for_each([&](int64_t, const T* C, int64_t first, int64_t rows) {
    std::vector<T> entry(count), sent(k);
    for (int64_t i = first; i < first + rows; ++i, C += costs.source().stride()) {
      if (!(plan_.row[i] > 0)) continue;
      entries_of_row(count, F[i], factor<T>(eps), G.data(), column.data(), C, entry.data());
      for (int64_t K = 0, begin = 0; K < k; begin = end[K++])
        sent[K] = log2_sum(end[K] - begin, entry.data() + begin);
      for (int64_t K = 0; K < k; ++K) M[i * k + K] = -eps / kLog2E * static_cast<double>(sent[K]);
    }
  });
  return M;
}

template class FarMass<float, Engine<float>>;
template class FarMass<double, Engine<double>>;
#define OTLOSS_INSTANTIATE(E)                                                                   \
  template double FarMass<double, E>::size(double, const double*, const SemidualPoint<double>&) \
      const;                                                                                    \
  template double FarMass<double, E>::cheap_bound(const SemidualPoint<double>&) const;          \
  template double FarMass<double, E>::gap(double, const double*, const SemidualPoint<double>&);
OTLOSS_INSTANTIATE(multiscale::Engine)
OTLOSS_INSTANTIATE(grid::Engine)

}  // namespace otloss::cpu
