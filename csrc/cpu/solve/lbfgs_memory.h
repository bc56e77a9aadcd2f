// The last few steps and residual changes, and the product of the inverse Hessian they imply.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/lbfgs.h"
#include "cpu/parallel.h"
#include "cpu/simd/sweep.h"

namespace otloss::cpu {

template <typename T>
class LbfgsMemory {
 public:
  void clear() { pairs_.clear(); }

  // From here on the inner product is that of `weight`; pairs of no curvature in it are dropped.
  // same: its values are those from before.
  void weigh(const T* weight, bool same) {
    weight_ = weight;
    if (same) return;
    std::vector<Pair> old;
    std::swap(old, pairs_);
    for (Pair& pair : old) push(std::move(pair.step), std::move(pair.change));
  }

  // step = change of g, change = old residual - new residual.
  void push(std::vector<T> step, std::vector<T> change) {
    const double sy = inner(step, change), ss = inner(step, step), yy = inner(change, change);
    if (!is_curved(sy, ss, yy)) return;
    if (pairs_.size() == kMemory) pairs_.erase(pairs_.begin());
    pairs_.push_back({std::move(step), std::move(change), sy, sy / yy});
  }

  // Two-loop recursion from p, the residual. Between the loops `precondition`, the initial inverse
  // Hessian, is applied if there is one, else the scale of the last pair.
  void direction(std::vector<T>& p, const FunctionRef<void()>* precondition) const {
    std::vector<double> alpha(pairs_.size());
    for (size_t i = pairs_.size(); i-- > 0;) {
      alpha[i] = inner(pairs_[i].step, p) / pairs_[i].sy;
      add(p, -alpha[i], pairs_[i].change);
    }
    if (precondition)
      (*precondition)();
    else if (!pairs_.empty())
      for (T& value : p) value *= static_cast<T>(pairs_.back().scale);
    for (size_t i = 0; i < pairs_.size(); ++i)
      add(p, alpha[i] - inner(pairs_[i].change, p) / pairs_[i].sy, pairs_[i].step);
  }

 private:
  static constexpr size_t kMemory = 8;
  struct Pair {
    std::vector<T> step, change;
    double sy, scale;
  };

  double inner(const std::vector<T>& x, const std::vector<T>& y) const {
    return dot(static_cast<int64_t>(x.size()), weight_, x.data(), y.data());
  }
  static void add(std::vector<T>& x, double factor, const std::vector<T>& y) {
    const T scale = static_cast<T>(factor);
    for (size_t j = 0; j < x.size(); ++j) x[j] += scale * y[j];
  }

  const T* weight_ = nullptr;
  std::vector<Pair> pairs_;
};

}  // namespace otloss::cpu
