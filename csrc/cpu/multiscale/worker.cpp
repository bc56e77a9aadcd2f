#include "cpu/multiscale/worker.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/math.h"
#include "cpu/parallel.h"

namespace otloss::cpu::multiscale {
namespace {

// The part that polynomials in place of exponentials change.
constexpr double kMomentError = 1e-5;

}  // namespace

template <typename F>
void Worker::for_each_leaf(const Pass& pass, int64_t begin, int64_t end, F&& leaf) {
  const Cloud &x = *pass.x.cloud, &y = *pass.y.cloud;
  pass_ = &pass, L_ = x.L, d_ = x.d;
  search_ =
      Search{pass.k, pass.x,  pass.y, pass.threshold, pass.slack, pass.moments, pass.single, 0, 0,
             0,      nullptr, 0,      nullptr,        0,          nullptr};
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
      supers_left_out_ += static_cast<double>(fast_exp2(bound_[T]) * y.mass[T]);
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
  left_out += (missing + found_.left_out_listed) * std::exp2(static_cast<double>(search_.reach));
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

void Worker::update(const Pass& pass, int64_t begin, int64_t end) {
  if (pass.columns) column.assign(pass.y.cloud->size, 0.0);
  groups.clear(), groups.per = pass.group ? pass.x.cloud->L / pass.group : 0;
  for_each_leaf(pass, begin, end, [&](int64_t I) { update_leaf(I); });
}

void Worker::update_leaf(int64_t I) {
  constexpr int kAttempts = 3;
  int attempts = 0;
  double guess[kMostLeaf];
  std::copy_n(pass_->F + I * L_, L_, guess);
  const auto begin = [&](bool anew) {
    find(I, anew, 0);
    if (direct_ < found_.kept) sum_moment_rows(moment_rows(I, false));
  };
  begin(false);
  for (int64_t first = 0; first < L_ && !interrupted();) {
    float sum[kTileRows];
    std::copy_n(row_.data() + first, kTileRows, sum);
    const TileRows rows = tile_rows(I, first, sum);
    sum_rows(rows);
    if (attempts < kAttempts && correct(I, first, sum)) {
      ++attempts;
      if (pass_->columns) flush(I);
      pass_->planes->fit_leaf(*pass_->x.cloud, pass_->k, pass_->F, I);
      pass_->planes->fit_super(*pass_->x.cloud, pass_->k, I / kSuper);
      super_ = -1;
      begin(true);
      continue;
    }
    take(I, first, sum, guess + first);
    if (pass_->columns) sum_columns(rows);
    first += kTileRows;
    if (pass_->group && pass_->group < L_ && first % pass_->group == 0) flush(I);
  }
  if (pass_->columns) flush(I);
}

// Whether a row's guess was poor and its sum tells a better one.
bool Worker::correct(int64_t I, int64_t first, const float* sum) {
  constexpr float kSome = 1e-30f, kMost = std::numeric_limits<float>::max();
  bool poor = false, known = true;
  const double* a = &pass_->x.cloud->w[I * L_ + first];
  for (int64_t r = 0; r < kTileRows; ++r) {
    if (!(a[r] > 0)) continue;
    poor = poor || !is_good_sum(sum[r]);
    known = known && sum[r] > kSome && sum[r] < kMost;
  }
  if (!poor || !known) return false;
  double* F = pass_->F + I * L_ + first;
  for (int64_t r = 0; r < kTileRows; ++r)
    if (a[r] > 0) F[r] -= std::log2(static_cast<double>(sum[r]));
  return true;
}

void Worker::take(int64_t I, int64_t first, const float* sum, const double* guess) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    const int64_t i = I * L_ + first + r;
    const double a = pass_->x.cloud->w[i], total = static_cast<double>(sum[r]);
    double& F = pass_->F[i];
    if (!(a > 0)) {
      F = 0, pass_->s[i] = 1;
    } else if (is_good_sum(total)) {
      F -= fast_log2(total);
      pass_->s[i] = fast_exp2(guess[r] - F);
      const double weight = pass_->tilt == 0 ? a : a * fast_exp2(pass_->tilt * F);
      w_[first + r] = static_cast<float>(weight / total);
      mass_ += weight;
    } else {
      dense_row(i, guess[r]);
    }
  }
}

// For a row whose sum cannot be trusted.
void Worker::dense_row(int64_t i, double guess) {
  const Cloud &x = *pass_->x.cloud, &y = *pass_->y.cloud;
  double& F = pass_->F[i];
  F = -log2_sum_of_all(x, i, y, pass_->k, 1, pass_->G, dense_);
  pass_->s[i] = fast_exp2(guess - F);
  const double weight = x.w[i] * fast_exp2(pass_->tilt * F);
  for (int64_t j = 0; pass_->columns && j < y.n; ++j) column[j] += weight * dense_[j];
}

// Rows whose weights are set go to the columns, once.
void Worker::flush(int64_t I) {
  if (direct_ < found_.kept) sum_moment_columns(moment_rows(I, false));
  if (pass_->group) add_groups();
  add_columns(-1);
  std::fill(sums_.begin(), sums_.end(), 0.0f);
  std::fill(w_.begin(), w_.end(), 0.0f);
  mass_ = 0;
}

void Worker::add_columns(int64_t skipped) {
  for (int64_t q = 0; q < found_.kept; ++q) {
    if (tiles_[q].leaf == skipped) continue;
    const float* from = sums_.data() + q * L_;
    double* to = column.data() + tiles_[q].leaf * L_;
    for (int64_t h = 0; h < L_; ++h) to[h] += static_cast<double>(from[h]);
  }
}

// The row group in sums_, but for what is next to nothing of it.
void Worker::add_groups() {
  constexpr double kLeast = 1e-5;
  const int64_t per = groups.per, size = L_ / per;
  for (int64_t q = 0; q < found_.kept; ++q) {
    float value[kMostLeaf / kTileRows], most = 0;
    for (int64_t p = 0; p < per; ++p) {
      value[p] = 0;
      for (int64_t h = p * size; h < (p + 1) * size; ++h) value[p] += sums_[q * L_ + h];
      most = std::max(most, value[p]);
    }
    if (static_cast<double>(most) < kLeast * mass_) continue;
    groups.leaf.push_back(tiles_[q].leaf);
    groups.value.insert(groups.value.end(), value, value + per);
  }
  groups.end.push_back(static_cast<int64_t>(groups.leaf.size())), groups.row.push_back(mass_);
}

void Worker::mirror(const Pass& pass, int64_t begin, int64_t end) {
  column.assign(pass.y.cloud->size, 0.0);
  for_each_leaf(pass, begin, end, [&](int64_t I) {
    const double* a = &pass.x.cloud->w[I * L_];
    find(I, false, I);
    for (int64_t i = 0; i < L_; ++i) w_[i] = static_cast<float>(a[i]);
    if (direct_ < found_.kept) {
      sum_moment_rows(moment_rows(I, false));
      sum_moment_columns(moment_rows(I, false));
    }
    for (int64_t first = 0; first < L_; first += kTileRows)
      sum_both(tile_rows(I, first, row_.data() + first));
    for (int64_t i = 0; i < L_; ++i) pass.s[I * L_ + i] = static_cast<double>(row_[i]);
    add_columns(I);
  });
  left_out *= 2;
}

void Worker::products(const Pass& pass, int64_t begin, int64_t end, bool symmetric,
                      const double* weight, double* sum, double* product) {
  const int64_t columns = pass.columns ? pass.y.cloud->size : 0;
  column.assign(columns, 0.0), column_product.assign(columns * pass.y.cloud->d, 0.0);
  for_each_leaf(pass, begin, end,
                [&](int64_t I) { products_leaf(I, symmetric, weight, sum, product); });
}

// Columns get sum w e (x - c) = sum w e u + (c_I - c) sum w e, c the centre of their leaf.
void Worker::products_leaf(int64_t I, bool symmetric, const double* weight, double* sum,
                           double* product) {
  const Cloud &x = *pass_->x.cloud, &y = *pass_->y.cloud;
  find(I, false, symmetric ? I : 0);
  row_product_.assign(d_ * L_, 0.0f);
  if (pass_->columns) products_.assign(found_.kept * d_ * L_, 0.0f);
  for (int64_t i = 0; i < L_; ++i) w_[i] = static_cast<float>(weight[I * L_ + i]);
  if (direct_ < found_.kept) {
    sum_moment_rows(moment_rows(I, true));
    if (pass_->columns) sum_moment_columns(moment_rows(I, true));
  }
  for (int64_t first = 0; first < L_; first += kTileRows) {
    float along[kTileRows * kMultiscaleDims] = {};
    TileProducts rows{tile_rows(I, first, row_.data() + first),
                      &x.u[I * d_ * L_],
                      &x.leaf.centre[I * d_],
                      y.leaf.centre.data(),
                      along,
                      pass_->columns ? products_.data() : nullptr};
    sum_products(rows);
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t c = 0; c < d_; ++c) row_product_[c * L_ + first + r] += along[r * d_ + c];
  }
  for (int64_t i = 0; i < L_; ++i) {
    sum[I * L_ + i] = static_cast<double>(row_[i]);
    for (int64_t c = 0; c < d_; ++c)
      product[(I * L_ + i) * d_ + c] = static_cast<double>(row_product_[c * L_ + i]);
  }
  if (!pass_->columns) return;
  add_columns(symmetric ? I : -1);
  for (int64_t q = 0; q < found_.kept; ++q) {
    const int64_t J = tiles_[q].leaf;
    for (int64_t c = 0; c < d_ && !(symmetric && J == I); ++c) {
      const double delta = x.leaf.centre[I * d_ + c] - y.leaf.centre[J * d_ + c];
      const float *of_sum = sums_.data() + q * L_, *from = products_.data() + (q * d_ + c) * L_;
      double* to = column_product.data() + (J * d_ + c) * L_;
      for (int64_t h = 0; h < L_; ++h)
        to[h] += static_cast<double>(from[h]) + delta * static_cast<double>(of_sum[h]);
    }
  }
}

void Worker::product(const Pass& pass, int64_t begin, int64_t end, const float* x,
                     const double* base, const double* factor, double* w) {
  if (pass.columns) column.assign(pass.y.cloud->size, 0.0);
  for_each_leaf(pass, begin, end, [&](int64_t I) {
    find(I, false, 0);
    if (direct_ < found_.kept) {  // 2^alpha and 2^beta are made with the sums
      sum_moment_rows(moment_rows(I, false));
      std::fill(row_.begin(), row_.end(), 0.0f);
      if (x) sum_moment_values(moment_rows(I, false), x);
    }
    for (int64_t first = 0; first < L_; first += kTileRows) {
      float sum[kTileRows];
      const TileRows rows = tile_rows(I, first, sum);
      sum_rows(rows);
      std::copy_n(row_.data() + first, kTileRows, sum);
      if (x) sum_values(rows, x);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t i = I * L_ + first + r;
        const double a = pass.x.cloud->w[i];
        w[i] = a > 0 ? (base ? base[i] : 0.0) + factor[i] * a * static_cast<double>(sum[r]) : 0.0;
        w_[first + r] = static_cast<float>(a * w[i]);
      }
      if (pass.columns) sum_columns(rows);
    }
    if (pass.columns) flush(I);
  });
}

void Worker::values(const Pass& pass, int64_t begin, int64_t end, int64_t count,
                    const float* values, double* out) {
  const int64_t n = pass.x.cloud->size, m = pass.y.cloud->size;
  for_each_leaf(pass, begin, end, [&](int64_t I) {
    find(I, false, 0);
    if (direct_ < found_.kept) sum_moment_rows(moment_rows(I, false));
    for (int64_t c = 0; c < count; ++c) {
      std::fill(row_.begin(), row_.end(), 0.0f);
      if (direct_ < found_.kept) sum_moment_values(moment_rows(I, false), values + c * m);
      for (int64_t i = 0; i < L_; ++i) out[c * n + I * L_ + i] = static_cast<double>(row_[i]);
    }
    for (int64_t first = 0; first < L_; first += kTileRows) {
      float sum[kTileRows] = {};
      sum_rows(tile_rows(I, first, sum));
      for (int64_t c = 0; c < count; ++c) {
        std::fill_n(sum, kTileRows, 0.0f);
        sum_values(tile_rows(I, first, sum), values + c * m);
        for (int64_t r = 0; r < kTileRows; ++r)
          out[c * n + I * L_ + first + r] += static_cast<double>(sum[r]);
      }
    }
  });
}

}  // namespace otloss::cpu::multiscale
