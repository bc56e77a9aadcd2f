// The derivative of the solution, in the notation of csrc/cpu/gradient/implicit.cpp: with the
// marginals r, c of the plan P, divided by the dampings,
//     [diag(r)  P     ] (alpha)   (f_bar)
//     [P^T      diag(c)] (beta) = (g_bar),   C_bar_ij += P_ij (alpha_i + beta_j),
// by conjugate gradients on the Schur complement diag(c) - P^T diag(1/r) P, or, for a cloud against
// itself, on diag(r) + P.
//
// All of it is one launch. A team of blocks has one problem; each block makes its rows of the plan
// once, in shared memory or in global memory, and a product with the Schur complement is one pass
// over them (pass.cuh): row sums w = P x / r, then column sums P^T w. Vectors of the iteration are
// cut by columns, a thread touches its own entries only but for the direction, which all read. A
// step waits four times for the team: for the parts of the product, the curvature, the norm of the
// residual (with what the projection removes), and the next direction; scalars are the same in
// every thread, so all stop together.
//
// Vectors and sums are in double as on the CPU, whatever the plan's dtype. An entry is converted
// once per pass: 16 per clock and multiprocessor, as fast as the exponentials of a solve.
//
// Without cost matrices (made_sums.cuh) the plan is made again in every product, once for the rows
// and once for the columns, with one more wait in between, for w. What the points receive is one
// more launch, by the potentials and the solution (alpha, beta) that this one leaves.
#include <limits>

#include "core/penalty.h"
#include "core/rounding.h"
#include "cuda/gradient/implicit_plans.cuh"

namespace otloss::cuda {
namespace {

// As in csrc/cpu/gradient/implicit.cpp.
template <typename T>
OTLOSS_HOST_DEVICE constexpr double implicit_tolerance() {
  return sizeof(T) == 4 ? 1e-8 : 1e-13;
}
constexpr int kMaxCgIterations = 2000;

// ------------------------------------------------------------------------------ the system

template <typename T, class Block, class Plan>
class Implicit {
 public:
  using Team = typename Plan::Team;

  OTLOSS_DEVICE Implicit(Block& block, const typename Plan::Kernel& kernel)
      : kernel_(kernel.arguments),
        eps_(kernel.arguments.eps),
        team_(block, kernel.arguments.team),
        plan_(block, kernel, team_) {}

  OTLOSS_DEVICE void run() {
    team_.for_problems(kernel_.groups, [&](const ImplicitGroup<T>& p, int64_t batch) {
      place(p, batch);
      centre_potentials(p, batch);
      make_plan(p);
      seed(p, batch);
      if (p.penalties.balanced) fix_gauge();
      make_right(p);
      conjugate_gradients(p.penalties.balanced && !p.symmetric);
      if (team_.first_thread()) {
        double* status = p.status + batch * kImplicitStatusFields;
        status[kImplicitIterations] = iterations_;
        status[kImplicitResidual] = residual_;
      }
      back_substitute(p);
      if (p.grad_a) weight_gradients(p, batch);
      const bool transport = kernel_.objective == Objective::kTransport;
      plan_.finish(scale_, transport ? -scale_ / eps_ : 0.0, w_, beta_);
    });
  }

 private:
  OTLOSS_DEVICE static double quotient(double value, T weight) {
    return weight > T(0) ? value / static_cast<double>(weight) : 0.0;
  }
  // A cloud against itself is cut alike by rows and columns: column j is this row.
  OTLOSS_DEVICE int row_of(int j) const { return j - team_.first_column(); }

  OTLOSS_DEVICE void place(const ImplicitGroup<T>& p, int64_t batch) {
    const int64_t row = team_.first_row();
    x_ = {1 / p.penalties.rho_x}, y_ = {1 / p.penalties.rho_y};
    plan_.place(p, batch);
    scale_ = static_cast<double>(p.coefficient * p.grad[batch]);
    a_ = p.a + batch * p.n + row;
    b_ = p.b + batch * p.m;
    double* rows = kernel_.rows + team_.index() * kRowVectors * kernel_.team.rows + row;
    double* columns = kernel_.columns + team_.index() * kColumnVectors * kernel_.team.columns;
    for (double** const v : {&f_, &f_bar_, &a_bar_, &row_mass_, &inverse_r_, &base_, &w_})
      *v = rows, rows += kernel_.team.rows;
    for (double** const v :
         {&g_, &g_bar_, &b_bar_, &c_, &inverse_c_, &beta_, &rest_, &q_, &direction_})
      *v = columns, columns += kernel_.team.columns;
  }

  // The potentials, with <a, f> = <b, g> if balanced; one potential for a cloud against itself.
  OTLOSS_DEVICE void centre_potentials(const ImplicitGroup<T>& p, int64_t batch) {
    const T *f = p.f + batch * p.n + team_.first_row(), *g = p.g + batch * p.m;
    double sums[4] = {};  // of a, b, <a, f>, <b, g>
    team_.for_rows([&](int i) {
      const double a = static_cast<double>(a_[i]);
      sums[0] += a;
      if (a > 0) sums[2] += a * static_cast<double>(f[i]);
    });
    team_.for_columns([&](int j) {
      const double b = static_cast<double>(b_[j]);
      sums[1] += b;
      if (b > 0) sums[3] += b * static_cast<double>(g[j]);
    });
    team_.sum(sums);
    constexpr double kRoundoff = static_cast<double>(std::numeric_limits<T>::epsilon());
    mass_a_ = snapped_total(sums[0], kRoundoff), mass_b_ = snapped_total(sums[1], kRoundoff);
    const double shift = p.penalties.balanced ? (sums[3] - sums[2]) / (mass_a_ + mass_b_) : 0.0;
    team_.for_columns([&](int j) {
      const double other = p.symmetric ? static_cast<double>(f[row_of(j)]) : 0.0;
      const double own = static_cast<double>(g[j]);
      g_[j] = !(b_[j] > T(0)) ? 0.0 : p.symmetric ? 0.5 * (own + other) : own - shift;
    });
    team_.block_sync();
    team_.for_rows([&](int i) {
      const double own = static_cast<double>(f[i]) + shift;
      f_[i] = !(a_[i] > T(0)) ? 0.0 : p.symmetric ? g_[team_.first_column() + i] : own;
    });
    team_.block_sync();
  }

  // P, and its sums over the dampings.
  OTLOSS_DEVICE void make_plan(const ImplicitGroup<T>& p) {
    plan_.make(f_, g_);
    plan_.sums(false, f_, w_, [&](int j, double sum) { c_[j] = sum / y_.damping(eps_); });
    team_.for_rows([&](int i) {
      row_mass_[i] = w_[i] / x_.damping(eps_);
      inverse_r_[i] = row_mass_[i] != 0 ? 1 / row_mass_[i] : 0.0;
    });
    team_.block_sync();
    team_.for_columns([&](int j) {
      if (p.symmetric) c_[j] = row_mass_[row_of(j)];
      inverse_c_[j] = c_[j] != 0 ? 1 / c_[j] : 0.0;
    });
  }

  // The objective's derivatives at fixed potentials (regularized: all there are at the solution),
  // what <P, C> puts on the potentials, and what comes from outside.
  OTLOSS_DEVICE void seed(const ImplicitGroup<T>& p, int64_t batch) {
    const T* const grad_f = p.grad_f ? p.grad_f + batch * p.n + team_.first_row() : nullptr;
    const T* const grad_g = p.grad_g ? p.grad_g + batch * p.m : nullptr;
    const auto outside = [](const T* grad, T weight, int i) {
      return grad && weight > T(0) ? static_cast<double>(grad[i]) : 0.0;
    };
    if (kernel_.objective == Objective::kTransport) {
      plan_.sums(true, f_, w_, [&](int j, double sum) { q_[j] = scale_ * sum; });
      team_.for_rows([&](int i) {
        f_bar_[i] = outside(grad_f, a_[i], i) + scale_ * w_[i] / eps_;
        a_bar_[i] = quotient(scale_ * w_[i], a_[i]);
      });
      team_.for_columns([&](int j) {
        g_bar_[j] = outside(grad_g, b_[j], j) + q_[j] / eps_;
        b_bar_[j] = quotient(q_[j], b_[j]);
      });
      return;
    }
    const auto value = [&](const Penalty& side, double other_mass, double v) {
      return p.penalties.balanced ? v : side.weight_gradient(eps_, other_mass, v);
    };
    team_.for_rows([&](int i) {
      f_bar_[i] = outside(grad_f, a_[i], i);
      a_bar_[i] = scale_ * value(x_, mass_b_, f_[i]);
    });
    team_.for_columns([&](int j) {
      g_bar_[j] = outside(grad_g, b_[j], j);
      b_bar_[j] = scale_ * value(y_, mass_a_, g_[j]);
    });
  }

  // f and g are those with <a, f> = <b, g>: a gradient along (1, -1) is one on the weights.
  OTLOSS_DEVICE void fix_gauge() {
    double sums[1] = {0};
    team_.for_rows([&](int i) { sums[0] += f_bar_[i]; });
    team_.for_columns([&](int j) { sums[0] -= g_bar_[j]; });
    team_.sum(sums);
    const double excess = sums[0] / (mass_a_ + mass_b_);
    team_.for_rows([&](int i) {
      f_bar_[i] -= excess * static_cast<double>(a_[i]);
      a_bar_[i] -= excess * f_[i];
    });
    team_.for_columns([&](int j) {
      g_bar_[j] += excess * static_cast<double>(b_[j]);
      b_bar_[j] += excess * g_[j];
    });
  }

  // The right-hand side, to rest_, and the squared rounding error of its terms.
  OTLOSS_DEVICE void make_right(const ImplicitGroup<T>& p) {
    constexpr double kUnit = 4 * std::numeric_limits<double>::epsilon();
    double size[1] = {0};
    if (p.symmetric) {
      team_.block_sync();
      team_.for_columns([&](int j) {
        const double half = 0.5 * (f_bar_[row_of(j)] + g_bar_[j]);
        rest_[j] = g_bar_[j] = half;
        size[0] += inverse_c_[j] * half * half;
      });
    } else {
      team_.for_rows([&](int i) { base_[i] = f_bar_[i] * inverse_r_[i]; });
      team_.block_sync();
      plan_.product(nullptr, base_, nullptr, 1, w_, [&](int j, double sum) { q_[j] = sum; });
      team_.for_columns([&](int j) {
        rest_[j] = g_bar_[j] - q_[j];
        size[0] += inverse_c_[j] * (g_bar_[j] * g_bar_[j] + q_[j] * q_[j]);
      });
    }
    symmetric_ = p.symmetric;
    team_.sum(size);
    floor_ = kUnit * kUnit * size[0];
  }

  // q = A direction.
  OTLOSS_DEVICE void apply() {
    if (symmetric_) {
      plan_.row_product(direction_, w_);
      team_.for_columns([&](int j) { q_[j] = c_[j] * team_.load(direction_ + j) + w_[row_of(j)]; });
    } else {
      plan_.product(direction_, nullptr, inverse_r_, 1, w_,
                    [&](int j, double sum) { q_[j] = c_[j] * team_.load(direction_ + j) - sum; });
    }
  }

  // Solves A beta = rest_, preconditioned by the diagonal c. `project`: multiples of c are not in
  // the range of A.
  OTLOSS_DEVICE void conjugate_gradients(bool project) {
    double mass[2] = {0, 0};
    team_.for_columns([&](int j) { mass[0] += c_[j], mass[1] += rest_[j]; });
    team_.sum(mass);
    double norm[1] = {0};
    team_.for_columns([&](int j) {
      if (project) rest_[j] -= mass[1] / mass[0] * c_[j];
      norm[0] += inverse_c_[j] * rest_[j] * rest_[j];
      beta_[j] = 0;
      team_.store(direction_ + j, inverse_c_[j] * rest_[j]);
    });
    team_.sum(norm);  // and the direction is there
    const double first = norm[0], tol = implicit_tolerance<T>();
    double rz = first;
    iterations_ = 0;
    while (rz > tol * tol * first && rz > floor_ && iterations_ < kMaxCgIterations) {
      apply();
      double curvature[1] = {0};
      team_.for_columns([&](int j) { curvature[0] += team_.load(direction_ + j) * q_[j]; });
      team_.sum(curvature);
      if (!(curvature[0] > 0)) break;
      const double step = rz / curvature[0];
      double sums[2] = {0, 0};  // of the residual, and of its squares over c
      team_.for_columns([&](int j) {
        beta_[j] += step * team_.load(direction_ + j);
        rest_[j] -= step * q_[j];
        sums[0] += rest_[j];
        sums[1] += inverse_c_[j] * rest_[j] * rest_[j];
      });
      team_.sum(sums);
      const double mean = project ? sums[0] / mass[0] : 0.0;
      const double next = sums[1] - sums[0] * mean, turn = next / rz;
      team_.for_columns([&](int j) {
        rest_[j] -= mean * c_[j];
        const double old = team_.load(direction_ + j);
        team_.store(direction_ + j, inverse_c_[j] * rest_[j] + turn * old);
      });
      rz = next;
      ++iterations_;
      team_.sync();
    }
    residual_ = first <= floor_ ? 0.0 : sqrt(rz > 0 || rz != rz ? rz / first : 0.0);
  }

  // alpha, to w_, and what both put on the weights.
  OTLOSS_DEVICE void back_substitute(const ImplicitGroup<T>& p) {
    team_.for_columns([&](int j) { team_.store(direction_ + j, beta_[j]); });
    team_.sync();
    if (p.symmetric) {
      team_.for_columns([&](int j) {
        const double rest = eps_ * quotient(g_bar_[j] - c_[j] * beta_[j], b_[j]);
        w_[row_of(j)] = beta_[j];
        f_bar_[row_of(j)] = g_bar_[j];
        b_bar_[j] -= rest;
      });
    } else {
      plan_.product(direction_, base_, inverse_r_, -1, w_,
                    [&](int j, double sum) { b_bar_[j] -= eps_ * quotient(sum, b_[j]); });
    }
    team_.block_sync();
    team_.for_rows([&](int i) {  // (P beta)_i = f_bar_i - r_i alpha_i
      a_bar_[i] -= eps_ * quotient(f_bar_[i] - row_mass_[i] * w_[i], a_[i]);
    });
  }

  // Of (a_bar + t, b_bar - t), all gradients on weights of equal total, that with
  // <a, a_bar> = <b, b_bar>.
  OTLOSS_DEVICE void weight_gradients(const ImplicitGroup<T>& p, int64_t batch) {
    double sums[1] = {0};
    team_.for_rows([&](int i) { sums[0] -= static_cast<double>(a_[i]) * a_bar_[i]; });
    team_.for_columns([&](int j) { sums[0] += static_cast<double>(b_[j]) * b_bar_[j]; });
    team_.sum(sums);
    const double shift = p.penalties.balanced ? sums[0] / (mass_a_ + mass_b_) : 0.0;
    T *grad_a = p.grad_a + batch * p.n + team_.first_row(), *grad_b = p.grad_b + batch * p.m;
    team_.for_rows(
        [&](int i) { grad_a[i] = a_[i] > T(0) ? static_cast<T>(a_bar_[i] + shift) : T(0); });
    team_.for_columns(
        [&](int j) { grad_b[j] = b_[j] > T(0) ? static_cast<T>(b_bar_[j] - shift) : T(0); });
  }

  const ImplicitArguments<T>& kernel_;
  const double eps_;
  Team team_;
  Plan plan_;
  Penalty x_, y_;
  double scale_, mass_a_, mass_b_;
  bool symmetric_;
  const T* a_;                                // (rows,)
  const T* b_;                                // (m,)
  double *f_, *g_;                            // (rows,) (m,) the solution with <a, f> = <b, g>
  double *f_bar_, *g_bar_, *a_bar_, *b_bar_;  // (rows,) (m,) (rows,) (m,)
  double *row_mass_, *c_;                     // (rows,) (m,) sums of P over the dampings
  double *inverse_r_, *inverse_c_;            // (rows,) (m,) 0 for padding
  double *base_, *w_;                         // (rows,) f_bar / r; row sums, products, alpha
  double *beta_, *rest_, *q_, *direction_;    // (m,)
  double floor_, residual_;
  int iterations_;
};

}  // namespace

template <typename T>
template <class Block>
OTLOSS_DEVICE void ImplicitKernel<T>::operator()(Block& block) const {
  Implicit<T, Block, StoredPlan<T, Block>> implicit(block, *this);
  implicit.run();
}

template <typename T>
template <class Block>
OTLOSS_DEVICE void MadeImplicitKernel<T>::operator()(Block& block) const {
  Implicit<T, Block, MadePlan<T, Block>> implicit(block, *this);
  implicit.run();
}

namespace {

template <typename T>
void stored_backward(const Context& context, const Pack<ImplicitGroup<T>>& pack, double eps,
                     Objective objective) {
  ImplicitKernel<T> kernel{};
  TeamArguments<double>& team = kernel.arguments.team;
  const Grid grid = plan_team<ImplicitKernel<T>, T>(context, pack, &team);
  fill_arguments(context, pack, eps, objective, &kernel.arguments);
  kernel.published = context.scratch<T>(team.teams * team.columns);
  launch(context, kernel, grid);
}

template <typename T>
void made_backward(const Context& context, const Pack<ImplicitGroup<T>>& pack, double eps,
                   Objective objective, Packer<T>& packer) {
  MadeImplicitKernel<T> kernel{};
  const Grid grid = plan_made_team<T>(context, pack, &kernel.arguments.team, &kernel.layout);
  fill_arguments(context, pack, eps, objective, &kernel.arguments);
  for (int i = 0; i < pack.count; ++i) {
    const ImplicitGroup<T>& p = pack.items[i];
    kernel.plans[i] = {packer(p.batch, p.n, p.m, p.made.points),
                       context.scratch<T>(p.batch * packed_stride(p.n)),
                       context.scratch<T>(p.batch * packed_stride(p.m)),
                       context.scratch<T>(p.batch * p.n), context.scratch<T>(p.batch * p.m)};
  }
  launch(context, kernel, grid);
  implicit_point_sums(context, pack, kernel.plans, eps, objective);
}

}  // namespace

template <typename T>
void implicit_backward(const Context& context, const std::vector<ImplicitGroup<T>>& groups,
                       double eps, Objective objective) {
  // The sums over the plan take multiply-adds: with tensor cores P_ij would depend on which side is
  // first. The points' sums afterwards need not.
  Packer<T> packer(context,
                   groups.empty() ? TileKind::kFma : tiles_of(context, groups[0].made.points));
  for_each_pack(groups, [&](const Pack<ImplicitGroup<T>>& pack) {
    if (pack.items[0].C != nullptr)
      stored_backward(context, pack, eps, objective);
    else
      made_backward(context, pack, eps, objective, packer);
  });
}

template void implicit_backward(const Context&, const std::vector<ImplicitGroup<float>>&, double,
                                Objective);
template void implicit_backward(const Context&, const std::vector<ImplicitGroup<double>>&, double,
                                Objective);

}  // namespace otloss::cuda
