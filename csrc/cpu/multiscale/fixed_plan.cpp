// Passes at fixed potentials: products with the plan.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/multiscale/worker.h"

namespace otloss::cpu::multiscale {
namespace {

double largest(const double* v, int64_t count) {
  double most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, std::abs(v[i]));
  return most;
}

}  // namespace

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
  const double most = largest(weight + I * L_, L_), unit = most > 0 ? most : 1;
  for (int64_t i = 0; i < L_; ++i) w_[i] = static_cast<float>(weight[I * L_ + i] / unit);
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
  add_columns(symmetric ? I : -1, unit);
  for (int64_t q = 0; q < found_.kept; ++q) {
    const int64_t J = tiles_[q].leaf;
    for (int64_t c = 0; c < d_ && !(symmetric && J == I); ++c) {
      const double delta = x.leaf.centre[I * d_ + c] - y.leaf.centre[J * d_ + c];
      const float *of_sum = sums_.data() + q * L_, *from = products_.data() + (q * d_ + c) * L_;
      double* to = column_product.data() + (J * d_ + c) * L_;
      for (int64_t h = 0; h < L_; ++h)
        to[h] += unit * (static_cast<double>(from[h]) + delta * static_cast<double>(of_sum[h]));
    }
  }
}

// values (tiles, L): v (m,) of the tiles' columns, to go with their entries. Sums are of 2^-r of
// these; returns 2^r.
double Worker::gather(const double* v, float* values) const {
  constexpr double kMost = 1000;  // where all are 0
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t q = 0; q < found_.kept; ++q)
    if (const double size = largest(v + tiles_[q].leaf * L_, L_); size > 0)
      most = std::max(most, static_cast<double>(tiles_[q].exponent) + std::ceil(std::log2(size)));
  for (int64_t q = 0; q < found_.kept; ++q) {
    const double* from = v + tiles_[q].leaf * L_;
    const double unit = std::exp2(std::min(static_cast<double>(tiles_[q].exponent) - most, kMost));
    for (int64_t h = 0; h < L_; ++h) values[q * L_ + h] = static_cast<float>(unit * from[h]);
  }
  return std::exp2(most);
}

void Worker::product(const Pass& pass, int64_t begin, int64_t end, const double* x,
                     const double* base, const double* factor, double* w) {
  if (pass.columns) column.assign(pass.y.cloud->size, 0.0);
  constexpr double kApart = 1e10;  // sizes that single precision has room for
  for_each_leaf(pass, begin, end, [&](int64_t I) {
    find(I, false, 0);
    values_.resize(found_.kept * L_);
    const double unit = x ? gather(x, values_.data()) : 0;
    if (direct_ < found_.kept) {  // 2^alpha and 2^beta are made with the sums
      sum_moment_rows(moment_rows(I, false));
      std::fill(row_.begin(), row_.end(), 0.0f);
      if (x) sum_moment_values(moment_rows(I, false), values_.data());
    }
    double scale = 0;  // of the weights of rows
    for (int64_t first = 0; first < L_; first += kTileRows) {
      float sum[kTileRows];
      double weight[kTileRows];
      const TileRows rows = tile_rows(I, first, sum);
      sum_rows(rows);
      std::copy_n(row_.data() + first, kTileRows, sum);
      if (x) sum_values(rows, values_.data());
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t i = I * L_ + first + r;
        const double a = pass.x.cloud->w[i];
        const double of_x = factor[i] * a * unit * static_cast<double>(sum[r]);
        w[i] = a > 0 ? (base ? base[i] : 0.0) + of_x : 0.0;
        weight[r] = a * w[i];
      }
      const double most = largest(weight, kTileRows);
      if (most > 0 && !(most < kApart * scale && kApart * most > scale)) {
        if (scale > 0 && pass.columns) flush(I, scale);
        scale = most;
      }
      for (int64_t r = 0; r < kTileRows; ++r)
        w_[first + r] = scale > 0 ? static_cast<float>(weight[r] / scale) : 0.0f;
      if (pass.columns) sum_columns(rows);
    }
    if (pass.columns) flush(I, scale);
  });
}

void Worker::pairs(const Pass& pass, int64_t begin, int64_t end,
                   FunctionRef<void(int64_t, const Tile*, int64_t)> each) {
  for_each_leaf(pass, begin, end, [&](int64_t I) {
    find(I, false, 0);
    each(I, tiles_.data(), found_.kept);
  });
}

void Worker::values(const Pass& pass, int64_t begin, int64_t end, int64_t count, const double* v,
                    double* out) {
  const int64_t n = pass.x.cloud->size, m = pass.y.cloud->size;
  std::vector<double> unit(count);
  for_each_leaf(pass, begin, end, [&](int64_t I) {
    find(I, false, 0);
    const int64_t size = found_.kept * L_;
    values_.resize(count * size);
    if (direct_ < found_.kept) sum_moment_rows(moment_rows(I, false));
    for (int64_t c = 0; c < count; ++c) {
      unit[c] = gather(v + c * m, &values_[c * size]);
      std::fill(row_.begin(), row_.end(), 0.0f);
      if (direct_ < found_.kept) sum_moment_values(moment_rows(I, false), &values_[c * size]);
      for (int64_t i = 0; i < L_; ++i)
        out[c * n + I * L_ + i] = unit[c] * static_cast<double>(row_[i]);
    }
    for (int64_t first = 0; first < L_; first += kTileRows) {
      float sum[kTileRows] = {};
      sum_rows(tile_rows(I, first, sum));
      for (int64_t c = 0; c < count; ++c) {
        std::fill_n(sum, kTileRows, 0.0f);
        sum_values(tile_rows(I, first, sum), &values_[c * size]);
        for (int64_t r = 0; r < kTileRows; ++r)
          out[c * n + I * L_ + first + r] += unit[c] * static_cast<double>(sum[r]);
      }
    }
  });
}

}  // namespace otloss::cpu::multiscale
