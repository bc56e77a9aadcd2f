// Passes over the cost of one problem: sums of rows and columns of the plan, in blocks of rows.
#include "cpu/engines/engine.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/math.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/gaussian.h"

namespace otloss::cpu {

template <typename T>
Engine<T>::Engine(const Side<T>& x, const Side<T>& y, const SolveGroup<T>& group, int64_t problem,
                  double eps, bool split)
    : x(x), y(y), group_(group), problem_(problem), eps_(eps), split_(split) {}

template <typename T>
void Engine<T>::update_rows(double eps, const T* g, T* F, T* s) {
  const bool unit = begin_sweep(eps, g);
  costs_.parts().for_each([&](int64_t part, int64_t begin, int64_t end) {
    sweep(unit, eps, part, begin, end, F, s, nullptr);
  });
}

template <typename T>
void Engine<T>::iterate(double eps, const T* g, T* F, T* gt, T* q) {
  const bool unit = begin_sweep(eps, g);
  totals_.clear();
  costs_.parts().for_each([&](int64_t part, int64_t begin, int64_t end) {
    Workspace& w = workspaces_[part];
    for (int64_t i = begin; i < end; i += kFlushRows) {
      std::fill(w.c.begin(), w.c.end(), T(0));
      sweep(unit, eps, part, i, std::min(end, i + kFlushRows), F, s_.data(), w.c.data());
      add_sums(m_, w.c.data(), totals_.part(part));
    }
  });
  if (unit)
    update_unit_columns(eps, g, totals_.total(), gt, q);
  else
    update_columns(eps, g, F, totals_.total(), gt, q);
}

template <typename T>
double Engine<T>::transport(double eps, const T* F, const T* g) {
  absorb_weights(m_, factor<T>(eps), g, y.weight, G_.data());
  std::vector<double> sums(workspaces_.size());
  costs_.for_each([&](int64_t part, const T* C, int64_t i, int64_t count) {
    sums[part] +=
        transport_rows(PlanRows<T>{count, m_, factor<T>(eps), T(1), C, costs_.source().stride(),
                                   x.weight + i, F + i, G_.data(), nullptr});
  });
  double sum = 0;
  for (const double part : sums) sum += part;
  return sum;
}

// On at most 256 x 256 points.
template <typename T>
double Engine<T>::sigma() {
  constexpr int64_t kSample = 256;
  const std::vector<int64_t> rows = x.sample(kSample), columns = y.sample(kSample);
  if (rows.size() < 2 || columns.size() < 2) return 0;
  const size_t r = rows.size(), c = columns.size();
  std::vector<double> C(r * c), row(r), column(c);
  double mean = 0, sum = 0;
  for (size_t i = 0; i < r; ++i) {
    const T* costs = costs_.row(rows[i]);
    double* entries = C.data() + i * c;
    for (size_t j = 0; j < c; ++j) entries[j] = static_cast<double>(costs[columns[j]]);
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (size_t j = 0; j < c; ++j) column[j] += entries[j], total += entries[j];
    row[i] = total / c, mean += row[i] / r;
  }
  for (double& of_column : column) of_column = of_column / r - mean;
  for (size_t i = 0; i < r; ++i) {
    const double *entries = C.data() + i * c, of_row = row[i];
#pragma omp simd reduction(+ : sum)
    for (size_t j = 0; j < c; ++j) {
      const double value = entries[j] - of_row - column[j];
      sum += value * value;
    }
  }
  return std::sqrt(sum / (r * c));
}

// Between the Gaussians fitted to the clouds, where the points are known and there is a formula.
template <typename T>
bool Engine<T>::propose(double sweeps, double eps, T* g) const {
  const PointPair<T>& points = group_.points;
  const int64_t d = points.d;
  if (!points.zx || !traits_of(points.kind).gaussian || group_.dummies > 0) return false;
  return gaussian_start(
      sweeps, GaussianStart<T>{n_, m_, d, points.zx + problem_ * n_ * d,
                               points.zy + problem_ * m_ * d, x.weight, y.weight, eps, g});
}

template <typename T>
void Engine<T>::sweep(bool unit, double eps, int64_t part, int64_t begin, int64_t end, T* F, T* s,
                      T* c) {
  T* e = workspaces_[part].e.data();
  const T k = factor<T>(eps), tilt = x.tilt(eps);
  costs_.for_each_block(part, begin, end, [&](const T* C, int64_t i, int64_t count) {
    const int64_t stride = costs_.source().stride();
    if (unit)
      return unit_sweep_rows(UnitSweep<T>{count, m_, k, static_cast<double>(tilt), C, stride,
                                          x.weight + i, y.weight, G_.data(), F + i, s + i, c, e});
    // The last row that may be read to its padded width ends within the memory.
    const int64_t beyond = costs_.source().available(i) - padded<T>(m_);
    const int64_t readable = beyond < 0 ? 0 : std::min(count, beyond / stride + 1);
    sweep_rows(RowSweep<T>{count, m_, k, C, stride, x.weight + i, G_.data(), F + i, s + i, c, e,
                           readable, tilt});
  });
}

template <typename T>
bool Engine<T>::begin_sweep(double eps, const T* g) {
  bool unit = x.mass == 1 && y.mass == 1 && eps > max_cost();
  for (int64_t j = 0; unit && j < m_; ++j) unit = std::abs(static_cast<double>(g[j])) < eps;
  const T k = factor<T>(eps);
  if (unit)
    for (int64_t j = 0; j < m_; ++j) G_[j] = k * g[j];
  else
    absorb_weights(m_, k, g, y.weight, G_.data());
  return unit;
}

// gt_j = g_j - eps log(1 + c_j), the column sums over b less 1.
template <typename T>
void Engine<T>::update_unit_columns(double eps, const T* g, const double* c, T* gt, T* q) const {
  for (int64_t j = 0; j < m_; ++j) {
    const double over = y.weight[j] > T(0) ? c[j] : 0.0, from = static_cast<double>(g[j]);
    q[j] = static_cast<T>(1 + over);
    gt[j] = y.weight[j] > T(0) ? static_cast<T>(from - eps * std::log1p(over)) : T(0);
  }
}

// gt_j = g_j - eps log q_j with q_j = c_j / b_j, in whole blocks, then again with the maximum
// subtracted where a block holds a sum that cannot be trusted.
template <typename T>
void Engine<T>::update_columns(double eps, const T* g, const T* F, const double* c, T* gt, T* q) {
  const T to_cost = static_cast<T>(eps / kLog2E);
  const T* b = y.weight;
  const double least = least_column_sum(x.tilt(eps), F);
  for (int64_t begin = 0; begin < m_; begin += kColumnBlock) {
    const int64_t end = std::min(m_, begin + kColumnBlock);
    if (column_ratios(end - begin, c + begin, b + begin, least, q + begin)) {
      std::fill(gt + begin, gt + end, T(0));
      subtract_log2(end - begin, q + begin, gt + begin);
      for (int64_t j = begin; j < end; ++j) gt[j] = b[j] > T(0) ? g[j] + to_cost * gt[j] : T(0);
    } else {
      guarded_columns(eps, begin, end, g, F, gt, q);
    }
  }
}

// Column sums that are smaller may owe a digit to exponentials clamped at 2^-kExp2Limit: row i
// adds a_i / s_i of them, times its tilt. None is large enough if that was clamped.
template <typename T>
double Engine<T>::least_column_sum(T tilt, const T* F) const {
  double clamped = 0;
  for (int64_t i = 0; i < n_; ++i) {
    if (!(x.weight[i] > T(0))) continue;
    double added = static_cast<double>(x.weight[i] / (trusted(s_[i]) ? s_[i] : T(1)));
    if (tilt != T(0)) added *= static_cast<double>(fast_exp2(tilt * F[i]));
    if (tilt * F[i] > static_cast<T>(kExp2Limit)) return std::numeric_limits<double>::infinity();
    clamped += added;
  }
  return clamped * std::exp2(-kExp2Limit) / static_cast<double>(std::numeric_limits<T>::epsilon());
}

template <typename T>
void Engine<T>::guarded_columns(double eps, int64_t begin, int64_t end, const T* g, const T* F,
                                T* gt, T* q) {
  const T k = factor<T>(eps), to_cost = static_cast<T>(eps / kLog2E);
  const T damping = static_cast<T>(x.damping(eps));
  std::vector<T> A(n_);
  for (int64_t i = 0; i < n_; ++i)
    A[i] = x.weight[i] > T(0) ? damping * F[i] + fast_log2(x.weight[i]) : static_cast<T>(kLog2Zero);
  T softmin[kColumnBlock];
  int64_t stride = 0;
  const T* C = costs_.source().columns(begin, end, columns_, stride);
  column_softmin(ColumnSoftmin<T>{n_, end - begin, stride, k, C, A.data(), softmin});
  for (int64_t j = begin; j < end; ++j) {
    gt[j] = y.weight[j] > T(0) ? to_cost * softmin[j - begin] : T(0);
    q[j] = fast_exp2(k * (g[j] - gt[j]));
  }
}

template class Engine<float>;
template class Engine<double>;

}  // namespace otloss::cpu
