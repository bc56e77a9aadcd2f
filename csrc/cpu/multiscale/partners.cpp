#include "cpu/multiscale/partners.h"

#include <algorithm>
#include <cmath>

#include "cpu/multiscale/lanes.h"

namespace otloss::cpu::multiscale {
namespace {

// Nodes with the planes of their potential.
struct Bounded {
  const Nodes* nodes;
  const float *top, *slope;
};
Bounded leaves(const View& side) {
  return {&side.cloud->leaf, side.planes->top.data(), side.planes->slope.data()};
}
Bounded supers(const View& side) {
  return {&side.cloud->super, side.planes->super_top.data(), side.planes->super_slope.data()};
}

// The largest log2 density of node I of x against nodes [first, first + kSuper) of y, from boxes.
template <int kD>
OTLOSS_INLINE void bound_nodes(float k, const Bounded& x, int64_t I, const Bounded& y,
                               int64_t first, float* bound) {
  const Nodes &from = *x.nodes, &to = *y.nodes;
  const float top = x.top[I], radius = from.radius[I];
  double at[kD];
  float half[kD], slope[kD];
  for (int c = 0; c < kD; ++c) {
    at[c] = from.at[c * from.stride + I], half[c] = from.half[c * from.stride + I];
    slope[c] = x.slope[c * from.stride + I];
  }
#pragma omp simd
  for (int64_t j = 0; j < kSuper; ++j) {
    float distance = 0, box_x = 0, ball_x = 0, box_y = 0, ball_y = 0, halves = 0;
    for (int c = 0; c < kD; ++c) {
      const int64_t at_j = c * to.stride + first + j;
      const float delta = static_cast<float>(at[c] - to.at[at_j]), half_y = to.half[at_j];
      const float tilt_x = slope[c] - 2 * k * delta, tilt_y = y.slope[at_j] + 2 * k * delta;
      distance += delta * delta;
      box_x += std::abs(tilt_x) * half[c], ball_x += tilt_x * tilt_x;
      box_y += std::abs(tilt_y) * half_y, ball_y += tilt_y * tilt_y;
      halves += half[c] * half_y;
    }
    const float other = y.top[first + j], radius_y = to.radius[first + j];
    const float in_x = std::sqrt(ball_x) * radius, in_y = std::sqrt(ball_y) * radius_y;
    const float radii = radius * radius_y, both = halves < radii ? halves : radii;
    const float tilts = (box_x < in_x ? box_x : in_x) + (box_y < in_y ? box_y : in_y);
    // Of what is rounded; a tilt is small where two numbers of at most k (distance + radius^2)
    // cancel.
    const float size = std::abs(top) + std::abs(other) + tilts +
                       k * (distance + radius * radius + radius_y * radius_y);
    bound[j] = top + other - k * distance + tilts + 2 * k * both + kBoundRounding * size;
  }
}

template <int kD>
struct BoundSupers {
  template <int kBytes>
  static OTLOSS_INLINE void run(const Search& search, int64_t S, float* bound) {
    const Bounded x = supers(search.x), y = supers(search.y);
    for (int64_t first = 0; first < y.nodes->stride; first += kSuper)
      bound_nodes<kD>(static_cast<float>(search.k), x, S, y, first, bound + first);
  }
};

// What pairs read of the leaf of x.
template <int kD>
struct RowLeaf {
  double base, centre[kD], slope[kD];
  float half[kD], radius;
  const float *u, *rest;  // (d, L), (L,)

  OTLOSS_INLINE explicit RowLeaf(const Search& search) {
    const Cloud& x = *search.x.cloud;
    const Planes& p = *search.x.planes;
    const int64_t I = search.I;
    base = p.base[I], radius = x.leaf.radius[I];
    u = &x.u[I * kD * x.L], rest = &p.rest[I * x.L];
    for (int c = 0; c < kD; ++c) {
      centre[c] = x.leaf.centre[I * kD + c], half[c] = x.leaf.half[c * x.leaf.stride + I];
      slope[c] = static_cast<double>(p.slope[c * x.leaf.stride + I]);
    }
  }
};

// log2 of a pair's largest entry.
template <int kD, int kBytes>
OTLOSS_INLINE float largest(const Search& search, const RowLeaf<kD>& row, const float* v,
                            const float* alpha, const float* beta) {
  using Vector = Lanes<kBytes>;
  const int64_t L = search.y.cloud->L;
  const float twice = static_cast<float>(2 * search.k);
  auto most = typename Vector::Float{} + kNone;
  for (int64_t i = 0; i < L; ++i)
    for (int64_t h = 0; h < L; h += Vector::kCount) {
      auto z = Vector::load(beta + h) + alpha[i];
      for (int c = 0; c < kD; ++c) z += twice * row.u[c * L + i] * Vector::load(v + c * L + h);
      most = z > most ? z : most;
    }
  return Vector::max(most);
}

// The pair with leaf J, alpha and beta to their next place; kept if it can hold enough.
template <int kD, int kBytes>
OTLOSS_INLINE void add_pair(const Search& search, const RowLeaf<kD>& row, int64_t J, Found& found) {
  using Vector = Lanes<kBytes>;
  const Cloud& y = *search.y.cloud;
  const Planes& q = *search.y.planes;
  const int64_t L = y.L;
  double distance = 0;
  float tilt_x[kD], tilt_y[kD], halves = 0, ball_x = 0, ball_y = 0;
  for (int c = 0; c < kD; ++c) {
    const int64_t at = c * y.leaf.stride + J;
    const double delta = row.centre[c] - y.leaf.centre[J * kD + c], tilt = 2 * search.k * delta;
    distance += delta * delta;
    tilt_x[c] = static_cast<float>(row.slope[c] - tilt);
    tilt_y[c] = static_cast<float>(static_cast<double>(q.slope[at]) + tilt);
    halves += row.half[c] * y.leaf.half[at];
    ball_x += tilt_x[c] * tilt_x[c], ball_y += tilt_y[c] * tilt_y[c];
  }
  const float shift = static_cast<float>(row.base + q.base[J] - search.k * distance);
  const float radius = y.leaf.radius[J];
  float *alpha = found.alpha + found.kept * L, *beta = found.beta + found.kept * L;
  const float *v = &y.u[J * kD * L], *rest = &q.rest[J * L], *log_w = &y.log_w[J * L];
  auto most_alpha = typename Vector::Float{} + kNone, most_beta = most_alpha;
  for (int64_t h = 0; h < L; h += Vector::kCount) {
    auto s = Vector::load(row.rest + h), r = Vector::load(rest + h);
    for (int c = 0; c < kD; ++c) {
      s += tilt_x[c] * Vector::load(row.u + c * L + h);
      r += tilt_y[c] * Vector::load(v + c * L + h);
    }
    Vector::store(alpha + h, s), Vector::store(beta + h, r + (shift + Vector::load(log_w + h)));
    most_alpha = s > most_alpha ? s : most_alpha, most_beta = r > most_beta ? r : most_beta;
  }
  const float most_x = Vector::max(most_alpha), most_y = Vector::max(most_beta);
  constexpr float kApart = 60;  // log2 that the powers of either side alone may reach
  constexpr float kLoose = 16;  // log2 by which a bound may be above the largest entry
  const float inner = 2 * static_cast<float>(search.k) * std::min(halves, row.radius * radius);
  const float terms = std::max({inner, std::sqrt(ball_x) * row.radius, std::sqrt(ball_y) * radius});
  const float bound = pair_bound(shift, most_x, most_y, inner, terms);
  const float held = bound + std::max(search.reach, y.leaf.log_mass[J]);
  const bool listed = held >= search.threshold - search.slack;
  if (listed && found.listed) found.listed[found.listed_count++] = static_cast<int32_t>(J);
  if (held >= search.threshold) {
    const bool wide = terms > search.single;
    const bool moments = !wide && inner < search.moments && std::max(most_x, most_y) < kApart;
    if (!wide) found.terms = std::max(found.terms, terms);
    float exponent = 0;
    if (search.scaled) {
      exponent = std::ceil(inner > kLoose ? largest<kD, kBytes>(search, row, v, alpha, beta)
                                          : bound + y.leaf.log_mass[J]);
      for (int64_t h = 0; h < L; ++h) beta[h] -= exponent;
    }
    found.tiles[found.kept++] = {static_cast<int32_t>(J), moments, wide, exponent};
    return;
  }
  const float part = fast_exp2(bound + y.leaf.log_mass[J]);
  (listed ? found.left_out_listed : found.left_out) += static_cast<double>(part);
}

template <int kD>
struct FindPartners {
  template <int kBytes>
  static OTLOSS_INLINE void run(const Search& search, Found* const& result) {
    Found found = *result;
    const RowLeaf<kD> row(search);
    for (int64_t i = 0; i < search.list_count; ++i)
      if (!search.risen || !search.risen[search.list[i] / kSuper])
        add_pair<kD, kBytes>(search, row, search.list[i], found);
    const Bounded x = leaves(search.x), y = leaves(search.y);
    const float least = search.threshold - search.slack;
    float bound[kSuper];
    for (int64_t s = 0; s < search.supers_count; ++s) {
      const int64_t first = search.supers[s] * kSuper;
      const int32_t skip = static_cast<int32_t>(search.least - std::min(search.least, first));
      if (skip >= kSuper) continue;
      // Leaves that only fill a vector are none, even where potentials are infinite.
      const int32_t past = static_cast<int32_t>(std::min(kSuper, y.nodes->count - first));
      bound_nodes<kD>(static_cast<float>(search.k), x, search.I, y, first, bound);
      const float* log_mass = &y.nodes->log_mass[first];
      uint32_t near = 0;  // bits of the leaves
      float left_out = 0;
#pragma omp simd reduction(| : near) reduction(+ : left_out)
      for (int32_t j = 0; j < static_cast<int32_t>(kSuper); ++j) {
        const float held = bound[j] + std::max(log_mass[j], search.reach);
        const uint32_t counts = j >= skip && j < past ? 1u : 0u;
        const uint32_t is_near = held >= least ? counts : 0u;
        near |= is_near << j;
        left_out += counts > is_near ? fast_exp2(bound[j] + log_mass[j]) : 0.0f;
      }
      found.left_out += static_cast<double>(left_out);
      for (; near; near &= near - 1)
        add_pair<kD, kBytes>(search, row, first + __builtin_ctz(near), found);
    }
    *result = found;
  }
};

}  // namespace

void find_partners(const Search& search, Found& found) {
  Found* const result = &found;
  run_in_dimension<FindPartners>(search.x.cloud->d, search, result);
}

void bound_supers(const Search& search, int64_t S, float* bound) {
  run_in_dimension<BoundSupers>(search.x.cloud->d, search, S, bound);
}

}  // namespace otloss::cpu::multiscale
