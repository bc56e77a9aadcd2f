#include "cpu/multiscale/engine.h"

#include <algorithm>
#include <cmath>

#include "core/math.h"
#include "cpu/parallel.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu::multiscale {
namespace {

constexpr float kSlack = 9;  // log2 by which densities may rise before a list is of no use

// The share of pairs of runs of this number of points of which 2 R R' / eps, which bounds
// 2 <u, v> / eps, is at most this.
double share_within(const Cloud& X, const Cloud& Y, double eps, int64_t points, double most) {
  const std::vector<double> x = X.squared_radii(points), y = Y.squared_radii(points);
  int64_t within = 0;
  for (const double r : x)
    for (const double s : y) within += 2 / eps * std::sqrt(r * s) <= most;
  return static_cast<double>(within) / static_cast<double>(x.size() * y.size());
}

// From the sums of columns of weights w; whether all are good.
OTLOSS_SIMD bool update_columns(int64_t count, const double* w, const double* sum, const double* g,
                                double to_cost, double* gt, double* q) {
  int64_t poor = 0;
#pragma omp simd reduction(+ : poor)
  for (int64_t j = 0; j < count; ++j) {
    const double ratio = w[j] > 0 ? sum[j] / w[j] : 1.0;
    poor += is_good_sum(ratio) ? 0 : 1;
    q[j] = ratio, gt[j] = w[j] > 0 ? g[j] - to_cost * fast_log2(ratio) : 0.0;
  }
  return poor == 0;
}

}  // namespace

int64_t leaf_size(const Cloud& X, const Cloud& Y, double eps, const Precision& precision) {
  constexpr int64_t kLeaves = 32;  // at least
  constexpr double kWide = 8, kPays = 0.6;
  int64_t result = share_within(X, Y, eps, 32, kWide) > 0.5 ? 32 : 16;
  if (X.d > kMomentDims || !precision.moments()) return result;
  double least = kPays;  // time over that without moments
  for (int64_t L = kLeastMoments; L <= kMostLeaf && kLeaves * L <= std::min(X.n, Y.n); L *= 2) {
    const double share = share_within(X, Y, eps, L, kMomentReach);
    const double time = share * kMomentTime / static_cast<double>(L) + 1 - share;
    if (time < least) least = time, result = L;
  }
  return result;
}

Engine::Engine(const Cloud& X, const Cloud& Y, double rho_x, double rho_y, double eps,
               const Precision& precision)
    : X(X),
      Y(Y),
      x(X.size, X.w.data(), rho_x),
      y(Y.size, Y.w.data(), rho_y),
      precision_(precision),
      cost_range_{0, largest_square(X, Y)},
      moments_(X.L >= kLeastMoments && precision.moments()
                   ? static_cast<float>(kMomentReach * kLog2E)
                   : 0.0f),
      single_(static_cast<float>(precision.left_out / (2 * kTermRounding))),
      group_(X.L),
      threshold_(kShare * precision.left_out * 4),
      G_(Y.size),
      s_(X.size),
      column_(Y.size),
      tiles_(X.super.count, 1),
      rise_(X.leaf.count),
      risen_(Y.super.count) {
  while (X.L < kLeastMoments && group_ > kTileRows &&
         std::min(share_within(X, X, eps, group_, 1), share_within(Y, Y, eps, group_, 1)) < 0.5)
    group_ /= 2;
  constexpr int64_t kSupers = 4;  // of a part, at least
  workers_.resize(precision.split ? std::clamp<int64_t>(X.super.count / kSupers, 1, thread_count())
                                  : 1);
  share_out();
}

// Supers in parts of as many tiles as each other had in the last pass.
void Engine::share_out() {
  const int64_t parts = static_cast<int64_t>(workers_.size());
  double all = 0, sum = 0;
  for (const double tiles : tiles_) all += tiles;
  begin_.assign(1, 0);
  for (int64_t S = 0; S < X.super.count; ++S) {
    sum += tiles_[S];
    while (static_cast<int64_t>(begin_.size()) < parts &&
           sum * static_cast<double>(parts) >= all * static_cast<double>(begin_.size()))
      begin_.push_back(S + 1);
  }
  begin_.resize(parts + 1, X.super.count);
  begin_.back() = X.super.count;
}

Pass Engine::begin(double eps, const double* g, double* F, double* s) {
  const double k = kLog2E / eps;
  for (int64_t j = 0; j < Y.size; ++j) G_[j] = k * g[j];
  px_.fit(X, k, F, precision_.split);
  py_.fit(Y, k, G_.data(), precision_.split);
  return {k,
          {&X, &px_},
          {&Y, &py_},
          &px_,
          G_.data(),
          F,
          s,
          tiles_.data(),
          0,
          false,
          0,
          static_cast<float>(std::log2(threshold_)),
          0,
          moments_,
          single_,
          false,
          false,
          rise_.data(),
          risen_.data()};
}

// Lists serve leaves of x whose densities have risen little; where those of few supers of y have
// risen more than most, these are searched anew.
void Engine::choose_lists(double eps, const double* F, bool half, Pass& pass) {
  constexpr double kMore = 6;  // than the mean rise
  constexpr int64_t kFew = 8;  // an eighth
  listed_ = lists_.eps == eps && lists_.threshold == threshold_ && lists_.half == half;
  if (listed_) {
    std::vector<double> of_super(Y.super.count, -1e300);
    double mean = 0, base = -1e300;
    for (int64_t j = 0; j < Y.n; ++j) {
      const double rise = G_[j] - lists_.G[j];
      double& most = of_super[j / (kSuper * Y.L)];
      most = std::max(most, rise), mean += rise * Y.w[j] / y.mass;
    }
    int64_t searched = 0, poor = 0;
    for (int64_t T = 0; T < Y.super.count; ++T) {
      risen_[T] = of_super[T] > mean + kMore;
      if (risen_[T])
        ++searched;
      else
        base = std::max(base, of_super[T]);
    }
    for (int64_t I = 0; I < X.leaf.count; ++I) {
      double most = -1e300;
      for (int64_t i = I * X.L; i < std::min(X.n, (I + 1) * X.L); ++i)
        most = std::max(most, F[i] - lists_.F[i]);
      rise_[I] = static_cast<float>(most + base);
      poor += rise_[I] > kSlack;
    }
    listed_ = poor * kFew < X.leaf.count && searched * kFew <= Y.super.count;
  }
  pass.listed = listed_, pass.record = !listed_, pass.slack = kSlack;
  if (listed_) return;
  share_out();
  lists_.eps = eps, lists_.threshold = threshold_, lists_.half = half;
  lists_.F.assign(F, F + X.size), lists_.G = G_;
}

void Engine::finish(bool columns) {
  left_out_ = rounding_ = 0;
  for (const Worker& worker : workers_)
    left_out_ += worker.left_out / y.mass, rounding_ += worker.rounding / x.mass;
  if (!columns) return;
  std::fill(column_.begin(), column_.end(), 0.0);
  for (const Worker& worker : workers_)
    for (int64_t j = 0; j < Y.size; ++j) column_[j] += worker.column[j];
}

// Whether more was left out than may be: then it is less from now on.
bool Engine::repeats() {
  if (left_out_ <= precision_.left_out || threshold_ < kLeastThreshold || interrupted())
    return false;
  threshold_ /= kLess;
  return true;
}

// A shift reads all pairs a few times, each of them in about the time of one that is kept.
int64_t Engine::shift_passes() const {
  constexpr double kReadings = 2;
  double tiles = 1;
  for (const double kept : tiles_) tiles += kept;
  const double entries = tiles * static_cast<double>(X.L * X.L);
  const double pairs = static_cast<double>(X.n) * static_cast<double>(Y.n);
  return static_cast<int64_t>(kReadings * pairs / entries);
}

void Engine::expect(double rate) {
  while (rate * threshold_ * static_cast<double>(Y.leaf.count) > precision_.left_out &&
         threshold_ >= kLeastThreshold)
    threshold_ /= kLess;
}

void Engine::sweep(double eps, const double* g, double* F, double* s, bool columns) {
  Pass pass = begin(eps, g, F, s);
  choose_lists(eps, F, false, pass);
  pass.tilt = columns ? x.tilt(eps) : 0;
  pass.columns = columns, pass.group = columns && wants_groups_ ? group_ : 0;
  for_each_part(
      [&](Worker& worker, int64_t begin, int64_t end) { worker.update(pass, begin, end); });
  finish(columns);
}

// From every kEach-th super of x.
double Engine::effort(double eps, const double* F, const double* g) {
  constexpr int64_t kEach = 8;
  std::vector<double> fixed(F, F + X.size), tiles(X.super.count);
  Pass pass = begin(eps, g, fixed.data(), nullptr);
  pass.tiles = tiles.data();
  double entries = 0, rows = 0;
  for (int64_t S = 0; S < X.super.count && !interrupted(); S += kEach) {
    entries += workers_[0].effort(pass, S, S + 1);
    rows += static_cast<double>(std::min(X.n, (S + 1) * kSuper * X.L) - S * kSuper * X.L);
  }
  return entries / (rows * static_cast<double>(Y.n));
}

void Engine::iterate(double eps, const double* g, double* F, double* gt, double* q) {
  do sweep(eps, g, F, s_.data(), true);
  while (repeats());
  if (interrupted()) return;
  const double to_cost = eps / kLog2E;
  const auto update = [&](int64_t begin, int64_t end) {
    if (update_columns(end - begin, &Y.w[begin], &column_[begin], g + begin, to_cost, gt + begin,
                       q + begin))
      return;
    std::vector<double> parts;
    for (int64_t j = begin; j < end; ++j) {
      if (is_good_sum(q[j])) continue;
      if (interrupted()) return;
      gt[j] = -to_cost * log2_sum_of_all(Y, j, X, 1 / to_cost, x.damping(eps), F, parts);
      q[j] = fast_exp2((g[j] - gt[j]) / to_cost);
    }
  };
  constexpr int64_t kGrain = 4096;
  if (precision_.split)
    parallel_for(0, Y.size, kGrain, update);
  else
    update(0, Y.size);
}

void Engine::update_rows(double eps, const double* g, double* F, double* s) {
  do {
    if (precision_.symmetric && (sweep_mirrored(eps, g, F, s) || interrupted())) continue;
    sweep(eps, g, F, s, false);
  } while (repeats());
}

// False where a sum is that of a poor guess; F is then as it was.
bool Engine::sweep_mirrored(double eps, const double* g, double* F, double* s) {
  Pass pass = begin(eps, g, F, s);
  pass.y.planes = &px_;
  choose_lists(eps, F, true, pass);
  for_each_part(
      [&](Worker& worker, int64_t begin, int64_t end) { worker.mirror(pass, begin, end); });
  finish(true);
  if (interrupted()) return false;
  for (int64_t i = 0; i < X.n; ++i) {
    s[i] += column_[i] / X.w[i];
    if (!is_good_sum(s[i])) return false;
  }
  for (int64_t i = 0; i < X.size; ++i) {
    if (i >= X.n) s[i] = 1;
    F[i] -= fast_log2(s[i]);
  }
  return true;
}

void Engine::apply(double eps, const double* F, const double* g, int64_t count, const double* v,
                   double* out) {
  constexpr int64_t kColumns = 8;  // at once: each has a copy of what it is for a leaf of x
  std::vector<double> fixed(F, F + X.size);
  Pass pass = begin(eps, g, fixed.data(), nullptr);
  pass.scaled = true;
  for (int64_t c = 0; c < count; c += kColumns)
    for_each_part([&](Worker& worker, int64_t begin, int64_t end) {
      worker.values(pass, begin, end, std::min(kColumns, count - c), v + c * Y.size,
                    out + c * X.size);
    });
  finish(false);
}

void Engine::product(double eps, const double* F, const double* g, const double* x,
                     const double* base, const double* factor, double* w, double* y) {
  std::vector<double> fixed(F, F + X.size);
  Pass pass = begin(eps, g, fixed.data(), nullptr);
  pass.columns = y, pass.listed = listed_, pass.record = !listed_, pass.scaled = true;
  listed_ = true;
  for_each_part([&](Worker& worker, int64_t begin, int64_t end) {
    worker.product(pass, begin, end, x, base, factor, w);
  });
  finish(y);
  if (y) std::copy(column_.begin(), column_.end(), y);
}

// From P (1, y, |y|^2), the points counted from the middle of x.
std::vector<double> Engine::cost_sums(double eps, const double* F, const double* g) {
  const int64_t d = X.d, count = d + 2, n = X.size, m = Y.size;
  std::vector<double> v(count * m, 1.0), out(count * n), sums(n);
  std::fill(v.begin() + (d + 1) * m, v.end(), 0.0);
  for (int64_t c = 0; c < d; ++c)
    for (int64_t j = 0; j < m; ++j) {
      const double along = Y.X[j * d + c] - X.super.centre[c];
      v[(c + 1) * m + j] = along, v[(d + 1) * m + j] += along * along;
    }
  apply(eps, F, g, count, v.data(), out.data());
  for (int64_t i = 0; i < X.n; ++i) {
    double cost = out[(d + 1) * n + i];
    for (int64_t c = 0; c < d; ++c) {
      const double along = X.X[i * d + c] - X.super.centre[c];
      cost += along * (along * out[i] - 2 * out[(c + 1) * n + i]);
    }
    sums[i] = X.w[i] * cost;
  }
  return sums;
}

double Engine::transport(double eps, const double* F, const double* g) {
  double sum = 0;
  for (const double of_row : cost_sums(eps, F, g)) sum += of_row;
  return sum;
}

void Engine::displacements(double eps, const double* F, const double* g, const double* weight,
                           double* of_rows, double* of_columns) {
  const int64_t d = X.d, n = X.size, m = Y.size;
  const bool symmetric = precision_.symmetric;
  std::vector<double> fixed(F, F + n), row(n);
  Pass pass = begin(eps, g, fixed.data(), nullptr);
  if (symmetric) pass.y.planes = &px_;
  pass.columns = symmetric || of_columns;
  for_each_part([&](Worker& worker, int64_t begin, int64_t end) {
    worker.products(pass, begin, end, symmetric, weight, row.data(), of_rows);
  });
  for (int64_t i = 0; i < X.n; ++i)
    for (int64_t c = 0; c < d; ++c) {
      const double from = X.X[i * d + c] - X.leaf.centre[i / X.L * d + c];
      of_rows[i * d + c] = X.w[i] * (of_rows[i * d + c] - row[i] * from);
    }
  if (!pass.columns) return;
  double* product = symmetric ? of_rows : of_columns;
  if (!symmetric) std::fill_n(of_columns, m * d, 0.0);
  for (const Worker& worker : workers_)
    for (int64_t j = 0; j < Y.n; ++j) {
      const int64_t J = j / Y.L, h = j % Y.L;
      for (int64_t c = 0; c < d; ++c) {
        const double from = Y.X[j * d + c] - Y.leaf.centre[J * d + c];
        product[j * d + c] +=
            worker.column_product[(J * d + c) * Y.L + h] - worker.column[j] * from;
      }
    }
}

}  // namespace otloss::cpu::multiscale
