// The last row update in double of problems whose loss cancels (core/last_update.h), after all
// solves. Where it does not both launches find nothing to do.
//
//     RowsKernel     the sum of each row: a block has some rows, a thread a column of all of them
//     ValuesKernel   from those and g the terms of the loss: a block for each entry of the batch
//
// An entry takes 2 d operations in double and two exponentials. A coordinate of a column is
// converted once for all rows of the block, whose own stand in shared memory.
#include "core/last_update.h"
#include "cuda/solve/state.cuh"

namespace otloss::cuda {
namespace {

using Groups = Pack<SolveGroup<float>>;
using Lse = OnlineLse<double>;

// Whether the terms of an entry of the batch cancel.
OTLOSS_DEVICE bool cancel(const Groups& groups, int64_t entry) {
  LossTerms loss;
  for (int i = 0; i < groups.count; ++i)
    loss.add(groups.items[i].status[entry * kStatusFields + kStatusTerm]);
  return loss.cancel();
}

template <class Cost>
struct RowsKernel {
  static constexpr int kThreads = 256, kRows = kThreads / kWarp, kChunk = 32;
  static constexpr size_t kShared = sizeof(Lse) * kRows * kThreads;
  static_assert(kShared >= sizeof(double) * kRows * kChunk, "coordinates of the rows come first");

  Groups groups;
  int64_t blocks, length;
  double k;      // log2(e) / eps
  double* sums;  // (problems, length) out: log2 of sum_j b_j e^{(g_j - C_ij) / eps}

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    with_problem(block, groups, blocks, [&](const auto& p, int64_t batch, int64_t number) {
      const int64_t first = number * kRows;
      if (first >= p.n || !cancel(groups, batch)) return;
      Lse sum[kRows];
      for (int64_t at = 0; at < p.m; at += kThreads)
        add_column(block, p, batch, first, at + block.thread(), sum);
      Lse* const parts = block.template shared<Lse>();  // (kRows, kThreads)
      block.sync();
#pragma unroll
      for (int r = 0; r < kRows; ++r) parts[r * kThreads + block.thread()] = sum[r];
      block.sync();
      const int row = block.thread() / kWarp, lane = block.thread() % kWarp;
      Lse all = parts[row * kThreads + lane];
      for (int part = lane + kWarp; part < kThreads; part += kWarp)
        all.merge(parts[row * kThreads + part]);
      for (int mask = kWarp / 2; mask > 0; mask /= 2)
        all.merge({block.shuffle_xor(all.max, mask), block.shuffle_xor(all.sum, mask)});
      if (lane == 0 && first + row < p.n)
        sums[block.x() / blocks * length + first + row] = all.value();
    });
  }

 private:
  // By all threads, also those whose column is beyond the last.
  template <class Block>
  OTLOSS_DEVICE void add_column(Block& block, const SolveGroup<float>& p, int64_t batch,
                                int64_t first, int64_t j, Lse (&sum)[kRows]) const {
    const int64_t d = p.points.d, column = batch * p.m + j;
    const bool counts = j < p.m && p.b[column] > 0;
    const float* const y = p.points.zy + column * d;
    double* const rows = block.template shared<double>();  // (kRows, kChunk)
    double xy[kRows] = {}, xx[kRows] = {}, yy = 0;  // or squared distances in the place of xy
    for (int64_t begin = 0; begin < d; begin += kChunk) {
      block.sync();
      const int64_t row = first + block.thread() / kChunk, c = begin + block.thread() % kChunk;
      if (row < p.n && c < d)
        rows[block.thread()] = static_cast<double>(p.points.zx[(batch * p.n + row) * d + c]);
      block.sync();
      const int64_t end = d - begin < kChunk ? d - begin : kChunk;
      for (int64_t l = 0; counts && l < end; ++l) {
        const double v = static_cast<double>(y[begin + l]);
        yy += v * v;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const double u = rows[r * kChunk + l];
          xy[r] += Cost::kUnitNorm ? u * v : (u - v) * (u - v), xx[r] += u * u;
        }
      }
    }
    if (!counts) return;
    const double G = k * static_cast<double>(p.g[column]) + log2_weight(double{p.b[column]});
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if constexpr (Cost::kUnitNorm) {  // directions of length 1 in double, too
        const double square = xx[r] * yy;
        sum[r].add(G - k * Cost::from_product(1.0, 1.0, square > 0 ? xy[r] / sqrt(square) : 0.0));
      } else {
        sum[r].add(G - k * Cost::from_difference(xy[r]));
      }
    }
  }
};
static_assert(RowsKernel<SqEuclidean>::kRows * RowsKernel<SqEuclidean>::kChunk ==
              RowsKernel<SqEuclidean>::kThreads);

struct ValuesKernel {
  static constexpr int kThreads = 256;

  Groups groups;
  int64_t length;
  double eps;
  const double* sums;  // (problems, length) of the rows

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t entry = block.x();
    if (!cancel(groups, entry)) return;
    Team<Block, kThreads> team(block, TeamArguments{1, nullptr});
    int64_t before = 0;  // problems
    for (int i = 0; i < groups.count; before += groups.items[i++].batch) {
      const SolveGroup<float>& p = groups.items[i];
      const double value = value_of(block, team, p, entry, sums + (before + entry) * length);
      if (block.thread() == 0)
        p.status[entry * kStatusFields + kStatusTerm] = p.coefficient * value;
    }
  }

 private:
  // Calls function(w, v) for the points of positive weight, a thread for each.
  template <class Block, typename V, typename F>
  OTLOSS_DEVICE static void for_points(Block& block, int64_t count, const float* w, const V* v,
                                       F&& function) {
    for (int64_t i = block.thread(); i < count; i += kThreads)
      if (w[i] > 0) function(static_cast<double>(w[i]), static_cast<double>(v[i]));
  }

  template <class Block, class Team>
  OTLOSS_DEVICE double value_of(Block& block, Team& team, const SolveGroup<float>& p, int64_t entry,
                                const double* row_sums) const {
    const float *const a = p.a + entry * p.n, *const b = p.b + entry * p.m;
    const float* const g = p.g + entry * p.m;
    const Penalty x{1 / p.penalties.rho_x}, y{1 / p.penalties.rho_y};
    double total[2] = {0, 0}, most[2] = {Max::identity(), Max::identity()};
    const auto look = [&](int side, double w, double v) {
      total[side] += w, most[side] = Max::join(most[side], v);
    };
    for_points(block, p.n, a, row_sums, [&](double w, double sum) { look(0, w, sum); });
    for_points(block, p.m, b, g, [&](double w, double v) { look(1, w, -v); });
    team.sum(total);
    team.template reduce<Max>(most);
    // Weights of the totals that the solver took: b is scaled by `ratio`, which all rows see.
    const double mass_x = snapped_total(total[0], roundoff<float>());
    const double mass_y =
        p.penalties.balanced ? mass_x : snapped_total(total[1], roundoff<float>());
    const double ratio = mass_y / total[1], shift = fast_log2(ratio);
    const double unit = x.damping(eps) * eps / kLog2E, least = -most[0] - shift;
    SoftSums f, of_g;
    for_points(block, p.n, a, row_sums, [&](double w, double sum) {
      f.add(x, unit, least, w * mass_x / total[0], -sum - shift);
    });
    for_points(block, p.m, b, g,
               [&](double w, double v) { of_g.add(y, 1, -most[1], ratio * w, v); });
    double all[6] = {f.lost, f.kept, f.size, of_g.lost, of_g.kept, of_g.size};
    team.sum(all);
    return updated_value(p.penalties.balanced, x, y, mass_x, mass_y, eps,
                         SoftSums{all[0], all[1], all[2]}.mean(x, unit, least, mass_x),
                         SoftSums{all[3], all[4], all[5]}.mean(y, 1, -most[1], mass_y));
  }
};

}  // namespace

void update_in_double(const Context& context, const std::vector<SolveGroup<float>>& groups,
                      double eps) {
  for_each_pack(groups, [&](const Groups& pack) {
    const Shape shape = shape_of<float>(pack);
    double* const sums = context.scratch<double>(shape.problems * shape.n);
    dispatch_cost(pack.items[0].points.kind, [&](auto cost) {
      using Kernel = RowsKernel<decltype(cost)>;
      const int64_t blocks = ceil_div(shape.n, Kernel::kRows);
      launch(context, Kernel{pack, blocks, shape.n, kLog2E / eps, sums},
             Grid{shape.problems * blocks, Kernel::kShared});
    });
    launch(context, ValuesKernel{pack, shape.n, eps, sums},
           Grid{pack.items[0].batch, sizeof(TeamScratch)});
  });
}

}  // namespace otloss::cuda
