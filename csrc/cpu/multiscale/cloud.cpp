#include "cpu/multiscale/cloud.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <list>
#include <mutex>
#include <utility>

#include "core/math.h"
#include "cpu/parallel.h"

namespace otloss::cpu::multiscale {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Cuts index (count,), points of x (., d): returns how many come first.
int64_t cut(const double* x, int64_t d, int32_t* index, int64_t count) {
  double low[kMultiscaleDims], high[kMultiscaleDims];
  std::fill_n(low, d, kInfinity), std::fill_n(high, d, -kInfinity);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < d; ++c) {
      const double v = x[index[i] * d + c];
      low[c] = std::min(low[c], v), high[c] = std::max(high[c], v);
    }
  int64_t axis = 0;
  for (int64_t c = 1; c < d; ++c)
    if (high[c] - low[c] > high[axis] - low[axis]) axis = c;
  const int64_t left = first_half(count);
  std::nth_element(index, index + left, index + count,
                   [&](int32_t i, int32_t j) { return x[i * d + axis] < x[j * d + axis]; });
  return left;
}

// Reorders index; the nodes of `levels` levels are left to `later`.
template <typename F>
void order(const double* x, int64_t d, int32_t* index, int64_t count, int levels, F&& later) {
  if (count <= kPoints || interrupted()) return;
  if (levels == 0) return later(index, count);
  const int64_t left = cut(x, d, index, count);
  order(x, d, index, left, levels - 1, later);
  order(x, d, index + left, count - left, levels - 1, later);
}

// Trees below the first few cuts are one task each.
void order(const double* x, int64_t d, std::vector<int32_t>& index, bool split) {
  constexpr int kAll = 64, kCuts = 4;
  const auto none = [](int32_t*, int64_t) {};
  const int64_t count = static_cast<int64_t>(index.size());
  if (!split) return order(x, d, index.data(), count, kAll, none);
  std::vector<std::pair<int32_t*, int64_t>> trees;
  order(x, d, index.data(), count, kCuts,
        [&](int32_t* first, int64_t points) { trees.emplace_back(first, points); });
  parallel_tasks(static_cast<int64_t>(trees.size()),
                 [&](int64_t t) { order(x, d, trees[t].first, trees[t].second, kAll, none); });
}

// What an order depends on.
template <typename T>
std::array<uint64_t, 5> fingerprint(int64_t count, int64_t d, const T* z, const T* weight,
                                    double radius) {
  uint64_t hash = 0;
  const auto add = [&](uint64_t bits) {
    hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  };
  for (int64_t i = 0; i < count; ++i) {
    add(weight[i] > T(0));
    for (int64_t c = 0; c < d; ++c) {
      uint64_t bits = 0;
      std::memcpy(&bits, &z[i * d + c], sizeof(T));
      add(bits);
    }
  }
  return {hash, static_cast<uint64_t>(count), static_cast<uint64_t>(d), sizeof(T), radius > 0};
}

// The orders of the clouds that came last.
class KeptOrders {
 public:
  using Order = std::vector<int32_t>;
  using Key = std::array<uint64_t, 5>;

  // Empty if there is none.
  Order find(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = std::find_if(kept_.begin(), kept_.end(),
                                 [&](const auto& entry) { return entry.first == key; });
    if (at == kept_.end()) return {};
    kept_.splice(kept_.begin(), kept_, at);
    return at->second;
  }
  void keep(const Key& key, const Order& order) {
    constexpr size_t kMost = 4;
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.emplace_front(key, order);
    if (kept_.size() > kMost) kept_.pop_back();
  }

 private:
  std::mutex mutex_;
  std::list<std::pair<Key, Order>> kept_;  // the last first
};

struct Box {
  double centre[kMultiscaleDims], half[kMultiscaleDims], radius = 0;

  Box(const double* x, int64_t d, int64_t count) {
    double low[kMultiscaleDims], high[kMultiscaleDims];
    std::fill_n(low, d, kInfinity), std::fill_n(high, d, -kInfinity);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < d; ++c)
        low[c] = std::min(low[c], x[i * d + c]), high[c] = std::max(high[c], x[i * d + c]);
    for (int64_t c = 0; c < d; ++c)
      centre[c] = 0.5 * (low[c] + high[c]), half[c] = 0.5 * (high[c] - low[c]);
    for (int64_t i = 0; i < count; ++i) {
      double square = 0;
      for (int64_t c = 0; c < d; ++c) square += std::pow(x[i * d + c] - centre[c], 2);
      radius = std::max(radius, square);
    }
    radius = std::sqrt(radius);
  }
};

// Inverse of a small positive matrix (d, d) and a little of its trace; 0 for 0.
void invert(int64_t d, const double* matrix, float* inverse) {
  constexpr double kRidge = 1e-4;
  double trace = 0, work[kMultiscaleDims][2 * kMultiscaleDims];
  for (int64_t k = 0; k < d; ++k) trace += matrix[k * d + k];
  std::fill_n(inverse, d * d, 0.0f);
  if (!(trace > std::numeric_limits<float>::min())) return;
  for (int64_t k = 0; k < d; ++k)
    for (int64_t l = 0; l < d; ++l)
      work[k][l] = matrix[k * d + l] + (k == l ? kRidge * trace : 0), work[k][d + l] = k == l;
  for (int64_t k = 0; k < d; ++k) {
    const double pivot = 1 / work[k][k];
    for (int64_t l = 0; l < 2 * d; ++l) work[k][l] *= pivot;
    for (int64_t r = 0; r < d; ++r) {
      const double factor = r == k ? 0 : work[r][k];
      for (int64_t l = 0; l < 2 * d; ++l) work[r][l] -= factor * work[k][l];
    }
  }
  for (int64_t k = 0; k < d; ++k)
    for (int64_t l = 0; l < d; ++l) inverse[k * d + l] = static_cast<float>(work[k][d + l]);
}

// Single precision, rounded up.
float above(double value) { return static_cast<float>(value * (1 + 1e-6)); }

}  // namespace

void Nodes::resize(int64_t nodes, int64_t d) {
  count = nodes, stride = (nodes + kSuper - 1) / kSuper * kSuper;
  centre.assign(count * d, 0);
  at.assign(d * stride, 0), half.assign(d * stride, 0);
  radius.assign(stride, 0), mass.assign(stride, 0), log_mass.assign(stride, kNone);
  mean.assign(count * d, 0), inverse.assign(count * d * d, 0);
}

void Cloud::build(int64_t leaf_size, bool split) {
  L = leaf_size;
  const int64_t leaves = (n + L - 1) / L;
  size = leaves * L;
  X.resize(size * d), w.resize(size);
  for (int64_t i = n; i < size; ++i) {
    w[i] = 0;
    std::copy_n(&X[(n - 1) * d], d, &X[i * d]);
  }
  u.resize(size * d), log_w.resize(size);
  leaf.resize(leaves, d), super.resize((leaves + kSuper - 1) / kSuper, d);
  const auto bound_some = [&](int64_t begin, int64_t end) {
    for (int64_t S = begin; S < end; ++S) {
      for (int64_t I = S * kSuper; I < std::min(leaves, (S + 1) * kSuper); ++I)
        bound(leaf, I, L, true);
      bound(super, S, L * kSuper, false);
    }
  };
  constexpr int64_t kGrain = 16;
  if (split)
    parallel_for(0, super.count, kGrain, bound_some);
  else
    bound_some(0, super.count);
}

// A plane is fitted to the points of a leaf, to the centres of the leaves of a super.
void Cloud::bound(Nodes& nodes, int64_t I, int64_t points, bool leaves) {
  const int64_t first = I * points, last = std::min(size, first + points);
  const Box box(&X[first * d], d, last - first);
  double mass = 0;
  for (int64_t i = first; i < last; ++i) mass += w[i];
  nodes.radius[I] = above(box.radius), nodes.mass[I] = above(mass);
  nodes.log_mass[I] = mass > 0 ? static_cast<float>(std::log2(mass)) : kNone;
  for (int64_t c = 0; c < d; ++c) {
    nodes.centre[I * d + c] = box.centre[c];
    nodes.at[c * nodes.stride + I] = box.centre[c];
    nodes.half[c * nodes.stride + I] = above(box.half[c]);
  }
  for (int64_t i = first; leaves && i < last; ++i) {
    log_w[i] = w[i] > 0 ? static_cast<float>(std::log2(w[i])) : kNone;
    for (int64_t c = 0; c < d; ++c)
      u[(I * d + c) * L + i - first] = static_cast<float>(X[i * d + c] - box.centre[c]);
  }
  const int64_t step = leaves ? 1 : L, count = (last - first) / step;
  const auto point = [&](int64_t i, int64_t c) {
    return (leaves ? X[(first + i) * d + c] : leaf.centre[(first / L + i) * d + c]) - box.centre[c];
  };
  double mean[kMultiscaleDims] = {}, square[kMultiscaleDims * kMultiscaleDims] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < d; ++c) mean[c] += point(i, c) / static_cast<double>(count);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < d; ++c)
      for (int64_t e = 0; e < d; ++e)
        square[c * d + e] += (point(i, c) - mean[c]) * (point(i, e) - mean[e]);
  invert(d, square, &nodes.inverse[I * d * d]);
  for (int64_t c = 0; c < d; ++c) nodes.mean[I * d + c] = static_cast<float>(mean[c]);
}

Cloud Cloud::coarser(int64_t points, double& spread) const {
  Cloud coarse;
  coarse.d = d, coarse.n = (n + points - 1) / points;
  coarse.X.assign(coarse.n * d, 0), coarse.w.assign(coarse.n, 0);
  double mass = 0;
  spread = 0;
  for (int64_t I = 0; I < coarse.n; ++I) {
    const int64_t first = I * points, last = std::min(n, first + points);
    double *mean = &coarse.X[I * d], &held = coarse.w[I];
    for (int64_t i = first; i < last; ++i) held += w[i];
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = 0; c < d; ++c) mean[c] += w[i] / held * X[i * d + c];
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = 0; c < d; ++c) spread += w[i] * std::pow(X[i * d + c] - mean[c], 2);
    mass += held;
  }
  spread /= mass;
  return coarse;
}

std::vector<double> Cloud::squared_radii(int64_t points) const {
  constexpr int64_t kSample = 64;
  std::vector<double> squares;
  const int64_t runs = std::max<int64_t>(1, n / points);
  for (int64_t I = 0; I < runs; I += std::max<int64_t>(1, runs / kSample)) {
    const Box box(&X[I * points * d], d, std::min(n - I * points, points));
    squares.push_back(box.radius * box.radius);
  }
  return squares;
}

double largest_square(const Cloud& X, const Cloud& Y) {
  double low[kMultiscaleDims], high[kMultiscaleDims], most = 0;
  for (int64_t c = 0; c < X.d; ++c) {
    low[c] = high[c] = X.X[c];
    for (const Cloud* cloud : {&X, &Y})
      for (int64_t i = 0; i < cloud->n; ++i) {
        low[c] = std::min(low[c], cloud->X[i * X.d + c]);
        high[c] = std::max(high[c], cloud->X[i * X.d + c]);
        most += 0 * cloud->X[i * X.d + c];  // NaN if that is not finite
      }
    most += std::pow(high[c] - low[c], 2);
  }
  return most;
}

double log2_sum_of_all(const Cloud& x, int64_t i, const Cloud& y, double k, double scale,
                       const double* G, std::vector<double>& parts) {
  double most = -1e300, sum = 0;
  parts.resize(y.n);
  for (int64_t j = 0; j < y.n; ++j) {
    double square = 0;
    for (int64_t c = 0; c < x.d; ++c) square += std::pow(x.X[i * x.d + c] - y.X[j * x.d + c], 2);
    parts[j] = scale * G[j] + static_cast<double>(y.log_w[j]) - k * square;
    most = std::max(most, parts[j]);
  }
  for (double& part : parts) sum += part = fast_exp2(part - most);
  for (double& part : parts) part /= sum;
  return most + fast_log2(sum);
}

template <typename T>
Cloud ordered_cloud(int64_t count, int64_t d, const T* z, const T* weight, double radius,
                    bool split, std::vector<int32_t>& index) {
  const auto put = [&](int64_t i, double* x) {
    double square = 0;
    for (int64_t c = 0; c < d; ++c) x[c] = static_cast<double>(z[i * d + c]), square += x[c] * x[c];
    for (int64_t c = 0; c < d && radius > 0; ++c) x[c] *= radius / std::sqrt(square);
  };
  static KeptOrders kept;
  const auto key = fingerprint(count, d, z, weight, radius);
  index = kept.find(key);
  if (index.empty()) {
    std::vector<double> x(count * d);
    double finite = 0;  // NaN if a coordinate is not
    for (int64_t i = 0; i < count; ++i) {
      if (!(weight[i] > T(0))) continue;
      index.push_back(static_cast<int32_t>(i));
      put(i, &x[i * d]);
      for (int64_t c = 0; c < d; ++c) finite += 0 * x[i * d + c];
    }
    if (finite == 0) order(x.data(), d, index, split);
    if (!interrupted()) kept.keep(key, index);
  }
  Cloud cloud;
  cloud.d = d, cloud.n = static_cast<int64_t>(index.size());
  cloud.X.resize(cloud.n * d), cloud.w.resize(cloud.n);
  for (int64_t i = 0; i < cloud.n; ++i) {
    put(index[i], &cloud.X[i * d]);
    cloud.w[i] = static_cast<double>(weight[index[i]]);
  }
  return cloud;
}

#define OTLOSS_INSTANTIATE(T)                                                      \
  template Cloud ordered_cloud(int64_t, int64_t, const T*, const T*, double, bool, \
                               std::vector<int32_t>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu::multiscale
