// Passes at fixed potentials: products with the plan.
#include <algorithm>

#include "cpu/multiscale/worker.h"

namespace otloss::cpu::multiscale {

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

void Worker::pairs(const Pass& pass, int64_t begin, int64_t end,
                   FunctionRef<void(int64_t, const Tile*, int64_t)> each) {
  for_each_leaf(pass, begin, end, [&](int64_t I) {
    find(I, false, 0);
    each(I, tiles_.data(), found_.kept);
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
