#include "cpu/multiscale/group_newton.h"

#include <algorithm>

namespace otloss::cpu::multiscale {

bool GroupNewton::prepare(double eps, const double*, const SemidualPoint<double>& point, int64_t,
                          int64_t&) {
  constexpr double kNear = 0.3;  // where the step would not go astray
  coupling_ = engine_.x.damping(eps) * engine_.y.damping(eps);
  return point.error < kNear;
}

template <typename F>
void GroupNewton::add_rows(Vector& out, F&& function) {
  const std::vector<Worker>& workers = engine_.workers();
  parts_.resize(workers.size());
  const auto add = [&](int64_t part, Vector& to) {
    const GroupSums& sums = workers[part].groups;
    int64_t begin = 0;
    for (size_t row = 0; row < sums.end.size(); begin = sums.end[row++])
      if (sums.row[row] > 0) function(sums, row, begin, sums.end[row], to);
  };
  if (workers.size() == 1) return add(0, out);
  parallel_tasks(static_cast<int64_t>(workers.size()), [&](int64_t part) {
    parts_[part].assign(out.size(), 0);
    add(part, parts_[part]);
  });
  for (const Vector& part : parts_)
    for (size_t h = 0; h < out.size(); ++h) out[h] += part[h];
}

void GroupNewton::step(double error, std::vector<double>& p) {
  constexpr double kDamping = 0.1, kTol = 0.05, kLeastDiagonal = 1e-3;
  constexpr int64_t kIterations = 60;
  const std::vector<double>& c = engine_.column_sums();
  const int64_t size = engine_.group(), groups = static_cast<int64_t>(c.size()) / size;
  const double damping = kDamping * error;
  double total = 0, all = 0;  // of c, the mean of the residual
  for (size_t j = 0; j < c.size(); ++j) total += c[j], all += c[j] * p[j];
  all /= total;
  Vector C(groups), right(groups), mean(groups), inverse(groups), x(groups);
  for (int64_t h = 0; h < groups; ++h) {
    for (int64_t j = size * h; j < size * (h + 1); ++j)
      C[h] += c[j], right[h] += c[j] * (p[j] - all);
    mean[h] = C[h] > 0 ? right[h] / C[h] : 0;
  }
  Vector diagonal = C;
  add_rows(diagonal,
           [&](const GroupSums& sums, size_t row, int64_t begin, int64_t end, Vector& to) {
             const int64_t per = sums.per;
             for (int64_t e = begin; e < end; ++e)
               for (int64_t h = 0; h < per; ++h) {
                 const double value = static_cast<double>(sums.value[e * per + h]);
                 to[sums.leaf[e] * per + h] -= coupling_ * value * value / sums.row[row];
               }
           });
  for (int64_t h = 0; h < groups; ++h)
    inverse[h] = C[h] > 0 ? 1 / (std::max(diagonal[h], kLeastDiagonal * C[h]) + damping * C[h]) : 0;
  const auto product = [&](const Vector& v, Vector& out) {
    for (int64_t h = 0; h < groups; ++h) out[h] = (1 + damping) * C[h] * v[h];
    add_rows(out, [&](const GroupSums& sums, size_t row, int64_t begin, int64_t end, Vector& to) {
      const int64_t per = sums.per;
      double along = 0;
      for (int64_t e = begin; e < end; ++e) {
        const float* value = &sums.value[e * per];
        const double* of_leaf = &v[sums.leaf[e] * per];
        for (int64_t h = 0; h < per; ++h) along += static_cast<double>(value[h]) * of_leaf[h];
      }
      along *= coupling_ / sums.row[row];
      for (int64_t e = begin; e < end; ++e) {
        const float* value = &sums.value[e * per];
        double* of_leaf = &to[sums.leaf[e] * per];
        for (int64_t h = 0; h < per; ++h) of_leaf[h] -= static_cast<double>(value[h]) * along;
      }
    });
  };
  conjugate_gradients({kTol, 0, kIterations}, inverse, product, [](Vector&) {}, right, x);
  double shift = 0;  // constants are left as they are
  for (int64_t h = 0; h < groups; ++h) shift += C[h] * x[h] / total;
  for (size_t j = 0; j < p.size(); ++j) {
    const int64_t h = static_cast<int64_t>(j) / size;
    p[j] += x[h] - shift - mean[h] - all;
  }
}

}  // namespace otloss::cpu::multiscale
