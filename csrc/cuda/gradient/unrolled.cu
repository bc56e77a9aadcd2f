// The exact derivative of L Sinkhorn iterations, in the notation of csrc/cpu/gradient/unrolled.cpp:
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
//
// Without cost matrices (made_sums.cuh) the recursion makes e, and then R, from the points, once
// for the rows and once for the columns, and waits three times per iteration; point_sums.cu takes
// the place of AccumulateKernel.
#include <algorithm>

#include "core/math.h"
#include "core/penalty.h"
#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/gradient/point_sums.h"
#include "cuda/pass/made_sums.cuh"
#include "cuda/pass/pack.cuh"
#include "cuda/pass/sweep.cuh"

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
  return {1 / p.penalties.rho_x};
}
template <typename T>
OTLOSS_DEVICE Penalty column_penalty(const AdjointGroup<T>& p) {
  return {1 / p.penalties.rho_y};
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
    const Masses masses(sums[0], sums[1], p.penalties.balanced);
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
struct AdjointArguments {
  Pack<AdjointGroup<T>> groups;
  TeamArguments<T> team;
  double eps;
  Objective objective;
  T* f_bar;       // (teams, rows) of the last iteration
  double* a_bar;  // (teams, rows)
  double* b_bar;  // (teams, columns)
};

template <typename T>
struct AdjointKernel {
  static constexpr int kThreads = kSolveThreads;

  AdjointArguments<T> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const;
};

// Without cost matrices.
template <typename T>
struct MadeAdjointKernel {
  static constexpr int kThreads = kSolveThreads;

  AdjointArguments<T> arguments;
  MadeLayout layout;
  IterationsOfPoints<T> made[kMaxGroups];
  T* rows;     // (teams, 3, rows)
  T* columns;  // (teams, 3, columns)

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

// The costs in memory, for the passes of the recursion; likewise MadeCosts.
template <typename T, class Block>
class StoredCosts {
 public:
  using Kernel = AdjointKernel<T>;
  using Team = TeamSweep<T, T, Block>;

  OTLOSS_DEVICE StoredCosts(Block&, const Kernel&, Team& team) : team_(team) {}

  OTLOSS_DEVICE void place(const AdjointGroup<T>& p, int64_t batch) {
    const T* C = p.C + (batch * p.n + team_.first_row()) * p.m;
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

  OTLOSS_DEVICE const T* tile() const { return tile_; }

  // Row sums to work.finish, and column sums of what it makes of them to set(j, sum).
  template <class Work, typename Set>
  OTLOSS_DEVICE void transport(const Work& work, Set&& set) {
    pass(work, false, set);
  }
  template <class Work, typename Set>
  OTLOSS_DEVICE void iteration(const Work& work, bool apart, Set&& set) {
    pass(work, apart, set);
  }

 private:
  template <class Work, typename Set>
  OTLOSS_DEVICE void pass(const Work& work, bool apart, Set&& set) {
    team_.pass(work, apart);
    team_.sync();
    team_.join(set);
  }

  Team& team_;
  const T* tile_;  // (rows, m)
};

template <typename T, class Block>
class MadeCosts {
 public:
  using Kernel = MadeAdjointKernel<T>;
  using Sides = MadeSides<T, T, Block>;
  using Team = typename Sides::Team;

  OTLOSS_DEVICE MadeCosts(Block& block, const Kernel& kernel, Team& team)
      : kernel_(kernel), team_(team), sides_(block, team, kernel.layout) {}

  OTLOSS_DEVICE void place(const AdjointGroup<T>& p, int64_t batch) {
    const AdjointArguments<T>& arguments = kernel_.arguments;
    const IterationsOfPoints<T>& made = kernel_.made[&p - arguments.groups.items];
    sides_.place(made.points, batch, p.n, p.m, p.made.symmetric, arguments.eps);
    plan_F_ = made.F + batch * sides_.x().stride, plan_G_ = made.G + batch * sides_.y().stride;
    const int64_t rows = arguments.team.rows, columns = arguments.team.columns;
    F_ = kernel_.rows + team_.index() * 3 * rows, E_ = F_ + rows;
    G_ = kernel_.columns + team_.index() * 3 * columns, H_ = G_ + columns;
    u_ = E_ + rows + team_.first_row(), v_ = H_ + columns;
  }

  OTLOSS_DEVICE const T* tile() const { return nullptr; }

  // The plan's exponents stay for the gradient of the points.
  template <class Work, typename Set>
  OTLOSS_DEVICE void transport(const Work& work, Set&& set) {
    sides_.fill_rows(plan_F_, [&](int i) { return work.row(i).F + log2_weight(work.a[i]); });
    sides_.fill_columns(plan_G_, [&](int j) { return work.column(j).G; });
    team_.sync();
    sides_.over_columns(plan_F_, plan_G_, nullptr, true, u_);
    team_.for_rows([&](int i) { work.finish(i, u_[i], true); });
    over_rows(plan_F_, plan_G_, nullptr, true, set);
  }

  template <class Work, typename Set>
  OTLOSS_DEVICE void iteration(const Work& work, bool apart, Set&& set) {
    sides_.fill_rows(F_, [&](int i) { return work.row(i).F; });
    sides_.fill_columns(G_, [&](int j) { return work.column(j).G; });
    if (apart) {
      sides_.fill_rows(E_, [&](int i) { return work.row(i).E; });
      sides_.fill_columns(H_, [&](int j) { return work.column(j).H; });
    }
    team_.sync();
    sides_.over_columns(F_, G_, work.g_bar, false, u_);
    team_.for_rows([&](int i) { team_.store(work.R + i, work.finish(i, u_[i], true)); });
    team_.sync();
    const T* const R = work.R - team_.first_row();
    apart ? over_rows(E_, H_, R, false, set) : over_rows(F_, G_, R, false, set);
  }

 private:
  template <typename Set>
  OTLOSS_DEVICE void over_rows(const T* F, const T* G, const T* x, bool of_costs, Set&& set) {
    sides_.over_rows(F, G, x, of_costs, v_ + team_.first_column());
    team_.for_columns([&](int j) { set(j, v_[j]); });
    team_.block_sync();
  }

  const Kernel& kernel_;
  Team& team_;
  Sides sides_;
  T *plan_F_, *plan_G_;  // (n,) (m,) exponents of the last plan
  T *F_, *E_;            // (n,) of the iteration
  T *G_, *H_;            // (m,)
  T *u_, *v_;            // (rows,) (m,) sums on their way
};

template <typename T, class Block, class Costs>
class Adjoint {
 public:
  using Team = typename Costs::Team;

  OTLOSS_DEVICE Adjoint(Block& block, const typename Costs::Kernel& kernel)
      : kernel_(kernel.arguments),
        eps_(kernel.arguments.eps),
        team_(block, kernel.arguments.team),
        costs_(block, kernel, team_) {}

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
    masses_ = Masses(p.masses[2 * batch], p.masses[2 * batch + 1], p.penalties.balanced);
    a_ = p.a + batch * p.n + row;
    b_ = p.b + batch * p.m;
    f_bar_ = kernel_.f_bar + team_.index() * rows + row;
    a_bar_ = kernel_.a_bar + team_.index() * rows + row;
    b_bar_ = kernel_.b_bar + team_.index() * kernel_.team.columns;
    costs_.place(p, batch);
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
      const TransportWork<T> work{p.m, costs_.tile(), a_,   f,      b_,    g, masses_,
                                  k_,  scale,         eps_, f_bar_, a_bar_};
      costs_.transport(work, [&](int j, T sum) {
        const double term = scale * static_cast<double>(sum);
        put(j, term / eps_, b_[j] > T(0) ? term / static_cast<double>(masses_.scaled(b_[j])) : 0.0);
      });
    } else {
      const double eps = p.penalties.balanced ? 0.0 : eps_;
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
        costs_.tile(),
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
    T* const next = l > 0 ? p.g_bar + (at - 1) * p.m : nullptr;
    const auto put = [&](int j, T v) {
      const bool counts = b_[j] > T(0);
      const T g_bar = !counts ? T(0) : apart ? -v : -v * w[j];
      if (counts)
        b_bar_[j] += eps_ * static_cast<double>(g_bar) / static_cast<double>(masses_.scaled(b_[j]));
      if (next) team_.store(next + j, static_cast<T>(damp_g_) * g_bar);
    };
    if (apart)
      costs_.iteration(ApartWork<Block, T>{work}, true, put);
    else
      costs_.iteration(TogetherWork<Block, T>{work}, false, put);
    team_.sync();
  }

  const AdjointArguments<T>& kernel_;
  const double eps_;
  Team team_;
  Costs costs_;
  Penalty x_, y_;
  double damp_f_, damp_g_;
  T k_;
  Masses masses_{0, 0, false};
  const T* a_;     // (rows,)
  const T* b_;     // (m,)
  T* f_bar_;       // (rows,)
  double* a_bar_;  // (rows,) summed over all iterations
  double* b_bar_;  // (m,)
};

template <typename T>
template <class Block>
OTLOSS_DEVICE void AdjointKernel<T>::operator()(Block& block) const {
  Adjoint<T, Block, StoredCosts<T, Block>> adjoint(block, *this);
  adjoint.run();
}

template <typename T>
template <class Block>
OTLOSS_DEVICE void MadeAdjointKernel<T>::operator()(Block& block) const {
  Adjoint<T, Block, MadeCosts<T, Block>> adjoint(block, *this);
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

// Every workspace that the three launches share.
template <typename T>
Pack<AdjointGroup<T>> with_workspace(const Context& context, const Pack<UnrolledGroup<T>>& pack) {
  Pack<AdjointGroup<T>> groups{};
  groups.count = pack.count;
  for (int g = 0; g < pack.count; ++g) {
    const UnrolledGroup<T>& p = pack.items[g];
    const int64_t iterations = p.batch * p.L;
    groups.items[g] = {p,
                       p.grad_C || !p.C ? context.scratch<T>(iterations * p.n) : nullptr,
                       context.scratch<T>(iterations * p.m),
                       context.scratch<T>(iterations * p.m),
                       context.scratch<int>(iterations),
                       context.scratch<double>(p.batch * 2)};
  }
  return groups;
}

template <typename T>
void make_factors(const Context& context, const Pack<AdjointGroup<T>>& pack, double eps) {
  Grid grid;
  int64_t batch = 0, iterations = 0;
  for (int g = 0; g < pack.count; ++g) {
    batch = std::max(batch, pack.items[g].batch);
    iterations = std::max(iterations, pack.items[g].L);
  }
  grid.x = std::min(iterations, kGridX);
  grid.y = std::min(batch, kGridY);
  grid.z = pack.count;
  grid.shared = block_sum_bytes<FactorKernel<T>::kThreads>(4);
  launch(context, FactorKernel<T>{pack, eps}, grid);
}

// All but the team.
template <typename T>
void fill_arguments(const Context& context, const Pack<AdjointGroup<T>>& pack, double eps,
                    Objective objective, AdjointArguments<T>* arguments) {
  const TeamArguments<T>& team = arguments->team;
  arguments->groups = pack;
  arguments->eps = eps;
  arguments->objective = objective;
  arguments->f_bar = context.scratch<T>(team.teams * team.rows);
  arguments->a_bar = context.scratch<double>(team.teams * team.rows);
  arguments->b_bar = context.scratch<double>(team.teams * team.columns);
}

template <typename T>
void stored_backward(const Context& context, const Pack<AdjointGroup<T>>& pack, double eps,
                     Objective objective) {
  AdjointKernel<T> adjoint{};
  const Grid team = plan_team<AdjointKernel<T>, T>(context, pack, &adjoint.arguments.team);
  fill_arguments(context, pack, eps, objective, &adjoint.arguments);
  launch(context, adjoint, team);
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

template <typename T>
void made_backward(const Context& context, const Pack<UnrolledGroup<T>>& given,
                   const Pack<AdjointGroup<T>>& pack, double eps, Objective objective,
                   Packer<T>& packer) {
  MadeAdjointKernel<T> adjoint{};
  TeamArguments<T>& team = adjoint.arguments.team;
  const Grid grid =
      plan_made_team<T>(context, pack, pack.items[0].made.points.d, &team, &adjoint.layout);
  fill_arguments(context, pack, eps, objective, &adjoint.arguments);
  adjoint.rows = context.scratch<T>(team.teams * 3 * team.rows);
  adjoint.columns = context.scratch<T>(team.teams * 3 * team.columns);
  for (int g = 0; g < pack.count; ++g) {
    const AdjointGroup<T>& p = pack.items[g];
    adjoint.made[g] = {packer(p.batch, p.n, p.m, p.made.points),
                       context.scratch<T>(p.batch * packed_stride(p.n)),
                       context.scratch<T>(p.batch * packed_stride(p.m)),
                       p.R,
                       p.g_bar,
                       p.w,
                       p.apart};
    if (objective == Objective::kTransport) continue;
    // There is no last plan, but its exponents are loaded with the points.
    const auto bytes = [&](int64_t count) {
      return p.batch * packed_stride(count) * static_cast<int64_t>(sizeof(T));
    };
    clear(context, adjoint.made[g].F, bytes(p.n));
    clear(context, adjoint.made[g].G, bytes(p.m));
  }
  launch(context, adjoint, grid);
  unrolled_point_sums(context, given, adjoint.made, eps, objective);
}

}  // namespace

template <typename T>
void unrolled_backward(const Context& context, const std::vector<UnrolledGroup<T>>& groups,
                       double eps, Objective objective) {
  Packer<T> packer(context);
  for_each_pack(groups, [&](const Pack<UnrolledGroup<T>>& given) {
    const Pack<AdjointGroup<T>> pack = with_workspace(context, given);
    make_factors(context, pack, eps);
    if (given.items[0].C != nullptr)
      stored_backward(context, pack, eps, objective);
    else
      made_backward(context, given, pack, eps, objective, packer);
  });
}

template void unrolled_backward(const Context&, const std::vector<UnrolledGroup<float>>&, double,
                                Objective);
template void unrolled_backward(const Context&, const std::vector<UnrolledGroup<double>>&, double,
                                Objective);

}  // namespace otloss::cuda
