#include "cpu/grid/grid.h"

#include "core/math.h"
#include "cpu/parallel.h"
#include "cpu/solve/marginal.h"

namespace otloss::cpu {
namespace grid {

Kernels::Kernels(const GridAxes& axes, bool transposed, double eps) : size_(axes.size()) {
  for (size_t k = 0; k < axes.shape.size(); ++k)
    kernels_.emplace_back(axes.shape[k], axes.cost[k], transposed, factor<double>(eps));
}

void Kernels::reduce(double* v, int64_t channels, double* u, bool split) const {
  int64_t inner = 1;
  for (auto kernel = kernels_.rbegin(); kernel != kernels_.rend(); ++kernel) {
    const auto some = [&](int64_t begin, int64_t end) {
      if (!interrupted()) reduce_lines(*kernel, Lines{inner, begin, end, size_, channels, v, u});
    };
    const int64_t lines = size_ / kernel->n;
    if (split)
      parallel_for(0, lines, kLanes * (1 + kSplitGrain / (kLanes * kernel->n * kernel->n)), some);
    else
      some(0, lines);
    inner *= kernel->n;
  }
}

}  // namespace grid

void grid_means(const GridMeans& p) {
  const grid::Kernels kernels(p.axes, false, p.eps);
  const int64_t N = p.axes.size();
  parallel_problems(p.batch, kEndless, [&](int64_t k, bool split) {
    double* v = p.v + k * N;
    for (int64_t j = 0; j < N; ++j) v[j] = v[j] > kLog2Zero ? v[j] * kLog2E : kLog2Zero;
    kernels.reduce(v, p.channels, p.channels ? p.u + k * p.channels * N : nullptr, split);
    for (int64_t i = 0; i < N; ++i) v[i] *= kLn2;
  });
}

}  // namespace otloss::cpu
