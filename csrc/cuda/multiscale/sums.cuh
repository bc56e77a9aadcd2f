// Sums over the rows of a plan between two clouds, of the pairs of leaves that can hold something
// of it. A block has a leaf of rows, a row for each lane, and shares the leaves of columns out
// between its warps:
//
//     search   a lane for each super, then for each leaf of a near one; a ballot says which of
//     these
//              bounds from boxes do not exclude
//     tile     the pair is bounded again, from all its points. Columns go through shared memory,
//              each read by all lanes at once; an entry takes kD multiply-adds and an exponential
//
// So there are no lists: a search takes a few instructions for 32 pairs of leaves, and every pass
// knows its own potentials. Columns are the rows of the same kernel with the sides exchanged.
// partners.h of the CPU's engine explains bounds and exponents.
#pragma once

#include "cuda/multiscale/planes.cuh"
#include "cuda/pass/row_sums.cuh"

namespace otloss::cuda::multiscale {

// What is summed next.
struct ListedOrder {
  RowSum what;         // kPlan, or kNone: nothing
  int side;            // 0: the rows are the problem's, 1: its columns
  bool some;           // only leaves where a row's last sum is that of a poor guess
  bool exact;          // in double, over all pairs
  double k;            // log2(e) / eps
  float threshold;     // log2 of what a pair of leaves that is left out may hold of a row
  float single;        // largest term of exponents in single precision
  Potential of[2];     // by side
  const float* log_w;  // in place of the columns' own, which are no less; or null
};

// A side, and what its sums are put to.
struct ListedSide {
  Cloud cloud;
  Planes planes;
  double* sum;    // (leaves, kLeaf) sums of w_j 2^(V_i + W_j - k |x_i - y_j|^2)
  double* exact;  // likewise, log2 of them for V = 0
  // (leaves,) bounds of the mass that was left out of rows whose guess was not poor; an estimate of
  // the mass by which rounding changes sums.
  double *left_out, *rounding;
  double* product;  // (leaves, kD, kLeaf) displacements w_i sum P_ij / w_i (y_j - x_i), or null
};

OTLOSS_DEVICE bool poor(double weight, double sum) { return weight > 0 && !is_good_sum(sum); }

// Calls function(bit) for the bits that are set, from the lowest on.
template <typename F>
OTLOSS_DEVICE void for_each_bit(unsigned bits, F&& function) {
  for (; bits != 0; bits &= bits - 1) {
#if defined(__CUDA_ARCH__)
    function(__ffs(static_cast<int>(bits)) - 1);
#else
    function(__builtin_ctz(bits));
#endif
  }
}

constexpr int kSumThreads = 128, kSumWarps = kSumThreads / kWarp;

// The sums of one leaf of rows; each warp has a part of the columns.
template <int kD, bool kProducts, class Block>
class LeafSums {
 public:
  // Of a column, in shared memory: its coordinates and beta.
  struct alignas(16) Column {
    float v[kD], beta;
  };
  static constexpr int kValues = 1 + (kProducts ? kD : 0);  // of a row
  static constexpr size_t kColumns = sizeof(Column) * kSumThreads;
  static constexpr size_t kJoined = sizeof(double) * (kValues * kSumThreads + 2 * kSumWarps);
  static constexpr size_t kShared = kColumns > kJoined ? kColumns : kJoined;
  static_assert(kShared >= 2 * sizeof(double) * kSumThreads, "run_exact() takes as much");

  OTLOSS_DEVICE LeafSums(Block& block, const ListedOrder& order, const ListedSide& rows,
                         const ListedSide& columns, int64_t I)
      : block_(block),
        order_(order),
        x_(rows),
        y_(columns),
        I_(I),
        lane_(block.thread() % kWarp),
        warp_(block.thread() / kWarp),
        k_(static_cast<float>(order.k)),
        top_(static_cast<float>(rows.planes.base[I])),
        radius_(rows.cloud.leaf.radius[I]),
        rest_(rows.planes.rest[I * kLeaf + lane_]),
        log_w_(order.log_w ? order.log_w : columns.cloud.log_w) {
    const Nodes& leaf = rows.cloud.leaf;
#pragma unroll
    for (int c = 0; c < kD; ++c) {
      at_[c] = leaf.at[c * leaf.stride + I], half_[c] = leaf.half[c * leaf.stride + I];
      slope_[c] = rows.planes.slope[c * leaf.stride + I];
      u_[c] = rows.cloud.u[offset<kD>(I * kLeaf + lane_, c)];
    }
  }

  OTLOSS_DEVICE void run() {
    const Cloud& y = y_.cloud;
    for (int64_t first = 0; first < y.supers; first += kWarp * kSumWarps)
      for_each_bit(
          near(y.super, y_.planes.top, y_.planes.tilt, first + lane_ * kSumWarps + warp_, y.supers),
          [&](int bit) {
            const int64_t leaves = (first + bit * kSumWarps + warp_) * kSuper;
            for_each_bit(near(y.leaf, y_.planes.base, y_.planes.slope, leaves + lane_, y.leaves()),
                         [&](int leaf) { add(leaves + leaf); });
          });
    write();
  }

  // The same sums over all pairs, in double, their largest term taken out.
  OTLOSS_DEVICE void run_exact() {
    OnlineLse<double> sum;
    const double* const w = y_.cloud.w;
    const int64_t count = ceil_div(y_.cloud.n, kLeaf);
    for (int64_t J = warp_; J < count; J += kSumWarps)
#pragma unroll 1
      for (int h = 0; h < kLeaf; ++h) {
        const int64_t j = J * kLeaf + h;
        if (w[j] > 0) sum.add(density(j, 0) + fast_log2(w[j]));
      }
    double* const shared = block_.template shared<double>();
    shared[block_.thread()] = sum.max, shared[kSumThreads + block_.thread()] = sum.sum;
    block_.sync();
    if (warp_ > 0) return;
    for (int other = 1; other < kSumWarps; ++other) {
      const int at = other * kWarp + lane_;
      sum.merge({shared[at], shared[kSumThreads + at]});
    }
    x_.exact[I_ * kLeaf + lane_] = sum.value();
  }

 private:
  // V + W_j - k |x - y_j|^2 of the lane's row.
  OTLOSS_DEVICE double density(int64_t j, double V) const {
    double square = 0;
    for (int c = 0; c < kD; ++c) {
      const double delta =
          x_.cloud.X[offset<kD>(I_ * kLeaf + lane_, c)] - y_.cloud.X[offset<kD>(j, c)];
      square += delta * delta;
    }
    const Potential& other = order_.of[1 - order_.side];
    return V + other.factor * other.v[j] - order_.k * square;
  }

  // Which lanes have a node of columns that may hold enough of the rows, by boxes: the largest log2
  // density. What others hold at most is added to what is left out.
  OTLOSS_DEVICE unsigned near(const Nodes& nodes, const double* tops, const float* slopes,
                              int64_t J, int64_t count) {
    bool is_near = false;
    if (J < count) {
      float distance = 0, box_x = 0, ball_x = 0, box_y = 0, ball_y = 0, halves = 0;
#pragma unroll
      for (int c = 0; c < kD; ++c) {
        const int64_t at = c * nodes.stride + J;
        const float delta = static_cast<float>(at_[c] - nodes.at[at]), half = nodes.half[at];
        const float tilt_x = slope_[c] - 2 * k_ * delta, tilt_y = slopes[at] + 2 * k_ * delta;
        distance += delta * delta;
        box_x += fabsf(tilt_x) * half_[c], ball_x += tilt_x * tilt_x;
        box_y += fabsf(tilt_y) * half, ball_y += tilt_y * tilt_y;
        halves += half_[c] * half;
      }
      const float top = static_cast<float>(tops[J]), radius = nodes.radius[J];
      const float tilts =
          fminf(box_x, sqrtf(ball_x) * radius_) + fminf(box_y, sqrtf(ball_y) * radius);
      const float both = fminf(halves, radius_ * radius);
      const float size =
          fabsf(top_) + fabsf(top) + tilts + k_ * (distance + radius_ * radius_ + radius * radius);
      const float bound =
          top_ + top - k_ * distance + tilts + 2 * k_ * both + kBoundRounding * size;
      is_near = keeps(bound + nodes.log_mass[J], true);
    }
    return block_.ballot(is_near);
  }

  // Whether a node is kept that holds at most 2^held of a row; else that is left out, and added up
  // by the lane that counts it. A bound that is no number keeps it.
  OTLOSS_DEVICE bool keeps(float held, bool counts) {
    const bool kept = !(held < order_.threshold);
    if (!kept && counts) left_out_ += static_cast<double>(fast_exp2(held));
    return kept;
  }

  // The pair with leaf J.
  OTLOSS_DEVICE void add(int64_t J) {
    const Nodes& leaf = y_.cloud.leaf;
    const int64_t j = J * kLeaf + lane_;
    Column* const columns = block_.template shared<Column>() + warp_ * kWarp;
    double distance = 0;
    float halves = 0, ball_x = 0, ball_y = 0, alpha = rest_, beta = y_.planes.rest[j];
    Column own;
#pragma unroll
    for (int c = 0; c < kD; ++c) {
      const int64_t at = c * leaf.stride + J;
      const double delta = at_[c] - leaf.at[at], turn = 2 * order_.k * delta;
      const float tilt_x = static_cast<float>(static_cast<double>(slope_[c]) - turn);
      const float tilt_y = static_cast<float>(static_cast<double>(y_.planes.slope[at]) + turn);
      own.v[c] = y_.cloud.u[offset<kD>(j, c)];
      alpha += tilt_x * u_[c], beta += tilt_y * own.v[c];
      distance += delta * delta, halves += half_[c] * leaf.half[at];
      ball_x += tilt_x * tilt_x, ball_y += tilt_y * tilt_y;
    }
    const float radius = leaf.radius[J];
    const float shift =
        static_cast<float>(x_.planes.base[I_] + y_.planes.base[J] - order_.k * distance);
    const float inner = 2 * k_ * fminf(halves, radius_ * radius);
    const float terms = fmaxf(inner, fmaxf(sqrtf(ball_x) * radius_, sqrtf(ball_y) * radius));
    const float most_x = joined<Max>(block_, alpha), most_y = joined<Max>(block_, beta);
    const float bound = pair_bound(shift, most_x, most_y, inner, terms);
    if (!keeps(bound + leaf.log_mass[J], lane_ == 0)) return;
    own.beta = beta + shift + log_w_[j];
    block_.warp_sync();  // nobody reads the columns before any more
    columns[lane_] = own;
    block_.warp_sync();
    float values[kValues] = {};
    if (terms > order_.single)
      add_wide(J, columns, values);
    else
      add_columns(columns, alpha, values);
    sum_[0] += static_cast<double>(values[0]);
#pragma unroll
    for (int c = 1; c < kValues; ++c)  // relative to the centre of the rows
      sum_[c] += static_cast<double>(values[c]) -
                 (at_[c - 1] - leaf.at[(c - 1) * leaf.stride + J]) * static_cast<double>(values[0]);
    if (terms <= order_.single) terms_ = fmaxf(terms_, terms);
  }

  OTLOSS_DEVICE void add_columns(const Column* columns, float alpha, float (&values)[kValues]) {
    float U[kD];
#pragma unroll
    for (int c = 0; c < kD; ++c) U[c] = 2 * k_ * u_[c];
#pragma unroll 8
    for (int h = 0; h < kLeaf; ++h) {
      const Column column = columns[h];
      float t = alpha + column.beta;
#pragma unroll
      for (int c = 0; c < kD; ++c) t += U[c] * column.v[c];
      add_entry(fast_exp2_unclamped(t), column, values);
    }
  }

  // Exponents whose terms are too large for single precision.
  OTLOSS_DEVICE void add_wide(int64_t J, const Column* columns, float (&values)[kValues]) {
    const Potential& own = order_.of[order_.side];
    const int64_t i = I_ * kLeaf + lane_;
    const double V = x_.cloud.w[i] > 0 ? own.factor * own.v[i] : 0.0;
#pragma unroll 1
    for (int h = 0; h < kLeaf; ++h) {
      const int64_t j = J * kLeaf + h;
      const float log_w = log_w_[j];
      const float t = log_w > kNone ? static_cast<float>(density(j, V)) + log_w : kNone;
      add_entry(fast_exp2_unclamped(t), columns[h], values);
    }
  }

  OTLOSS_DEVICE static void add_entry(float e, const Column& column, float (&values)[kValues]) {
    values[0] += e;
#pragma unroll
    for (int c = 1; c < kValues; ++c) values[c] += e * column.v[c - 1];
  }

  // The sums of all warps.
  OTLOSS_DEVICE void write() {
    double* const shared = block_.template shared<double>();
    double* const others = shared + kValues * kSumThreads;
    const double left_out = joined<Sum>(block_, left_out_);
    block_.sync();  // nobody reads columns any more
#pragma unroll
    for (int c = 0; c < kValues; ++c) shared[c * kSumThreads + block_.thread()] = sum_[c];
    if (lane_ == 0)
      others[2 * warp_] = left_out, others[2 * warp_ + 1] = static_cast<double>(terms_);
    block_.sync();
    if (warp_ > 0) return;
    double missing = left_out, terms = static_cast<double>(terms_);
    for (int warp = 1; warp < kSumWarps; ++warp) {
#pragma unroll
      for (int c = 0; c < kValues; ++c) sum_[c] += shared[c * kSumThreads + warp * kWarp + lane_];
      missing += others[2 * warp], terms = Max::join(terms, others[2 * warp + 1]);
    }
    const int64_t i = I_ * kLeaf + lane_;
    const double w = x_.cloud.w[i], sum = sum_[0];
    const double share = joined<Sum>(block_, w > 0 && !poor(w, sum) ? w / sum : 0.0);
    x_.sum[i] = sum;
#pragma unroll
    for (int c = 1; c < kValues; ++c)
      x_.product[offset<kD>(i, c - 1)] =
          w > 0 ? w * (sum_[c] - (x_.cloud.X[offset<kD>(i, c - 1)] - at_[c - 1]) * sum) : 0.0;
    if (lane_ != 0) return;
    const double mass = static_cast<double>(x_.cloud.leaf.mass[I_]);
    x_.left_out[I_] = missing * share;
    x_.rounding[I_] = mass * (kSumRounding + kTermRounding * terms);
  }

  Block& block_;
  const ListedOrder& order_;
  const ListedSide &x_, &y_;
  const int64_t I_;
  const int lane_, warp_;
  const float k_, top_, radius_, rest_;
  const float* const log_w_;
  double at_[kD];
  float half_[kD], slope_[kD], u_[kD];
  double sum_[kValues] = {}, left_out_ = 0;
  float terms_ = 0;
};

// What all kernels of a problem know.
struct ListedProblem {
  ListedOrder* order;
  ListedSide sides[2];  // the second is the first again where a cloud is against itself
};

// The planes of both sides; a block for each super.
template <int kD>
struct PlanesKernel {
  static constexpr int kThreads = kNodeThreads;

  ListedProblem problem;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const ListedOrder& order = *problem.order;
    if (order.what == RowSum::kNone || order.exact) return;
    const int64_t first = problem.sides[0].cloud.supers;
    const int side = block.x() < first ? 0 : 1;
    const ListedSide& own = problem.sides[side];
    PlaneFit<kD>{own.cloud, own.planes, order.of[side], order.k}.run(
        block, block.x() - (side == 0 ? 0 : first));
  }
};

// The sums that the problem waits for; a block for each leaf of either side.
template <int kD, bool kProducts>
struct ListedSumsKernel {
  static constexpr int kThreads = kSumThreads;

  ListedProblem problem;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const ListedOrder& order = *problem.order;
    if (order.what == RowSum::kNone) return;
    const ListedSide &rows = problem.sides[order.side], &columns = problem.sides[1 - order.side];
    const int64_t I = block.x(), i = I * kLeaf + block.thread() % kWarp;
    if (I * kLeaf >= rows.cloud.n) return;
    if (order.some && !block.any(poor(rows.cloud.w[i], rows.sum[i]))) return;
    LeafSums<kD, kProducts, Block> sums(block, order, rows, columns, I);
    if (!kProducts && order.exact)
      sums.run_exact();
    else
      sums.run();
  }
};

}  // namespace otloss::cuda::multiscale
