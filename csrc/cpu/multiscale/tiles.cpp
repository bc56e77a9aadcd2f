#include "cpu/multiscale/tiles.h"

#include "cpu/multiscale/lanes.h"

namespace otloss::cpu::multiscale {
namespace {

// Calls block(tile, columns begin, e of these) for each block of columns of each tile.
template <int kBytes, typename F>
OTLOSS_INLINE void for_each_block(const TileRows& t, F&& block) {
  constexpr int64_t kLanes = Lanes<kBytes>::kCount;
  float* e = t.e;
  for (int64_t q = 0; q < t.tiles; ++q) {
    if (t.tile[q].moments) continue;
    for (int64_t h = 0; h < t.L; h += kLanes, e += kTileRows * kLanes) block(q, h, e);
  }
}

// The exponents of wide tiles, to e.
template <int kD, int kBytes>
OTLOSS_INLINE void make_exponents(const TileRows& t) {
  constexpr int64_t kLanes = Lanes<kBytes>::kCount;
  for_each_block<kBytes>(t, [&](int64_t q, int64_t h, float* e) OTLOSS_ALWAYS_INLINE {
    if (!t.tile[q].wide) return;
    const int64_t j = t.tile[q].leaf * t.L + h;
    const double exponent = static_cast<double>(t.tile[q].exponent);
    for (int64_t r = 0; r < kTileRows; ++r)
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) {
        double square = 0;
        for (int c = 0; c < kD; ++c) {
          const double delta = t.x[r * kD + c] - t.y[(j + l) * kD + c];
          square += delta * delta;
        }
        const double z = t.F[r] + t.G[j + l] - t.k * square;
        e[r * kLanes + l] = static_cast<float>(z - exponent) + t.log_w[j + l];
      }
  });
}

// Calls each(r, e) for the entries of the rows from `offset` on in a block of columns.
template <int kD, int kBytes, int kRows, typename F>
OTLOSS_INLINE void for_each_entry(const TileRows& t, int64_t offset, int64_t q, int64_t h,
                                  const float* e, F&& each) {
  using Vector = Lanes<kBytes>;
  if (t.tile[q].wide) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      each(r, Vector::exp2(Vector::load(e + (offset + r) * Vector::kCount)));
    return;
  }
  const int64_t first = t.first + offset;
  const float* v = t.v + t.tile[q].leaf * kD * t.L + h;
  const float* alpha = t.alpha + q * t.L + first;
  typename Vector::Float y[kD];
  for (int c = 0; c < kD; ++c) y[c] = Vector::load(v + c * t.L);
  const auto beta = Vector::load(t.beta + q * t.L + h);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    auto z = beta + alpha[r];
    for (int c = 0; c < kD; ++c) z += t.U[c * t.L + first + r] * y[c];
    each(r, Vector::exp2(z));
  }
}

template <int kD>
struct Rows {
  template <int kBytes>
  static OTLOSS_INLINE void run(const TileRows& t) {
    using Vector = Lanes<kBytes>;
    typename Vector::Float sum[kTileRows] = {};
    make_exponents<kD, kBytes>(t);
    for_each_block<kBytes>(t, [&](int64_t q, int64_t h, float* e) OTLOSS_ALWAYS_INLINE {
      for_each_entry<kD, kBytes, kTileRows>(
          t, 0, q, h, e, [&](int r, const typename Vector::Float& value) OTLOSS_ALWAYS_INLINE {
            Vector::store(e + r * Vector::kCount, value);
            sum[r] += value;
          });
    });
    for (int r = 0; r < kTileRows; ++r) t.row[r] += Vector::sum(sum[r]);
  }
};

struct Columns {
  template <int kBytes>
  static OTLOSS_INLINE void run(const TileRows& t) {
    using Vector = Lanes<kBytes>;
    for_each_block<kBytes>(t, [&](int64_t q, int64_t h, const float* e) OTLOSS_ALWAYS_INLINE {
      float* to = t.column + q * t.L + h;
      auto sum = Vector::load(to);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) sum += t.w[r] * Vector::load(e + r * Vector::kCount);
      Vector::store(to, sum);
    });
  }
};

template <int kD>
struct Both {
  template <int kBytes>
  static OTLOSS_INLINE void run(const TileRows& t) {
    using Vector = Lanes<kBytes>;
    typename Vector::Float sum[kTileRows] = {};
    make_exponents<kD, kBytes>(t);
    for_each_block<kBytes>(t, [&](int64_t q, int64_t h, const float* e) OTLOSS_ALWAYS_INLINE {
      float* to = t.column + q * t.L + h;
      auto column = Vector::load(to);
      for_each_entry<kD, kBytes, kTileRows>(
          t, 0, q, h, e, [&](int r, const typename Vector::Float& value) OTLOSS_ALWAYS_INLINE {
            column += t.w[r] * value;
            sum[r] += value;
          });
      Vector::store(to, column);
    });
    for (int r = 0; r < kTileRows; ++r) t.row[r] += Vector::sum(sum[r]);
  }
};

struct Values {
  template <int kBytes>
  static OTLOSS_INLINE void run(const TileRows& t, const float* values) {
    using Vector = Lanes<kBytes>;
    typename Vector::Float sum[kTileRows] = {};
    for_each_block<kBytes>(t, [&](int64_t q, int64_t h, const float* e) OTLOSS_ALWAYS_INLINE {
      const auto value = Vector::load(values + q * t.L + h);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) sum[r] += value * Vector::load(e + r * Vector::kCount);
    });
    for (int r = 0; r < kTileRows; ++r) t.row[r] += Vector::sum(sum[r]);
  }
};

struct Groups {
  template <int kBytes>
  static OTLOSS_INLINE void run(const TileGroups& t, int64_t* const& count) {
    using Vector = Lanes < kBytes<4 * kTileRows ? kBytes : 4 * kTileRows>;  // of least groups
    const int64_t per = t.L / t.size;
    const float* from = t.sums;
    for (int64_t q = 0; q < t.tiles; ++q) {
      float *value = t.value + *count * per, most = 0;
      for (int64_t p = 0; p < per; ++p) {
        typename Vector::Float sum{};
        for (int64_t h = 0; h < t.size; h += Vector::kCount, from += Vector::kCount)
          sum += Vector::load(from);
        value[p] = Vector::sum(sum);
        most = most < value[p] ? value[p] : most;
      }
      if (most < t.least) continue;
      t.leaf[(*count)++] = t.tile[q].leaf;
    }
  }
};

// Few rows at once, so that their sums stay in registers.
template <int kD>
struct Products {
  static constexpr int kRows = kD <= 3 ? 4 : 2;

  template <int kBytes>
  static OTLOSS_INLINE void run(const TileProducts& t) {
    make_exponents<kD, kBytes>(t);
    for (int64_t r = 0; r < kTileRows; r += kRows) {
      if (t.column_product)
        some<kBytes, true>(t, r);
      else
        some<kBytes, false>(t, r);
    }
  }

  template <int kBytes, bool kColumns>
  static OTLOSS_INLINE void some(const TileProducts& t, int64_t offset) {
    using Vector = Lanes<kBytes>;
    using Float = typename Vector::Float;
    const float *w = t.w + offset, *u = t.u + t.first + offset;
    Float sum[kRows] = {}, product[kRows][kD] = {};
    float wu[kRows][kD];
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kD; ++c) wu[r][c] = w[r] * u[c * t.L + r];
    for_each_block<kBytes>(t, [&](int64_t q, int64_t h, const float* e) OTLOSS_ALWAYS_INLINE {
      const int64_t J = t.tile[q].leaf;
      Float y[kD], along[kD] = {}, column = {};
      for (int c = 0; c < kD; ++c)
        y[c] = Vector::load(t.v + (J * kD + c) * t.L + h) +
               static_cast<float>(t.centres[J * kD + c] - t.centre[c]);
      for_each_entry<kD, kBytes, kRows>(t, offset, q, h, e,
                                        [&](int r, const Float& value) OTLOSS_ALWAYS_INLINE {
                                          sum[r] += value;
                                          for (int c = 0; c < kD; ++c)
                                            product[r][c] += value * y[c];
                                          if constexpr (!kColumns) return;
                                          column += w[r] * value;
                                          for (int c = 0; c < kD; ++c) along[c] += wu[r][c] * value;
                                        });
      if constexpr (!kColumns) return;
      float* to = t.column + q * t.L + h;
      Vector::store(to, Vector::load(to) + column);
      for (int c = 0; c < kD; ++c) {
        float* at = t.column_product + (q * kD + c) * t.L + h;
        Vector::store(at, Vector::load(at) + along[c]);
      }
    });
    for (int r = 0; r < kRows; ++r) {
      t.row[offset + r] += Vector::sum(sum[r]);
      for (int c = 0; c < kD; ++c)
        t.row_product[(offset + r) * kD + c] += Vector::sum(product[r][c]);
    }
  }
};

}  // namespace

void sum_rows(const TileRows& rows) { run_in_dimension<Rows>(rows.d, rows); }
void sum_columns(const TileRows& rows) { run_at_level<Columns>(rows); }
void sum_both(const TileRows& rows) { run_in_dimension<Both>(rows.d, rows); }
void sum_values(const TileRows& rows, const float* values) { run_at_level<Values>(rows, values); }
int64_t sum_groups(const TileGroups& groups) {
  int64_t count = 0, *const to = &count;
  run_at_level<Groups>(groups, to);
  return count;
}
void sum_products(const TileProducts& rows) { run_in_dimension<Products>(rows.d, rows); }

}  // namespace otloss::cpu::multiscale
