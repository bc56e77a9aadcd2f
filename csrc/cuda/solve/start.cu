// The start of a solve: the entropic potential between the Gaussians that have the moments of the
// clouds (gaussian_potential.h), for the squared cost. A block for each problem, in double: a
// thread has one entry of the moments over some of the points; then the matrix, a chain of small
// steps; then the potential, up to a warp per point. plan.cpp decides where this pays.
#include "core/gaussian_potential.h"
#include "cuda/solve/state.cuh"

namespace otloss::cuda {
namespace {

// The threads of a block for gaussian_potential.h.
template <class Block, int kThreads>
struct BlockThreads {
  Block& block;

  template <typename F>
  OTLOSS_DEVICE void each(int count, F&& function) const {
    for (int i = block.thread(); i < count; i += kThreads) function(i);
    block.sync();
  }
};

template <typename T>
struct StartKernel {
  static constexpr int kThreads = kControlThreads;

  Pack<SolveGroup<T>> groups;
  T* starts[kMaxGroups];  // (B, m) out, or null
  int d;
  double eps;

  static size_t shared_bytes(int d) {
    return sizeof(double) * (4 * d * d + 3 * kGaussianDims + 2 * (d + 1) + kThreads);
  }
  static_assert(sizeof(double) * (4 * kGaussianDims * kGaussianDims + 6 * kGaussianDims + 512) <=
                    163 * 1024,
                "the memory of a block of an A100");

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    with_problem(block, groups, 1, [&](const SolveGroup<T>& p, int64_t batch, int64_t) {
      T* const g = starts[&p - groups.items];
      if (g == nullptr) return;
      const BlockThreads<Block, kThreads> threads{block};
      double* const shared = block.template shared<double>();
      const int size = d * d;
      const GaussianWork work{shared, shared + size, shared + 2 * size, shared + 3 * size,
                              shared + 4 * size};
      double* const x = work.scratch + 3 * kGaussianDims;  // (d + 1,) mass and mean
      double* const y = x + d + 1;                         // (d + 1,)
      double* const sums = y + d + 1;                      // (kThreads,)
      const T *const zy = p.points.zy + batch * p.m * d, *const b = p.b + batch * p.m;
      moments(block, p.points.zx + batch * p.n * d, p.a + batch * p.n, p.n, sums, x, work.A);
      moments(block, zy, b, p.m, sums, y, work.B);
      gaussian_matrix(threads, d, eps, work);
      threads.each(d, [&](int k) { x[1 + k] = y[1 + k] - x[1 + k]; });
      int width = 1;  // lanes of a point
      while (width < d && width < kWarp) width *= 2;
      const int lane = block.thread() % width, points = kThreads / width;
      for (int64_t first = 0; first < p.m; first += points) {
        const int64_t j = first + block.thread() / width;
        double sum = 0;
        if (j < p.m && b[j] > T(0))
          for (int l = lane; l < d; l += width)
            sum += gaussian_term(d, work.B, x + 1, l, [&](int k) {
              return static_cast<double>(zy[j * d + k]) - y[1 + k];
            });
        sum = warp_join<Sum>(block, sum, width);
        if (lane == 0 && j < p.m) g[batch * p.m + j] = static_cast<T>(sum);
      }
    });
  }

 private:
  // Of a cloud z (count, d): mass and mean (d + 1,), covariance (d, d).
  template <class Block>
  OTLOSS_DEVICE void moments(Block& block, const T* z, const T* weight, int64_t count, double* sums,
                             double* mean, double* covariance) const {
    const int entries = (d + 1) * (d + 2) / 2, thread = block.thread();  // of a lower triangle
    int width = 1;  // threads beside each other: entries; the others share the points
    while (width < entries && width < kThreads) width *= 2;
    const int shares = kThreads / width, share = thread / width;
    for (int e = thread % width; e < ceil_div(entries, width) * width; e += width) {
      int k = 0;
      while ((k + 1) * (k + 2) / 2 <= e) ++k;
      const int l = e - k * (k + 1) / 2;
      double sum = 0;  // of w (1, z)_k (1, z)_l
      for (int64_t i = share; e < entries && i < count; i += shares) {
        if (!(weight[i] > T(0))) continue;
        const double left = k > 0 ? static_cast<double>(z[i * d + k - 1]) : 1.0;
        const double right = l > 0 ? static_cast<double>(z[i * d + l - 1]) : 1.0;
        sum += static_cast<double>(weight[i]) * left * right;
      }
      sums[thread] = sum;
      block.sync();
      if (share == 0 && e < entries) {
        for (int other = 1; other < shares; ++other) sum += sums[other * width + thread];
        if (l == 0)
          mean[k] = sum;
        else
          covariance[(k - 1) * d + l - 1] = covariance[(l - 1) * d + k - 1] = sum;
      }
      block.sync();
    }
    const BlockThreads<Block, kThreads> threads{block};
    threads.each(d, [&](int k) { mean[1 + k] /= mean[0]; });
    threads.each(d * d, [&](int e) {
      covariance[e] = covariance[e] / mean[0] - mean[1 + e / d] * mean[1 + e % d];
    });
  }
};

}  // namespace

template <typename T>
void propose_starts(const Context& context, const Pack<SolveGroup<T>>& pack,
                    const SolveOptions& options, const SolvePlan& plan,
                    const T* (&starts)[kMaxGroups]) {
  const PointPair<T>& points = pack.items[0].points;
  if (points.zx == nullptr || !traits_of(points.kind).gaussian) return;
  if (options.n_iters >= 0 || options.warm_start || points.d > kGaussianDims) return;
  Pack<SolveGroup<T>> pairs{};  // others have a start of their own
  for (int i = 0; i < pack.count; ++i)
    if (!pack.items[i].symmetric) pairs.items[pairs.count++] = pack.items[i];
  StartKernel<T> kernel{pack, {}, static_cast<int>(points.d), options.eps};
  const Limits device = limits(context.device);
  const size_t bytes = kernel.shared_bytes(kernel.d);
  if (bytes > device.shared_per_block || !start_pays(plan, shape_of<T>(pairs), kernel.d, device))
    return;
  for (int i = 0; i < pack.count; ++i) {
    const SolveGroup<T>& p = pack.items[i];
    if (!p.symmetric) starts[i] = kernel.starts[i] = context.scratch<T>(p.batch * p.m);
  }
  launch(context, kernel, Grid{problems_of(pack), bytes});
}

template void propose_starts(const Context&, const Pack<SolveGroup<float>>&, const SolveOptions&,
                             const SolvePlan&, const float* (&)[kMaxGroups]);
template void propose_starts(const Context&, const Pack<SolveGroup<double>>&, const SolveOptions&,
                             const SolvePlan&, const double* (&)[kMaxGroups]);

}  // namespace otloss::cuda
