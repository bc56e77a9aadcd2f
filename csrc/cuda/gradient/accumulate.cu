// The gradient of the cost of L Sinkhorn iterations, from the vectors that unrolled.cu leaves:
//     C_bar_ij = sum over iterations of a_i e_ij g_bar_j + R_ij f_bar_i.
//
// A warp has kRows rows of 32 kColumns columns, an entry's sum in a register and the iterations as
// the inner loop; vectors come kSteps iterations at a time through shared memory. Adding to a
// stored gradient in every iteration, as on the CPU, would move 8 to 16 bytes per entry, ten times
// what the exponentials take.
#include <algorithm>

#include "cuda/gradient/unrolled.h"
#include "cuda/pass/team_sweep.cuh"

namespace otloss::cuda {
namespace {

template <typename T>
struct AccumulateKernel {
  static constexpr int kThreads = 256;
  static constexpr int kRows = sizeof(T) == 4 ? 8 : 4, kColumns = 4;  // entries of a thread
  static constexpr int kTileRows = kRows * (kThreads / kWarp), kTileColumns = kColumns * kWarp;
  static constexpr int kSteps = 8;
  static constexpr int kValues = 2 * kTileRows + 3 * kTileColumns;  // of one iteration
  static constexpr size_t kShared = sizeof(T) * kSteps * kValues;
  static_assert(kShared <= 48 * 1024, "what every device has");

  Pack<AdjointGroup<T>> groups;
  double eps;
  Objective objective;

  static int64_t tiles(int64_t n, int64_t m) {
    return ceil_div(n, kTileRows) * ceil_div(m, kTileColumns);
  }

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const AdjointGroup<T>& p = groups.items[block.z()];
    const int64_t across = ceil_div(p.m, kTileColumns);
    const int64_t row = block.x() / across * kTileRows;
    if (p.grad_C == nullptr || row >= p.n) return;
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY)
      accumulate(block, p, batch, row, block.x() % across * kTileColumns);
  }

  // C_bar of the tile at (row, column).
  template <class Block>
  OTLOSS_DEVICE void accumulate(Block& block, const AdjointGroup<T>& p, int64_t batch, int64_t row,
                                int64_t column) const {
    const int lane = block.thread() % kWarp, first = block.thread() / kWarp * kRows;
    const T k = static_cast<T>(kLog2E / eps);
    const T to_E = static_cast<T>(1 / row_penalty(p).damping(eps));
    const T *a = p.a + batch * p.n, *b = p.b + batch * p.m;
    T* const shared = block.template shared<T>();
    T A[kRows], cost[kRows][kColumns], sum[kRows][kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = row + first + r;
      A[r] = i < p.n ? a[i] : T(0);
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const int64_t j = column + v * kWarp + lane;
        cost[r][v] = i < p.n && j < p.m ? p.C[(batch * p.n + i) * p.m + j] : T(0);
        sum[r][v] = T(0);
      }
    }
    for (int64_t begin = 0; begin < p.L; begin += kSteps) {
      const int steps = static_cast<int>(p.L - begin < kSteps ? p.L - begin : kSteps);
      block.sync();
      for (int s = 0; s < steps; ++s)
        stage(block, p, batch, begin + s, row, column, shared + s * kValues);
      block.sync();
      for (int s = 0; s < steps; ++s) {
        const T *F = shared + s * kValues + first, *R = F + kTileRows;
        const T* columns = shared + s * kValues + 2 * kTileRows + lane;
        T G[kColumns], g_bar[kColumns], H[kColumns];
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          G[v] = columns[v * kWarp];
          g_bar[v] = columns[kTileColumns + v * kWarp];
          H[v] = columns[2 * kTileColumns + v * kWarp];
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int v = 0; v < kColumns; ++v) {
            const T kC = k * cost[r][v];
            sum[r][v] += A[r] * g_bar[v] * fast_exp2(F[r] + G[v] - kC) +
                         plan_entry(R[r], to_E * F[r] + H[v] - kC);
          }
      }
    }
    if (objective == Objective::kTransport)
      add_transport(p, batch, row + first, column + lane, cost, sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const int64_t i = row + first + r, j = column + v * kWarp + lane;
        if (i < p.n && j < p.m)
          p.grad_C[(batch * p.n + i) * p.m + j] = A[r] > T(0) && b[j] > T(0) ? sum[r][v] : T(0);
      }
  }

  // The vectors of iteration l over the tile: F, R of the rows, G, g_bar, H of the columns.
  template <class Block>
  OTLOSS_DEVICE void stage(Block& block, const AdjointGroup<T>& p, int64_t batch, int64_t l,
                           int64_t row, int64_t column, T* out) const {
    const int64_t at = batch * p.L + l;
    const T k = static_cast<T>(kLog2E / eps);
    const T to_G = static_cast<T>(kLog2E / eps / column_penalty(p).damping(eps));
    const T *f = trace_f(p, batch, l), *g = trace_g(p, batch, l);
    for (int t = block.thread(); t < kTileRows; t += kThreads) {
      const int64_t i = row + t;
      out[t] = i < p.n ? k * f[i] : T(0);
      out[kTileRows + t] = i < p.n ? p.R[at * p.n + i] : T(0);
    }
    for (int t = block.thread(); t < kTileColumns; t += kThreads) {
      const int64_t j = column + t;
      T* const to = out + 2 * kTileRows + t;
      to[0] = j < p.m ? to_G * g[j] : T(0);
      to[kTileColumns] = j < p.m ? p.g_bar[at * p.m + j] : T(0);
      to[2 * kTileColumns] = j < p.m ? p.H[at * p.m + j] : T(0);
    }
  }

  // P (1 - C / eps) of the last iteration.
  OTLOSS_DEVICE void add_transport(const AdjointGroup<T>& p, int64_t batch, int64_t row,
                                   int64_t column, const T (&cost)[kRows][kColumns],
                                   T (&sum)[kRows][kColumns]) const {
    const Masses masses(p.masses[2 * batch], p.masses[2 * batch + 1], p.penalties.balanced);
    const T *a = p.a + batch * p.n, *b = p.b + batch * p.m;
    const T *f = trace_f(p, batch, p.L - 1), *g = trace_g(p, batch, p.L - 1);
    const T k = static_cast<T>(kLog2E / eps), s = p.coefficient * p.grad[batch];
    const T t = static_cast<T>(-static_cast<double>(s) / eps);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const int64_t i = row + r, j = column + v * kWarp;
        if (i >= p.n || j >= p.m) continue;
        const T used = masses.scaled(b[j]);
        const T P = used > T(0)
                        ? plan_entry(a[i], k * f[i] + (k * g[j] + fast_log2(used)) - k * cost[r][v])
                        : T(0);
        sum[r][v] += P != T(0) ? P * (s + t * cost[r][v]) : T(0);
      }
  }
};

}  // namespace

template <typename T>
void accumulate_costs(const Context& context, const Pack<AdjointGroup<T>>& pack, double eps,
                      Objective objective) {
  Grid grid{0};
  for (int g = 0; g < pack.count; ++g) {
    const AdjointGroup<T>& p = pack.items[g];
    grid.y = std::max(grid.y, std::min(p.batch, kGridY));
    if (p.grad_C) grid.x = std::max(grid.x, AccumulateKernel<T>::tiles(p.n, p.m));
  }
  grid.z = pack.count;
  grid.shared = AccumulateKernel<T>::kShared;
  launch(context, AccumulateKernel<T>{pack, eps, objective}, grid);
}

template void accumulate_costs(const Context&, const Pack<AdjointGroup<float>>&, double, Objective);
template void accumulate_costs(const Context&, const Pack<AdjointGroup<double>>&, double,
                               Objective);

}  // namespace otloss::cuda
