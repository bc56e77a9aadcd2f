// What the files of the multiscale engine tell each other.
#pragma once

#include "cuda/multiscale/cloud.cuh"
#include "kernels.h"

namespace otloss::cuda::multiscale {

// The points of one side of problem p, in order: X and w of the cloud, which has no nodes yet, and
// where each is in the caller's.
struct Ordered {
  Cloud cloud;
  const int32_t* index;  // (n,)
};

// mass (1,) on the device: what the weights are scaled to the total of, or null: their own total,
// 1 but for rounding where it is 1; out: it.
template <int kD, typename T>
Ordered ordered_cloud(const Context& context, CostKind kind, int64_t n, int64_t d, const T* points,
                      const T* weights, const double* mass, double* out);

// Coordinates are multiplied by it, so that the cost is the squared distance.
OTLOSS_HOST_DEVICE double scale_of(CostKind kind) {
  return kind == CostKind::kCosine ? 0.70710678118654752440 : 1.0;
}

// Calls function(std::integral_constant<int, kD>) for d coordinates.
template <typename F>
void dispatch_dims(int64_t d, F&& function) {
  constexpr int kFew = 3;
  if (d <= kFew)
    function(std::integral_constant<int, kFew>());
  else
    function(std::integral_constant<int, static_cast<int>(kMultiscaleDims)>());
}

// Solves the problems of all groups, one after the other. Waits for the device once for each, to
// learn how far its centroids are from its points.
template <typename T>
void solve(const Context& context, const std::vector<SolveGroup<T>>& groups,
           const SolveOptions& options);

}  // namespace otloss::cuda::multiscale
