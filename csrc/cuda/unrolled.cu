// The exact derivative of L Sinkhorn iterations, in the notation of csrc/cpu/unrolled.cpp:
//     e_ij = exp((f_i + g_j / q - C_ij) / eps),  R_ij = z_i e_ij w_j,
//     u_i = sum_j e_ij g_bar_j,   f_bar_i -= a_i u_i,   a_bar_i -= eps u_i,
//     v_j = sum_i R_ij f_bar_i,   g_bar'_j = -q v_j,    b_bar_j -= eps v_j / b_j,
//     C_bar_ij = sum over iterations of a_i e_ij g_bar_j + R_ij f_bar_i.
//
// The potentials' recursion goes from iteration to iteration, the cost gradient is a plain sum over
// them. The CPU adds to C_bar on the way, in cache; here that would read and write a matrix in
// global memory at every iteration, ten times what the exponentials take. So the recursion keeps
// its vectors, L (n + 2 m) values, and C_bar is made afterwards with each entry's sum in a register
// and the iterations as the inner loop: a second exponential per entry in place of 8 to 16 bytes.
// Three launches, whatever L:
//
//     FactorKernel      w of every iteration, and where e underflows though R does not (`apart`):
//                       a block for each iteration of each problem
//     AdjointKernel     the recursion: a team of blocks for each problem, which passes over C once
//                       per iteration (sweep.cuh) and meets twice, for v and for the next g_bar
//     AccumulateKernel  C_bar: a warp has kRows rows of 32 kColumns columns; vectors come kSteps
//                       iterations at a time through shared memory
//
// The recursion's vectors are cut by rows and columns: all are in global memory, and a block only
// sees others' v (in parts) and g_bar.
#include <algorithm>

#include "block.cuh"
#include "math.h"
#include "penalty.h"
#include "reduce.cuh"
#include "sweep.cuh"

namespace otloss::cuda {
namespace {

template <typename T>
struct AdjointGroup : UnrolledGroup<T> {
  T* R;            // (B, L, n) what e w is multiplied by in R, with f_bar
  T* g_bar;        // (B, L, m)
  T* w;            // (B, L, m) k g' + log2 b where the iteration is apart
  int* apart;      // (B, L)
  double* masses;  // (B, 2) of a and b
};

// The totals of the weights a, and of the weights b that the iterations ran with: if balanced,
// those given, scaled to the total of a.
struct Masses {
  double a, b, ratio;

  OTLOSS_HOST_DEVICE Masses(double of_a, double given_b, bool balanced)
      : a(of_a), b(balanced ? of_a : given_b), ratio(balanced ? of_a / given_b : 1.0) {}

  template <typename T>
  OTLOSS_HOST_DEVICE T scaled(T b_j) const {
    return static_cast<T>(static_cast<double>(b_j) * ratio);
  }
};

template <typename T>
OTLOSS_DEVICE Penalty row_penalty(const AdjointGroup<T>& p) {
  return {1 / p.strength.rho_x};
}
template <typename T>
OTLOSS_DEVICE Penalty column_penalty(const AdjointGroup<T>& p) {
  return {1 / p.strength.rho_y};
}

// f of iteration l, and g; g' is null for 0.
template <typename T>
OTLOSS_DEVICE const T* trace_f(const AdjointGroup<T>& p, int64_t batch, int64_t l) {
  return p.trace + (batch * p.L + l) * (p.n + p.m);
}
template <typename T>
OTLOSS_DEVICE const T* trace_g(const AdjointGroup<T>& p, int64_t batch, int64_t l) {
  return trace_f(p, batch, l) + p.n;
}
template <typename T>
OTLOSS_DEVICE const T* g_before(const AdjointGroup<T>& p, int64_t batch, int64_t l) {
  if (l > 0) return trace_g(p, batch, l - 1);
  return p.start ? p.start + batch * p.m : nullptr;
}

// ------------------------------------------------------------------------------------- factors

template <typename T>
struct FactorKernel {
  static constexpr int kThreads = 256;

  Pack<AdjointGroup<T>> groups;
  double eps;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const AdjointGroup<T>& p = groups.items[block.z()];
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY)
      for (int64_t l = block.x(); l < p.L; l += kGridX) factors(block, p, batch, l);
  }

  template <class Block>
  OTLOSS_DEVICE void factors(Block& block, const AdjointGroup<T>& p, int64_t batch,
                             int64_t l) const {
    const Penalty x = row_penalty(p), y = column_penalty(p);
    const T k = static_cast<T>(kLog2E / eps);
    const T to_G = static_cast<T>(kLog2E / eps / y.damping(eps));
    const T per_rho = static_cast<T>(kLog2E * x.rate), limit = static_cast<T>(kLog2Trusted);
    const T *a = p.a + batch * p.n, *b = p.b + batch * p.m;
    const T *f = trace_f(p, batch, l), *g = trace_g(p, batch, l), *before = g_before(p, batch, l);
    const auto change = [&](int64_t j) { return k * (before ? before[j] : T(0)) - to_G * g[j]; };
    double sums[4] = {};  // a, b, how many factors are out of range
    for (int64_t i = block.thread(); i < p.n; i += kThreads) {
      sums[0] += static_cast<double>(a[i]);
      sums[2] += !x.hard() && !(per_rho * f[i] < limit) ? 1 : 0;
    }
    for (int64_t j = block.thread(); j < p.m; j += kThreads) {
      sums[1] += static_cast<double>(b[j]);
      sums[2] += b[j] > T(0) && !(change(j) < limit) ? 1 : 0;
    }
    block_sum<kThreads>(block, sums, block.template shared<double>());
    const Masses masses(sums[0], sums[1], p.strength.balanced);
    const bool apart = sums[2] > 0;
    T* w = p.w + (batch * p.L + l) * p.m;
    for (int64_t j = block.thread(); j < p.m; j += kThreads) {
      const T used = masses.scaled(b[j]);
      if (apart)
        w[j] = b[j] > T(0) ? k * (before ? before[j] : T(0)) + fast_log2(used)
                           : static_cast<T>(kLog2Zero);
      else
        w[j] = b[j] > T(0) ? used * fast_exp2(change(j)) : T(0);
    }
    if (block.thread() != 0) return;
    p.apart[batch * p.L + l] = apart ? 1 : 0;
    if (l > 0) return;
    p.masses[2 * batch] = sums[0];
    p.masses[2 * batch + 1] = sums[1];
  }

  static constexpr double kLog2Trusted = 60;
  static_assert(kTrusted == 0x1p60, "kLog2Trusted is its logarithm");
};

// ----------------------------------------------------------------------------------- recursion

template <typename T>
struct AdjointKernel {
  static constexpr int kThreads = kSolveThreads;

  Pack<AdjointGroup<T>> groups;
  TeamArguments<T> team;
  double eps;
  Objective objective;
  T* f_bar;       // (teams, rows) of the last iteration
  double* a_bar;  // (teams, rows)
  double* b_bar;  // (teams, columns)

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const;
};

// P C of the last iteration: what <P, C> puts on potentials and weights.
template <typename T>
struct TransportWork {
  struct Row {
    T a, F;
  };
  struct Column {
    T G;
  };
  int64_t m;
  const T* tile;  // (rows, m)
  const T* a;     // (rows,)
  const T* f;     // (rows,)
  const T* b;     // (m,)
  const T* g;     // (m,)
  Masses masses;
  T k;
  double scale, eps;
  T* f_bar;       // (rows,) out
  double* a_bar;  // (rows,) out

  OTLOSS_DEVICE Row row(int i) const { return {a[i], k * f[i]}; }
  OTLOSS_DEVICE Column column(int j) const {
    const T used = masses.scaled(b[j]);
    return {used > T(0) ? k * g[j] + fast_log2(used) : static_cast<T>(kLog2Zero)};
  }
  OTLOSS_DEVICE T entry(const Row& row, const Column& column, int i, int j) const {
    const T c = tile[static_cast<int64_t>(i) * m + j];
    const T P = row.a > T(0) ? plan_entry(row.a, row.F + column.G - k * c) : T(0);
    return P != T(0) ? P * c : T(0);
  }
  OTLOSS_DEVICE T again(const Row& row, const Column& column, int i, int j) const {
    return entry(row, column, i, j);
  }
  OTLOSS_DEVICE T factor(int) const { return T(1); }
  OTLOSS_DEVICE T finish(int i, T sum, bool leader) const {
    if (leader) {
      const double term = scale * static_cast<double>(sum);
      f_bar[i] = static_cast<T>(term / eps);
      a_bar[i] = a[i] > T(0) ? term / static_cast<double>(a[i]) : 0.0;
    }
    return T(1);
  }
};

// One iteration back.
template <class Block, typename T>
struct IterationWork {
  struct Row {
    T F, E;
  };
  struct Column {
    T G, H;
  };
  TeamMemory<Block> memory;
  const T* tile;   // (rows, m)
  const T* a;      // (rows,)
  const T* f;      // (rows,)
  const T* b;      // (m,)
  const T* g;      // (m,)
  const T* g_bar;  // (m,) times q
  const T* w;      // (m,)
  const T* f_bar;  // (rows,) from outside, or null
  double* a_bar;   // (rows,) accumulated
  T* R;            // (rows,) out, or null
  int64_t m;
  T k, to_E, to_G, per_rho, damping;  // per_rho: 0 where the rows are held hard, or apart
  double eps;

  // Rows and columns of weight 0 must give finite entries.
  OTLOSS_DEVICE Row row(int i) const {
    const bool counts = a[i] > T(0);
    const T none = static_cast<T>(kLog2Zero);
    return {counts ? k * f[i] : none, counts ? to_E * f[i] : none};
  }
  OTLOSS_DEVICE Column column(int j) const {
    return {b[j] > T(0) ? to_G * g[j] : static_cast<T>(kLog2Zero), w[j]};
  }
  OTLOSS_DEVICE T cost(int i, int j) const { return tile[static_cast<int64_t>(i) * m + j]; }
  OTLOSS_DEVICE T entry(const Row& row, const Column& column, int i, int j) const {
    return fast_exp2(row.F + column.G - k * cost(i, j));
  }
  OTLOSS_DEVICE T factor(int j) const { return memory.load(g_bar + j); }
};

// f_bar_i z_i, where u_i is known.
template <class Block, typename T>
OTLOSS_DEVICE T finish_row(const IterationWork<Block, T>& work, int i, T u, bool leader, T z) {
  const T a = work.a[i];
  const bool counts = a > T(0);
  const T outside = work.f_bar ? work.f_bar[i] : T(0);
  const T R = counts ? (outside - a * u) * z : T(0);
  if (leader && counts) work.a_bar[i] -= work.eps * static_cast<double>(u);
  if (leader && work.R) work.R[i] = R;
  return R;
}

// Where R = z e w: the column sums are v over w.
template <class Block, typename T>
struct TogetherWork : IterationWork<Block, T> {
  using Base = IterationWork<Block, T>;

  OTLOSS_DEVICE T again(const typename Base::Row& row, const typename Base::Column& column, int i,
                        int j) const {
    return this->entry(row, column, i, j);
  }
  OTLOSS_DEVICE T finish(int i, T u, bool leader) const {
    return finish_row(*this, i, u, leader,
                      this->per_rho == T(0)
                          ? this->damping
                          : this->damping * fast_exp2(this->per_rho * this->f[i]));
  }
};

// Where R needs an exponential of its own: the column sums are v.
template <class Block, typename T>
struct ApartWork : IterationWork<Block, T> {
  using Base = IterationWork<Block, T>;

  OTLOSS_DEVICE T again(const typename Base::Row& row, const typename Base::Column& column, int i,
                        int j) const {
    return fast_exp2(row.E + column.H - this->k * this->cost(i, j));
  }
  OTLOSS_DEVICE T finish(int i, T u, bool leader) const {
    return finish_row(*this, i, u, leader, this->damping);
  }
};

template <typename T, class Block>
class Adjoint {
 public:
  using Team = TeamSweep<T, T, Block>;

  OTLOSS_DEVICE Adjoint(Block& block, const AdjointKernel<T>& kernel)
      : kernel_(kernel), eps_(kernel.eps), team_(block, kernel.team) {}

  OTLOSS_DEVICE void run() {
    team_.for_problems(kernel_.groups, [&](const AdjointGroup<T>& p, int64_t batch) {
      place(p, batch);
      seed(p, batch);
      for (int64_t l = p.L - 1; l >= 0; --l) step(p, batch, l);
      if (p.grad_a == nullptr) return;
      T *grad_a = p.grad_a + batch * p.n + team_.first_row(), *grad_b = p.grad_b + batch * p.m;
      team_.for_rows([&](int i) { grad_a[i] = a_[i] > T(0) ? static_cast<T>(a_bar_[i]) : T(0); });
      team_.for_columns(
          [&](int j) { grad_b[j] = b_[j] > T(0) ? static_cast<T>(b_bar_[j]) : T(0); });
    });
  }

 private:
  OTLOSS_DEVICE void place(const AdjointGroup<T>& p, int64_t batch) {
    const int64_t row = team_.first_row(), rows = kernel_.team.rows;
    x_ = row_penalty(p), y_ = column_penalty(p);
    damp_f_ = x_.damping(eps_), damp_g_ = y_.damping(eps_);
    k_ = static_cast<T>(kLog2E / eps_);
    masses_ = Masses(p.masses[2 * batch], p.masses[2 * batch + 1], p.strength.balanced);
    a_ = p.a + batch * p.n + row;
    b_ = p.b + batch * p.m;
    f_bar_ = kernel_.f_bar + team_.index() * rows + row;
    a_bar_ = kernel_.a_bar + team_.index() * rows + row;
    b_bar_ = kernel_.b_bar + team_.index() * kernel_.team.columns;
    const T* C = p.C + (batch * p.n + row) * p.m;
    T* const tile = team_.tile(nullptr);
    if (tile != nullptr) {
      team_.for_entries([&](int i, int j) {
        const int64_t at = static_cast<int64_t>(i) * p.m + j;
        tile[at] = C[at];
      });
      team_.block_sync();
    }
    tile_ = tile != nullptr ? tile : C;
  }

  // The objective's own derivatives at the last potentials, and what comes from outside.
  OTLOSS_DEVICE void seed(const AdjointGroup<T>& p, int64_t batch) {
    const int64_t last = p.L - 1, row = team_.first_row();
    const T *f = trace_f(p, batch, last) + row, *g = trace_g(p, batch, last);
    const double scale = static_cast<double>(p.coefficient * p.grad[batch]);
    T* const g_bar = p.g_bar + (batch * p.L + last) * p.m;
    const auto put = [&](int j, double of_g, double of_b) {
      const bool counts = b_[j] > T(0);
      const T outside = p.grad_g ? p.grad_g[batch * p.m + j] : T(0);
      const T whole = static_cast<T>(damp_g_) * (static_cast<T>(of_g) + outside);
      team_.store(g_bar + j, counts ? whole : T(0));
      b_bar_[j] = counts ? of_b : 0.0;
    };
    if (kernel_.objective == Objective::kTransport) {
      team_.pass(
          TransportWork<T>{p.m, tile_, a_, f, b_, g, masses_, k_, scale, eps_, f_bar_, a_bar_});
      team_.sync();
      team_.join([&](int j, T sum) {
        const double term = scale * static_cast<double>(sum);
        put(j, term / eps_, b_[j] > T(0) ? term / static_cast<double>(masses_.scaled(b_[j])) : 0.0);
      });
    } else {
      const double eps = p.strength.balanced ? 0.0 : eps_;
      team_.for_rows([&](int i) {
        const double v = static_cast<double>(f[i]);
        f_bar_[i] = static_cast<T>(scale * x_.share(v)) * a_[i];
        a_bar_[i] = scale * (x_.dual(v) + eps * masses_.b);
      });
      team_.for_columns([&](int j) {
        const double v = static_cast<double>(g[j]), share = y_.share(v);
        put(j, scale * share / damp_g_ * static_cast<double>(masses_.scaled(b_[j])),
            scale * (y_.dual(v) + eps * (masses_.a - share)));
      });
    }
    team_.for_rows([&](int i) {
      const T outside = p.grad_f ? p.grad_f[batch * p.n + row + i] : T(0);
      // Potentials that are NaN make the gradient NaN, which exponentials alone would not.
      f_bar_[i] += a_[i] > T(0) ? outside + T(0) * f[i] : T(0);
    });
    team_.sync();
  }

  OTLOSS_DEVICE void step(const AdjointGroup<T>& p, int64_t batch, int64_t l) {
    const int64_t at = batch * p.L + l, row = team_.first_row();
    const bool apart = p.apart[at] != 0;
    const T* const w = p.w + at * p.m;
    const IterationWork<Block, T> work{
        team_.memory(),
        tile_,
        a_,
        trace_f(p, batch, l) + row,
        b_,
        trace_g(p, batch, l),
        p.g_bar + at * p.m,
        w,
        l == p.L - 1 ? f_bar_ : nullptr,
        a_bar_,
        p.R ? p.R + at * p.n + row : nullptr,
        p.m,
        k_,
        static_cast<T>(kLog2E / eps_ / damp_f_),
        static_cast<T>(kLog2E / eps_ / damp_g_),
        static_cast<T>(kLog2E * x_.rate),
        static_cast<T>(damp_f_),
        eps_,
    };
    if (apart)
      team_.pass(ApartWork<Block, T>{work}, true);
    else
      team_.pass(TogetherWork<Block, T>{work});
    team_.sync();
    T* const next = l > 0 ? p.g_bar + (at - 1) * p.m : nullptr;
    team_.join([&](int j, T v) {
      const bool counts = b_[j] > T(0);
      const T g_bar = !counts ? T(0) : apart ? -v : -v * w[j];
      if (counts)
        b_bar_[j] += eps_ * static_cast<double>(g_bar) / static_cast<double>(masses_.scaled(b_[j]));
      if (next) team_.store(next + j, static_cast<T>(damp_g_) * g_bar);
    });
    team_.sync();
  }

  const AdjointKernel<T>& kernel_;
  const double eps_;
  Team team_;
  Penalty x_, y_;
  double damp_f_, damp_g_;
  T k_;
  Masses masses_{0, 0, false};
  const T* tile_;  // (rows, m)
  const T* a_;     // (rows,)
  const T* b_;     // (m,)
  T* f_bar_;       // (rows,)
  double* a_bar_;  // (rows,) summed over all iterations
  double* b_bar_;  // (m,)
};

template <typename T>
template <class Block>
OTLOSS_DEVICE void AdjointKernel<T>::operator()(Block& block) const {
  Adjoint<T, Block> adjoint(block, *this);
  adjoint.run();
}

// ------------------------------------------------------------------------------- cost gradient

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
        const bool apart = p.apart[batch * p.L + begin + s] != 0;
        T G[kColumns], g_bar[kColumns], w[kColumns];
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          G[v] = columns[v * kWarp];
          g_bar[v] = columns[kTileColumns + v * kWarp];
          w[v] = columns[2 * kTileColumns + v * kWarp];
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int v = 0; v < kColumns; ++v) {
            const T e = fast_exp2(F[r] + G[v] - k * cost[r][v]);
            if (apart)
              sum[r][v] +=
                  A[r] * e * g_bar[v] + plan_entry(R[r], to_E * F[r] + w[v] - k * cost[r][v]);
            else
              sum[r][v] += e * (A[r] * g_bar[v] + R[r] * w[v]);
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

  // The vectors of iteration l over the tile: F, R of the rows, G, g_bar, w of the columns.
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
      to[2 * kTileColumns] = j < p.m ? p.w[at * p.m + j] : T(0);
    }
  }

  // P (1 - C / eps) of the last iteration.
  OTLOSS_DEVICE void add_transport(const AdjointGroup<T>& p, int64_t batch, int64_t row,
                                   int64_t column, const T (&cost)[kRows][kColumns],
                                   T (&sum)[kRows][kColumns]) const {
    const Masses masses(p.masses[2 * batch], p.masses[2 * batch + 1], p.strength.balanced);
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

// Every workspace that the three launches share.
template <typename T>
Pack<AdjointGroup<T>> with_workspace(const Context& context, const Pack<UnrolledGroup<T>>& pack) {
  Pack<AdjointGroup<T>> groups{};
  groups.count = pack.count;
  for (int g = 0; g < pack.count; ++g) {
    const UnrolledGroup<T>& p = pack.items[g];
    const int64_t iterations = p.batch * p.L;
    groups.items[g] = {p,
                       p.grad_C ? context.scratch<T>(iterations * p.n) : nullptr,
                       context.scratch<T>(iterations * p.m),
                       context.scratch<T>(iterations * p.m),
                       context.scratch<int>(iterations),
                       context.scratch<double>(p.batch * 2)};
  }
  return groups;
}

}  // namespace

template <typename T>
void unrolled_backward(const Context& context, const std::vector<UnrolledGroup<T>>& groups,
                       double eps, Objective objective) {
  for_each_pack(groups, [&](const Pack<UnrolledGroup<T>>& given) {
    const Pack<AdjointGroup<T>> pack = with_workspace(context, given);
    int64_t batch = 0, iterations = 0, tiles = 0;
    for (int g = 0; g < pack.count; ++g) {
      const AdjointGroup<T>& p = pack.items[g];
      batch = std::max(batch, p.batch);
      iterations = std::max(iterations, p.L);
      if (p.grad_C) tiles = std::max(tiles, AccumulateKernel<T>::tiles(p.n, p.m));
    }
    AdjointKernel<T> adjoint{};
    adjoint.groups = pack;
    adjoint.eps = eps;
    adjoint.objective = objective;
    const Grid team = plan_team<AdjointKernel<T>, T>(context, pack, &adjoint.team);
    adjoint.f_bar = context.scratch<T>(adjoint.team.teams * adjoint.team.rows);
    adjoint.a_bar = context.scratch<double>(adjoint.team.teams * adjoint.team.rows);
    adjoint.b_bar = context.scratch<double>(adjoint.team.teams * adjoint.team.columns);
    Grid grid;
    grid.y = std::min(batch, kGridY);
    grid.z = pack.count;
    grid.x = std::min(iterations, kGridX);
    grid.shared = block_sum_bytes<FactorKernel<T>::kThreads>(4);
    launch(context, FactorKernel<T>{pack, eps}, grid);
    launch(context, adjoint, team);
    grid.x = tiles;
    grid.shared = AccumulateKernel<T>::kShared;
    launch(context, AccumulateKernel<T>{pack, eps, objective}, grid);
  });
}

template void unrolled_backward(const Context&, const std::vector<UnrolledGroup<float>>&, double,
                                Objective);
template void unrolled_backward(const Context&, const std::vector<UnrolledGroup<double>>&, double,
                                Objective);

}  // namespace otloss::cuda
