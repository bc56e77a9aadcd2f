#include "cpu/multiscale/moments.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "cpu/multiscale/lanes.h"

namespace otloss::cpu::multiscale {
namespace {

constexpr int kDegree = 4;

// Monomials of degree up to `degree` in d variables: those without the first, then those with it.
constexpr int monomials(int d, int degree) {
  return d == 0 || degree == 0 ? 1 : monomials(d - 1, degree) + monomials(d, degree - 1);
}

// sum += m times each monomial.
template <int kD, int kC, int kP, typename Float>
OTLOSS_INLINE void add_moments(const Float& m, const Float* u, Float*& sum) {
  if constexpr (kC == kD) {
    *sum++ += m;
  } else {
    add_moments<kD, kC + 1, kP>(m, u, sum);
    if constexpr (kP > 0) add_moments<kD, kC, kP - 1>(m * u[kC], u, sum);
  }
}

// result = the polynomial of these coefficients.
template <int kD, int kC, int kP, typename Float>
OTLOSS_INLINE void evaluate(const Float* u, const float*& coefficient, Float& result) {
  if constexpr (kC == kD) {
    result = Float{} + *coefficient++;
  } else {
    evaluate<kD, kC + 1, kP>(u, coefficient, result);
    if constexpr (kP > 0) {
      Float rest;
      evaluate<kD, kC, kP - 1>(u, coefficient, rest);
      result += u[kC] * rest;
    }
  }
}

// Powers of the monomials in their order.
template <int kD>
using Powers = std::array<int, kD>;
template <int kD>
void list_powers(int first, int degree, Powers<kD> power, std::vector<Powers<kD>>& all) {
  if (first == kD) return all.push_back(power);
  list_powers<kD>(first + 1, degree, power, all);
  if (degree == 0) return;
  ++power[first];
  list_powers<kD>(first, degree - 1, power, all);
}

// Coefficients of z^n, of e^z interpolated at Chebyshev's points of [-kMomentReach, kMomentReach].
std::vector<double> exponential(int degree) {
  const int nodes = degree + 1;  // the middle one of degree 4 is 0: exact where eps is large
  constexpr double kPi = 3.14159265358979323846;
  std::vector<std::vector<double>> T(degree + 1, std::vector<double>(degree + 1));
  T[0][0] = T[1][1] = 1;
  for (int n = 2; n <= degree; ++n)
    for (int q = 0; q <= n; ++q) T[n][q] = (q ? 2 * T[n - 1][q - 1] : 0) - T[n - 2][q];
  std::vector<double> result(degree + 1);
  for (int n = 0; n <= degree; ++n) {
    double along = 0;
    for (int q = 0; q < nodes; ++q) {
      const double angle = kPi * (q + 0.5) / nodes;
      along += std::exp(kMomentReach * std::cos(angle)) * std::cos(n * angle) * (n ? 2 : 1) / nodes;
    }
    for (int q = 0; q <= n; ++q) result[q] += along * T[n][q] / std::pow(kMomentReach, q);
  }
  return result;
}

// From moments to coefficients of the polynomial, and of that of the sum times a coordinate: these
// are small against how far mass goes, so that one degree less will do.
template <int kD>
struct Expansion {
  static constexpr int kTerms = monomials(kD, kDegree), kLow = monomials(kD, kDegree - 1);
  float factor[kTerms], low[kLow];
  int raised[kLow][kD];  // the monomial of `low` times a coordinate

  Expansion() {
    std::vector<Powers<kD>> all, lower;
    list_powers<kD>(0, kDegree, {}, all);
    list_powers<kD>(0, kDegree - 1, {}, lower);
    const std::vector<double> high = exponential(kDegree), less = exponential(kDegree - 1);
    for (int t = 0; t < kTerms; ++t) factor[t] = multinomial(all[t], high);
    for (int t = 0; t < kLow; ++t) {
      low[t] = multinomial(lower[t], less);
      for (int c = 0; c < kD; ++c) {
        Powers<kD> power = lower[t];
        ++power[c];
        raised[t][c] = static_cast<int>(std::find(all.begin(), all.end(), power) - all.begin());
      }
    }
  }

  static float multinomial(const Powers<kD>& powers, const std::vector<double>& coefficient) {
    double value = 1;
    int n = 0;
    for (const int power : powers)
      for (int q = 1; q <= power; ++q) ++n, value *= static_cast<double>(n) / q;
    return static_cast<float>(value * coefficient[n]);
  }
};

template <int kD, int kBytes>
struct Tiles {
  using Vector = Lanes<kBytes>;
  using Float = typename Vector::Float;
  using Terms = Expansion<kD>;
  const MomentRows& t;
  const Terms& expansion;

  OTLOSS_INLINE void load(const float* u, int64_t h, Float* z) const {
    for (int c = 0; c < kD; ++c) z[c] = t.scale * Vector::load(u + c * t.L + h);
  }

  // Coefficients from the points u of weight mass * w (null: 1).
  OTLOSS_INLINE void expand(const float* u, const float* mass, const float* w, float* of_sum,
                            float (*of_product)[Terms::kLow]) const {
    Float sum[Terms::kTerms] = {};
    for (int64_t h = 0; h < t.L; h += Vector::kCount) {
      Float z[kD], m = Vector::load(mass + h), *to = sum;
      if (w) m *= Vector::load(w + h);
      load(u, h, z);
      add_moments<kD, 0, kDegree>(m, z, to);
    }
    float moment[Terms::kTerms];
    for (int i = 0; i < Terms::kTerms; ++i) moment[i] = Vector::sum(sum[i]);
    for (int i = 0; i < Terms::kTerms; ++i) of_sum[i] = moment[i] * expansion.factor[i];
    for (int c = 0; of_product && c < kD; ++c)
      for (int i = 0; i < Terms::kLow; ++i)
        of_product[c][i] = moment[expansion.raised[i][c]] * expansion.low[i] / t.scale;
  }

  OTLOSS_INLINE void exponentiate(float* values) const {
    for (int64_t h = 0; h < t.L; h += Vector::kCount)
      Vector::store(values + h, Vector::exp2(Vector::load(values + h)));
  }

  // to += e times the polynomial, at the points u.
  OTLOSS_INLINE void add(const float* u, const float* mass, const float* of_sum, float* to) const {
    for (int64_t h = 0; h < t.L; h += Vector::kCount) {
      Float z[kD], value;
      load(u, h, z);
      const float* m = of_sum;
      evaluate<kD, 0, kDegree>(z, m, value);
      Vector::store(to + h, Vector::load(to + h) + Vector::load(mass + h) * value);
    }
  }

  // The same times coordinates of the other side, moved by `shift`.
  OTLOSS_INLINE void add_products(const float* u, const float* mass, const float* of_sum,
                                  const float (*of_product)[Terms::kLow], const float* shift,
                                  float* to) const {
    for (int64_t h = 0; h < t.L; h += Vector::kCount) {
      Float z[kD], all;
      load(u, h, z);
      const float* m = of_sum;
      if (shift) evaluate<kD, 0, kDegree>(z, m, all);
      for (int c = 0; c < kD; ++c) {
        Float value;
        m = of_product[c];
        evaluate<kD, 0, kDegree - 1>(z, m, value);
        if (shift) value += shift[c] * all;
        float* at = to + c * t.L + h;
        Vector::store(at, Vector::load(at) + Vector::load(mass + h) * value);
      }
    }
  }
};

template <int kD>
const Expansion<kD>& expansion() {
  static const Expansion<kD> made;
  return made;
}

// Calls each(tile, points of its leaf, alpha, beta).
template <int kD, typename F>
OTLOSS_INLINE void for_each_tile(const MomentRows& t, F&& each) {
  for (int64_t q = 0; q < t.tiles; ++q)
    if (t.tile[q].moments)
      each(q, t.v + t.tile[q].leaf * kD * t.L, t.alpha + q * t.L, t.beta + q * t.L);
}

template <int kD>
struct MomentRowSums {
  template <int kBytes>
  static OTLOSS_INLINE void run(const MomentRows& t, const Expansion<kD>& expansion) {
    const Tiles<kD, kBytes> tiles{t, expansion};
    using Terms = Expansion<kD>;
    for_each_tile<kD>(
        t, [&](int64_t q, const float* v, float* alpha, float* beta) OTLOSS_ALWAYS_INLINE {
          float of_sum[Terms::kTerms], of_product[kD][Terms::kLow], shift[kD];
          tiles.exponentiate(alpha), tiles.exponentiate(beta);
          tiles.expand(v, beta, nullptr, of_sum, t.row_product ? of_product : nullptr);
          tiles.add(t.u, alpha, of_sum, t.row);
          if (!t.row_product) return;
          for (int c = 0; c < kD; ++c)
            shift[c] = static_cast<float>(t.centres[t.tile[q].leaf * kD + c] - t.centre[c]);
          tiles.add_products(t.u, alpha, of_sum, of_product, shift, t.row_product);
        });
  }
};

template <int kD>
struct MomentColumnSums {
  template <int kBytes>
  static OTLOSS_INLINE void run(const MomentRows& t, const Expansion<kD>& expansion) {
    const Tiles<kD, kBytes> tiles{t, expansion};
    using Terms = Expansion<kD>;
    for_each_tile<kD>(t, [&](int64_t q, const float* v, const float* alpha,
                             const float* beta) OTLOSS_ALWAYS_INLINE {
      float of_sum[Terms::kTerms], of_product[kD][Terms::kLow];
      tiles.expand(t.u, alpha, t.w, of_sum, t.column_product ? of_product : nullptr);
      tiles.add(v, beta, of_sum, t.column + q * t.L);
      if (t.column_product)
        tiles.add_products(v, beta, of_sum, of_product, nullptr, t.column_product + q * kD * t.L);
    });
  }
};

template <int kD>
struct MomentValueSums {
  template <int kBytes>
  static OTLOSS_INLINE void run(const MomentRows& t, const Expansion<kD>& expansion,
                                const float* values) {
    const Tiles<kD, kBytes> tiles{t, expansion};
    for_each_tile<kD>(t, [&](int64_t q, const float* v, const float* alpha, const float* beta)
                             OTLOSS_ALWAYS_INLINE {
                               float of_sum[Expansion<kD>::kTerms];
                               tiles.expand(v, beta, values + q * t.L, of_sum, nullptr);
                               tiles.add(t.u, alpha, of_sum, t.row);
                             });
  }
};

template <template <int> class Body, typename... Arguments>
void run_moments(const MomentRows& rows, const Arguments&... more) {
  if (rows.d == 1) run_at_level<Body<1>>(rows, expansion<1>(), more...);
  if (rows.d == 2) run_at_level<Body<2>>(rows, expansion<2>(), more...);
  if (rows.d == 3) run_at_level<Body<3>>(rows, expansion<3>(), more...);
}

}  // namespace

void sum_moment_rows(const MomentRows& rows) { run_moments<MomentRowSums>(rows); }
void sum_moment_columns(const MomentRows& rows) { run_moments<MomentColumnSums>(rows); }
void sum_moment_values(const MomentRows& rows, const float* values) {
  run_moments<MomentValueSums>(rows, values);
}

}  // namespace otloss::cpu::multiscale
