// Log-sum-exps over a regular grid and means with their weights, one axis after the other.
//
// Along an axis of n points with costs C (n, n), `inner` points apart in memory, and k = log2(e) /
// eps
//     out_i = log2 sum_j 2^(v_j - k C_ij),   mean_i = sum_j 2^(v_j - k C_ij - out_i) u_j .
// A thread makes one output, neighbouring threads neighbouring ones: where inner > 1 they read
// neighbouring v_j and the same C_ij, along the last axis the same v_j and rows of C that stay in
// L1. Every line is read from one array and written to another, the passes in turn.
#include <algorithm>
#include <utility>

#include "core/math.h"
#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"
#include "grid_kernels.h"

namespace otloss::cuda {
namespace {

// The numbers of a pass, from one array to another.
struct Arrays {
  double* v;  // (B, N)
  double* u;  // (B, channels, N), or null
};

struct AxisKernel {
  static constexpr int kThreads = 256;

  int64_t n, inner;  // points of the axis, and their distance
  int64_t size;      // N
  int64_t count;     // B N
  int64_t channels;
  const double* C;  // (n, n)
  double k;
  double units_in, units_out;  // what v is multiplied by on either side: 1, or between e and 2
  Arrays from, to;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t at = block.x() * kThreads + block.thread();
    if (at >= count) return;
    const int64_t i = at / inner % n, first = at - i * inner, batch = at / size;
    double most = 2 * kLog2Zero, sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double t = term(first, i, j);
      most = t > most ? t : most;
    }
    for (int64_t j = 0; j < n; ++j) sum += fast_exp2(term(first, i, j) - most);
    to.v[at] = units_out * (most + fast_log2(sum));
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t shift = (batch * (channels - 1) + c) * size;  // from (B, N) to (B, c, N)
      double mean = 0;
      for (int64_t j = 0; j < n; ++j)
        mean += fast_exp2(term(first, i, j) - most) * from.u[first + shift + j * inner];
      to.u[at + shift] = mean / sum;
    }
  }

  OTLOSS_DEVICE double term(int64_t first, int64_t i, int64_t j) const {
    const double v = from.v[first + j * inner];
    return (v > kLog2Zero ? units_in * v : kLog2Zero) - k * C[i * n + j];
  }
};

}  // namespace

void grid_means(const Context& context, const GridMeans& p) {
  AxisKernel kernel{};
  kernel.size = p.axes.size();
  kernel.count = p.batch * kernel.size;
  kernel.channels = p.channels;
  Arrays here{p.v, p.u}, there{context.scratch<double>(kernel.count), nullptr};
  if (p.channels > 0) there.u = context.scratch<double>(kernel.count * p.channels);
  const Grid grid{ceil_div(kernel.count, AxisKernel::kThreads)};
  const auto pass = [&](int64_t n, int64_t inner, const double* C, double k) {
    kernel.n = n, kernel.inner = inner, kernel.C = C, kernel.k = k;
    kernel.from = here, kernel.to = there;
    launch(context, kernel, grid);
    std::swap(here, there);
  };
  const size_t axes = p.axes.shape.size();
  kernel.units_in = kernel.units_out = 1;
  // After the last pass the result is where the input was: of an odd number, one copies.
  if (axes % 2 == 1) pass(1, 1, p.axes.cost[0], 0);
  int64_t inner = 1;
  for (size_t k = axes; k-- > 0; inner *= p.axes.shape[k]) {
    kernel.units_in = k + 1 == axes ? kLog2E : 1;
    kernel.units_out = k == 0 ? kLn2 : 1;
    pass(p.axes.shape[k], inner, p.axes.cost[k], kLog2E / p.eps);
  }
}

}  // namespace otloss::cuda
