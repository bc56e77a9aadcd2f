#include "cpu/multiscale/worker.h"

#include <algorithm>
#include <cmath>

#include "core/math.h"
#include "cpu/parallel.h"

namespace otloss::cpu::multiscale {
namespace {

// The part that polynomials in place of exponentials change.
constexpr double kMomentError = 1e-5;

}  // namespace

void Worker::for_each_leaf(const Pass& pass, int64_t begin, int64_t end,
                           FunctionRef<void(int64_t)> leaf) {
  const Cloud &x = *pass.x.cloud, &y = *pass.y.cloud;
  pass_ = &pass, L_ = x.L, d_ = x.d;
  search_ = Search{
      pass.k, pass.x, pass.y, pass.threshold, pass.slack, pass.moments, pass.single, pass.scaled,
      0,      0,      0,      nullptr,        0,          nullptr,      0,           nullptr};
  left_out = rounding = 0, super_ = -1;
  bound_.resize(y.super.stride), U_.resize(d_ * L_);
  if (pass.record) {
    first_ = begin * kSuper;
    list_begin_.assign(1, 0), list_.clear(), list_left_out_.clear();
  }
  for (int64_t S = begin; S < end && !interrupted(); ++S) {
    pass.tiles[S] = 0;
    for (int64_t I = S * kSuper; I < std::min(x.leaf.count, (S + 1) * kSuper); ++I) {
      const float *u = &x.u[I * d_ * L_], twice = static_cast<float>(2 * pass.k);
      for (int64_t i = 0; i < d_ * L_; ++i) U_[i] = twice * u[i];
      leaf(I);
    }
  }
}

// log2 of how much more points [first, last) of x count in column sums than by their weights.
double Worker::tilted(int64_t first, int64_t last) const {
  double most = 0;
  for (int64_t i = first; pass_->tilt != 0 && i < last; ++i)
    most = std::max(most, pass_->tilt * pass_->F[i]);
  return most;
}

void Worker::find_supers(int64_t S, bool all) {
  if (super_ == S && all_ == all) return;
  const Cloud& cloud = *pass_->x.cloud;
  const Nodes &x = cloud.super, &y = pass_->y.cloud->super;
  super_ = S, all_ = all;
  supers_.clear(), supers_left_out_ = 0;
  if (!all && std::none_of(pass_->risen, pass_->risen + y.count, [](uint8_t r) { return r; }))
    return;
  bound_supers(search_, S, bound_.data());
  const int64_t points = kSuper * L_;
  const float more = static_cast<float>(tilted(S * points, std::min(cloud.n, (S + 1) * points)));
  const float reach = x.log_mass[S] + more, least = search_.threshold - search_.slack;
  for (int64_t T = 0; T < y.count; ++T) {
    if (!all && !pass_->risen[T]) continue;
    if (bound_[T] + std::max(reach, y.log_mass[T]) < least)
      supers_left_out_ += static_cast<double>(fast_exp2(bound_[T] + y.log_mass[T]));
    else
      supers_.push_back(static_cast<int32_t>(T));
  }
}

// The tiles of leaf I from leaf `least` on; anew: not from its list.
void Worker::find(int64_t I, bool anew, int64_t least) {
  const Cloud& x = *pass_->x.cloud;
  const bool listed = !anew && pass_->listed && pass_->rise[I] <= pass_->slack;
  const bool record = pass_->record && !anew;
  find_supers(I / kSuper, !listed);
  search_.I = I, search_.least = least;
  search_.reach =
      x.leaf.log_mass[I] + static_cast<float>(tilted(I * L_, std::min(x.n, (I + 1) * L_)));
  search_.supers = supers_.data(), search_.supers_count = static_cast<int64_t>(supers_.size());
  search_.list = nullptr, search_.list_count = 0, search_.risen = nullptr;
  if (listed) {
    const int64_t at = I - first_;
    search_.list = list_.data() + list_begin_[at];
    search_.list_count = list_begin_[at + 1] - list_begin_[at];
    search_.risen = pass_->risen;
  }
  const int64_t room = search_.list_count + search_.supers_count * kSuper + 1;
  if (static_cast<int64_t>(tiles_.size()) < room) {
    tiles_.resize(room);
    alpha_.resize(room * L_), beta_.resize(room * L_);
  }
  const int64_t used = static_cast<int64_t>(list_.size());
  if (record) list_.resize(used + room);
  found_ = Found{alpha_.data(),
                 beta_.data(),
                 tiles_.data(),
                 record ? list_.data() + used : nullptr,
                 0,
                 0,
                 0,
                 0,
                 0};
  find_partners(search_, found_);
  double missing = supers_left_out_ + found_.left_out;
  if (record) {
    list_.resize(used + found_.listed_count);
    list_begin_.push_back(static_cast<int64_t>(list_.size()));
    list_left_out_.push_back(missing);
  } else if (listed) {
    missing += list_left_out_[I - first_] * std::exp2(static_cast<double>(pass_->rise[I]));
  }
  missing_ = missing + found_.left_out_listed;
  left_out += missing_ * std::exp2(static_cast<double>(search_.reach));
  const double mass = static_cast<double>(x.leaf.mass[I]);
  rounding += mass * (kSumRounding + kTermRounding * static_cast<double>(found_.terms));
  pass_->tiles[I / kSuper] += static_cast<double>(found_.kept);
  direct_ = std::count_if(tiles_.begin(), tiles_.begin() + found_.kept,
                          [](const Tile& tile) { return !tile.moments; });
  if (direct_ < found_.kept)
    rounding += mass * kMomentError * static_cast<double>(found_.kept - direct_) /
                static_cast<double>(found_.kept);
  const size_t size = static_cast<size_t>(direct_ * L_ * kTileRows);
  if (e_.size() < size) e_.resize(size + size / 2);
  sums_.assign(found_.kept * L_, 0.0f);
  w_.assign(L_, 0.0f), row_.assign(L_, 0.0f);
}

TileRows Worker::tile_rows(int64_t I, int64_t first, float* sum) {
  const Cloud &x = *pass_->x.cloud, &y = *pass_->y.cloud;
  return {d_,
          L_,
          found_.kept,
          tiles_.data(),
          alpha_.data(),
          beta_.data(),
          U_.data(),
          y.u.data(),
          first,
          w_.data() + first,
          e_.data(),
          sum,
          sums_.data(),
          pass_->k,
          &x.X[(I * L_ + first) * d_],
          pass_->F + I * L_ + first,
          y.X.data(),
          pass_->G,
          y.log_w.data()};
}

MomentRows Worker::moment_rows(int64_t I, bool products) {
  const Cloud &x = *pass_->x.cloud, &y = *pass_->y.cloud;
  return {d_,
          L_,
          found_.kept,
          tiles_.data(),
          alpha_.data(),
          beta_.data(),
          static_cast<float>(std::sqrt(2 * pass_->k * kLn2)),
          &x.u[I * d_ * L_],
          y.u.data(),
          w_.data(),
          row_.data(),
          sums_.data(),
          &x.leaf.centre[I * d_],
          y.leaf.centre.data(),
          products ? row_product_.data() : nullptr,
          products ? products_.data() : nullptr};
}

double Worker::effort(const Pass& pass, int64_t begin, int64_t end) {
  double entries = 0;
  for_each_leaf(pass, begin, end, [&](int64_t I) {
    find(I, false, 0);
    const double of_moments = static_cast<double>(found_.kept - direct_) * kMomentTime;
    entries += static_cast<double>(L_) * (static_cast<double>(direct_ * L_) + of_moments);
  });
  return entries;
}

}  // namespace otloss::cpu::multiscale
