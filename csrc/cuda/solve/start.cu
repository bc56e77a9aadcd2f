// The start of a solve: the entropic potential between the Gaussians that have the moments of the
// clouds (gaussian_potential.h), for the squared cost, in three launches before the solve:
//
//     MomentKernel      sums of w (1, z)^T (1, z) over a part of a cloud; thread: one entry of the
//                       lower triangle over some of the points, neighbouring threads have
//                       neighbouring entries
//     MatrixKernel      moments of both clouds from the parts, then the matrix M; block: a problem
//     QuadraticKernel   g on the points of the columns; up to a warp per point, lanes have the
//                       coordinates
//
// All in double as on the CPU. MatrixKernel is a chain of small steps, three barriers for each of
// some 6 d rounds of rotations: it decides for how many dimensions the start pays (plan.cpp).
#include "cuda/solve/solve.h"

#include <algorithm>

#include "core/gaussian_potential.h"
#include "cuda/device/block.cuh"

namespace otloss::cuda {
namespace {

constexpr int kMomentParts = 32;  // of a cloud

// Entries of the lower triangle of the moments: mass, first and second ones.
constexpr int moment_entries(int d) { return (d + 1) * (d + 2) / 2; }

template <typename T>
struct StartItem {
  int64_t batch, n, m;
  const T* x;       // (B, n, d) prepared points
  const T* y;       // (B, m, d)
  const T* a;       // (B, n)
  const T* b;       // (B, m)
  double* partial;  // (B, 2, kMomentParts, entries)
  double* matrix;   // (B, d (d + 2)) M, mean of y, that less the mean of x
  T* g;             // (B, m) out
};

template <typename T>
struct MomentKernel {
  static constexpr int kThreads = 256;

  Pack<StartItem<T>> items;
  int d;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const StartItem<T>& item = items.items[block.z() / 2];
    const bool rows = block.z() % 2 == 0;
    const int64_t count = rows ? item.n : item.m, share = ceil_div(count, kMomentParts);
    const int64_t first = block.x() * share;
    const int64_t last = first + share < count ? first + share : count;
    const int entries = moment_entries(d), thread = block.thread();
    int width = 1;  // threads beside each other: entries; the others share the points
    while (width < entries && width < kThreads) width *= 2;
    const int groups = kThreads / width, group = thread / width;
    double* const sums = block.template shared<double>();  // (kThreads,)
    for (int64_t batch = block.y(); batch < item.batch; batch += kGridY) {
      const T* z = (rows ? item.x : item.y) + batch * count * d;
      const T* weight = (rows ? item.a : item.b) + batch * count;
      double* out =
          item.partial + ((batch * 2 + block.z() % 2) * kMomentParts + block.x()) * entries;
      for (int e = thread % width; e < ceil_div(entries, width) * width; e += width) {
        sums[thread] = e < entries ? moment(z, weight, e, first + group, last, groups) : 0.0;
        block.sync();
        if (group == 0 && e < entries) {
          double total = 0;
          for (int other = 0; other < groups; ++other) total += sums[other * width + thread];
          out[e] = total;
        }
        block.sync();
      }
    }
  }

 private:
  // Entry e of the triangle over the points first, first + step, ... < last.
  OTLOSS_DEVICE double moment(const T* z, const T* weight, int e, int64_t first, int64_t last,
                              int step) const {
    int k = 0;
    while ((k + 1) * (k + 2) / 2 <= e) ++k;
    const int l = e - k * (k + 1) / 2;
    double sum = 0;
    for (int64_t i = first; i < last; i += step) {
      if (!(weight[i] > T(0))) continue;
      const double left = k > 0 ? static_cast<double>(z[i * d + k - 1]) : 1.0;
      const double right = l > 0 ? static_cast<double>(z[i * d + l - 1]) : 1.0;
      sum += static_cast<double>(weight[i]) * left * right;
    }
    return sum;
  }
};

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
struct MatrixKernel {
  static constexpr int kThreads = 256;

  Pack<StartItem<T>> items;
  int d;
  double eps;

  static size_t shared_bytes(int d) {
    return sizeof(double) * (4 * d * d + 3 * kGaussianDims + 2 * (d + 1));
  }
  static_assert(sizeof(double) * (4 * kGaussianDims * kGaussianDims + 6 * kGaussianDims) <=
                    163 * 1024,
                "the memory of a block of an A100");

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const StartItem<T>& item = items.items[block.z()];
    const BlockThreads<Block, kThreads> threads{block};
    double* const shared = block.template shared<double>();
    const int size = d * d;
    const GaussianWork work{shared, shared + size, shared + 2 * size, shared + 3 * size,
                            shared + 4 * size};
    double* const x = work.scratch + 3 * kGaussianDims;  // (d + 1,) mass and mean
    double* const y = x + d + 1;                         // (d + 1,)
    for (int64_t batch = block.x(); batch < item.batch; batch += kGridX) {
      const double* partial = item.partial + batch * 2 * kMomentParts * moment_entries(d);
      double* const out = item.matrix + batch * d * (d + 2);
      moments(threads, partial, x, work.A);
      moments(threads, partial + kMomentParts * moment_entries(d), y, work.B);
      gaussian_matrix(threads, d, eps, work);
      threads.each(size, [&](int e) { out[e] = work.B[e]; });
      threads.each(d, [&](int k) {
        out[size + k] = y[1 + k];
        out[size + d + k] = y[1 + k] - x[1 + k];
      });
    }
  }

 private:
  // Adds up the parts: `mean` (d + 1,) the mass and the mean, and the covariance.
  template <class Threads>
  OTLOSS_DEVICE void moments(const Threads& threads, const double* partial, double* mean,
                             double* covariance) const {
    const int entries = moment_entries(d);
    threads.each((d + 1) * (d + 1), [&](int at) {
      const int k = at / (d + 1), l = at % (d + 1);
      if (l > k) return;
      double total = 0;
      for (int part = 0; part < kMomentParts; ++part)
        total += partial[part * entries + k * (k + 1) / 2 + l];
      if (l == 0)
        mean[k] = total;
      else
        covariance[(k - 1) * d + l - 1] = covariance[(l - 1) * d + k - 1] = total;
    });
    threads.each(d, [&](int k) { mean[1 + k] /= mean[0]; });
    threads.each(d * d, [&](int e) {
      covariance[e] = covariance[e] / mean[0] - mean[1 + e / d] * mean[1 + e % d];
    });
  }
};

template <typename T>
struct QuadraticKernel {
  static constexpr int kThreads = 256;

  Pack<StartItem<T>> items;
  int d;
  int width;  // lanes of a point, a power of two

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const StartItem<T>& item = items.items[block.z()];
    const int points = kThreads / width, lane = block.thread() % width;
    const int64_t j = block.x() * points + block.thread() / width;
    for (int64_t batch = block.y(); batch < item.batch; batch += kGridY) {
      const double* M = item.matrix + batch * d * (d + 2);
      const double *mean = M + d * d, *shift = mean + d;
      const int64_t at = batch * item.m + j;
      const T* y = item.y + at * d;
      double sum[1] = {0};
      if (j < item.m && item.b[at] > T(0))
        for (int l = lane; l < d; l += width)
          sum[0] += gaussian_term(d, M, shift, l,
                                  [&](int k) { return static_cast<double>(y[k]) - mean[k]; });
      warp_sum(block, sum, width);
      if (lane == 0 && j < item.m) item.g[at] = static_cast<T>(sum[0]);
    }
  }
};

// Of the pack's groups those for which there is a formula; their potentials to `starts`.
template <typename T>
Pack<StartItem<T>> start_items(const Context& context, const Pack<SolveGroup<T>>& pack, int d,
                               const T* (&starts)[kMaxGroups]) {
  Pack<StartItem<T>> items{};
  for (int i = 0; i < pack.count; ++i) {
    const SolveGroup<T>& p = pack.items[i];
    if (p.symmetric) continue;  // has a start of its own
    StartItem<T>& item = items.items[items.count++];
    item = {p.batch, p.n, p.m, p.points.zx, p.points.zy, p.a, p.b, nullptr, nullptr, nullptr};
    item.partial = context.scratch<double>(p.batch * 2 * kMomentParts * moment_entries(d));
    item.matrix = context.scratch<double>(p.batch * d * (d + 2));
    starts[i] = item.g = context.scratch<T>(p.batch * p.m);
  }
  return items;
}

}  // namespace

template <typename T>
void propose_starts(const Context& context, const Pack<SolveGroup<T>>& pack,
                    const SolveOptions& options, const SolvePlan& plan,
                    const T* (&starts)[kMaxGroups]) {
  const PointPair<T>& points = pack.items[0].points;
  if (points.zx == nullptr || !traits_of(points.kind).gaussian) return;
  if (options.n_iters >= 0 || options.warm_start || points.d > kGaussianDims) return;
  const int d = static_cast<int>(points.d);
  int64_t problems = 0, batch = 0, n = 0, m = 0;
  for (int i = 0; i < pack.count; ++i) {
    const SolveGroup<T>& p = pack.items[i];
    if (p.symmetric) continue;
    problems += p.batch, batch = std::max(batch, p.batch);
    n = std::max(n, p.n), m = std::max(m, p.m);
  }
  const Limits device = limits(context.device);
  if (problems == 0 || !start_pays(plan, problems, n, m, d, device)) return;
  if (MatrixKernel<T>::shared_bytes(d) > device.shared_per_block) return;
  const Pack<StartItem<T>> items = start_items(context, pack, d, starts);
  Grid grid;
  grid.x = kMomentParts;
  grid.y = std::min(batch, kGridY);
  grid.z = 2 * items.count;
  grid.shared = MomentKernel<T>::kThreads * sizeof(double);
  launch(context, MomentKernel<T>{items, d}, grid);
  grid.x = std::min(batch, kGridX);
  grid.y = 1;
  grid.z = items.count;
  grid.shared = MatrixKernel<T>::shared_bytes(d);
  launch(context, MatrixKernel<T>{items, d, options.eps}, grid);
  int width = 1;
  while (width < d && width < kWarp) width *= 2;
  grid.x = ceil_div(m * width, QuadraticKernel<T>::kThreads);
  grid.y = std::min(batch, kGridY);
  grid.shared = 0;
  launch(context, QuadraticKernel<T>{items, d, width}, grid);
}

template void propose_starts(const Context&, const Pack<SolveGroup<float>>&, const SolveOptions&,
                             const SolvePlan&, const float* (&)[kMaxGroups]);
template void propose_starts(const Context&, const Pack<SolveGroup<double>>&, const SolveOptions&,
                             const SolvePlan&, const double* (&)[kMaxGroups]);

}  // namespace otloss::cuda
