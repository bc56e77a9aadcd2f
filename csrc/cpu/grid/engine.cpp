#include "cpu/grid/engine.h"

#include <algorithm>
#include <cmath>

#include "core/math.h"
#include "cpu/parallel.h"
#include "cpu/solve/gaussian.h"

namespace otloss::cpu::grid {
namespace {

CostRange range_of(const GridAxes& axes) {
  CostRange range{0, 0};
  for (size_t k = 0; k < axes.shape.size(); ++k) {
    const double* C = axes.cost[k];
    const auto [least, most] = std::minmax_element(C, C + axes.shape[k] * axes.shape[k]);
    range.least += *least, range.most += *most;
  }
  return {std::min(range.least, 0.0), std::max(range.most, 0.0)};
}

// 2^(v - k C) is summed with the weights w of the points v belongs to.
void with_weights(const Side<double>& side, double scale, const double* f, double* v) {
  for (int64_t i = 0; i < side.count; ++i)
    v[i] = side.weight[i] > 0 ? scale * f[i] + fast_log2(side.weight[i]) : kLog2Zero;
}

}  // namespace

Engine::Engine(const Side<double>& x, const Side<double>& y, const GridAxes& axes, bool split)
    : x(x), y(y), axes_(axes), split_(split), cost_range_(range_of(axes)), v_(x.count) {}

void Engine::set_eps(double eps) {
  if (eps == eps_) return;
  eps_ = eps;
  rows_.emplace(axes_, false, eps);
  columns_.emplace(axes_, true, eps);
}

void Engine::iterate(double eps, const double* g, double* F, double* gt, double* q) {
  const int64_t n = x.count;
  set_eps(eps);
  with_weights(y, factor<double>(eps), g, v_.data());
  rows_->reduce(v_.data(), 0, nullptr, split_);
  for (int64_t i = 0; i < n; ++i) F[i] = x.weight[i] > 0 ? -v_[i] : 0;
  with_weights(x, x.damping(eps), F, v_.data());
  columns_->reduce(v_.data(), 0, nullptr, split_);
  const double k = factor<double>(eps);
  for (int64_t j = 0; j < n; ++j) {
    gt[j] = y.weight[j] > 0 ? -v_[j] / k : 0;
    q[j] = y.weight[j] > 0 ? fast_exp2(k * (g[j] - gt[j])) : 1;
  }
}

void Engine::update_rows(double eps, const double* g, double* F, double* s) {
  set_eps(eps);
  with_weights(y, factor<double>(eps), g, v_.data());
  rows_->reduce(v_.data(), 0, nullptr, split_);
  for (int64_t i = 0; i < x.count; ++i) {
    const double next = x.weight[i] > 0 ? -v_[i] : 0;
    s[i] = fast_exp2(F[i] - next);
    F[i] = next;
  }
}

std::vector<double> Engine::row_means(double eps, const double* g, std::vector<double> u) {
  set_eps(eps);
  with_weights(y, factor<double>(eps), g, v_.data());
  rows_->reduce(v_.data(), 1, u.data(), split_);
  return u;
}

std::vector<double> Engine::mean_costs(const std::vector<double>& v) const {
  const int64_t N = axes_.size();
  std::vector<double> result(N);
  double mass = 0;
  for (const double value : v) mass += value;
  int64_t inner = 1;
  for (int64_t k = static_cast<int64_t>(axes_.shape.size()) - 1; k >= 0; --k) {
    const int64_t n = axes_.shape[k];
    std::vector<double> marginal(n), mean(n);
    for (int64_t j = 0; j < N; ++j) marginal[j / inner % n] += v[j] / mass;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) mean[i] += axes_.cost[k][i * n + j] * marginal[j];
    for (int64_t i = 0; i < N; ++i) result[i] += mean[i / inner % n];
    inner *= n;
  }
  return result;
}

double Engine::cost(int64_t i, int64_t j) const {
  double sum = 0;
  for (int64_t k = static_cast<int64_t>(axes_.shape.size()) - 1; k >= 0; --k) {
    const int64_t n = axes_.shape[k];
    sum += axes_.cost[k][i % n * n + j % n];
    i /= n, j /= n;
  }
  return sum;
}

double Engine::sigma() const {
  constexpr int64_t kSample = 256;  // points of each side
  const std::vector<int64_t> rows = x.sample(kSample), columns = y.sample(kSample);
  if (rows.size() < 2 || columns.size() < 2) return 0;
  const size_t r = rows.size(), c = columns.size();
  std::vector<double> C(r * c), row(r), column(c);
  double mean = 0, sum = 0;
  for (size_t i = 0; i < r; ++i)
    for (size_t j = 0; j < c; ++j) {
      const double entry = C[i * c + j] = cost(rows[i], columns[j]);
      row[i] += entry / c, column[j] += entry / r, mean += entry / (r * c);
    }
  for (size_t i = 0; i < r; ++i)
    for (size_t j = 0; j < c; ++j) sum += std::pow(C[i * c + j] - row[i] - column[j] + mean, 2);
  return std::sqrt(sum / (r * c));
}

// Between the Gaussians fitted to the densities, where the cost is that of points in space.
bool Engine::propose(double sweeps, double eps, double* g) const {
  if (axes_.spacing.empty()) return false;
  const int64_t d = static_cast<int64_t>(axes_.shape.size()), N = axes_.size();
  std::vector<double> points(N * d);
  int64_t inner = 1;
  for (int64_t k = d - 1; k >= 0; inner *= axes_.shape[k--])
    for (int64_t i = 0; i < N; ++i)
      points[i * d + k] = axes_.spacing[k] * static_cast<double>(i / inner % axes_.shape[k]);
  return gaussian_start(sweeps, GaussianStart<double>{N, N, d, points.data(), points.data(),
                                                      x.weight, y.weight, eps, g});
}

}  // namespace otloss::cpu::grid
