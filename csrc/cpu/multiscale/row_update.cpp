// Passes that update rows, and what they give to the columns.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/math.h"
#include "cpu/multiscale/worker.h"
#include "cpu/parallel.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu::multiscale {
namespace {

// of_rows (kTileRows,): log2 of positive sums.
OTLOSS_SIMD void log2_of_sums(const float* sum, double* of_rows) {
#pragma omp simd
  for (int64_t r = 0; r < kTileRows; ++r) of_rows[r] = fast_log2(static_cast<double>(sum[r]));
}

// Of columns (leaves, L), those of the tiles, but for the leaf `skipped`, += unit times sums
// (tiles, L).
OTLOSS_SIMD void add_to_columns(int64_t L, int64_t tiles, const Tile* tile, const float* sums,
                                int64_t skipped, double unit, double* columns) {
  for (int64_t q = 0; q < tiles; ++q) {
    if (tile[q].leaf == skipped) continue;
    const float* from = sums + q * L;
    double* to = columns + tile[q].leaf * L;
    const double scale = tile[q].exponent == 0 ? unit : unit * std::exp2(tile[q].exponent);
#pragma omp simd
    for (int64_t h = 0; h < L; ++h) to[h] += scale * static_cast<double>(from[h]);
  }
}

}  // namespace

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
      if (pass_->columns) flush(I, 1);
      pass_->planes->fit_leaf(*pass_->x.cloud, pass_->k, pass_->F, I);
      pass_->planes->fit_super(*pass_->x.cloud, pass_->k, I / kSuper);
      super_ = -1;
      begin(true);
      continue;
    }
    take(I, first, sum, guess + first);
    if (pass_->columns) sum_columns(rows);
    first += kTileRows;
    if (pass_->group && pass_->group < L_ && first % pass_->group == 0) flush(I, 1);
  }
  if (pass_->columns) flush(I, 1);
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
  double change[kTileRows];
  log2_of_sums(sum, change);
  for (int64_t r = 0; r < kTileRows; ++r) {
    const int64_t i = I * L_ + first + r;
    const double a = pass_->x.cloud->w[i], total = static_cast<double>(sum[r]);
    double& F = pass_->F[i];
    if (!(a > 0)) {
      F = 0, pass_->s[i] = 1;
    } else if (is_good_sum(total)) {
      pass_->s[i] = F == guess[r] ? total : total * fast_exp2(guess[r] - F);
      F -= change[r];
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

// Rows whose weights are set, over `unit`, go to the columns, once.
void Worker::flush(int64_t I, double unit) {
  if (direct_ < found_.kept) sum_moment_columns(moment_rows(I, false));
  if (pass_->group) add_groups();
  add_columns(-1, unit);
  std::fill(sums_.begin(), sums_.end(), 0.0f);
  std::fill(w_.begin(), w_.end(), 0.0f);
  mass_ = 0;
}

void Worker::add_columns(int64_t skipped, double unit) {
  add_to_columns(L_, found_.kept, tiles_.data(), sums_.data(), skipped, unit, column.data());
}

// The row group in sums_, but for what is next to nothing of it.
void Worker::add_groups() {
  constexpr double kLeast = 1e-5;
  const int64_t per = groups.per, used = static_cast<int64_t>(groups.leaf.size());
  groups.leaf.resize(used + found_.kept), groups.value.resize((used + found_.kept) * per);
  const int64_t added = sum_groups({L_, L_ / per, found_.kept, tiles_.data(), sums_.data(),
                                    static_cast<float>(kLeast * mass_), &groups.leaf[used],
                                    &groups.value[used * per]});
  groups.leaf.resize(used + added), groups.value.resize((used + added) * per);
  groups.end.push_back(used + added), groups.row.push_back(mass_);
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
    add_columns(I, 1);
  });
  left_out *= 2;
}

}  // namespace otloss::cpu::multiscale
