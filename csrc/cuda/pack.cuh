// Packing of prepared clouds for the kernels that make costs on the way (streamed.cuh), once per
// call: points by coordinates, so that a warp reads neighbouring points.
#pragma once

#include <algorithm>
#include <map>

#include "block.cuh"
#include "costs.h"
#include "plan.h"
#include "reduce.cuh"

namespace otloss::cuda {

// The points of a problem's group, where costs are made from them.
template <typename T>
struct PackedPair {
  CostKind kind;
  int64_t d;   // coordinates
  const T* x;  // (B, d + 1, packed_stride(n)) points, then their norms
  const T* y;  // (B, d + 1, packed_stride(m))
};

// A tile of kWarp points and kWarp coordinates through shared memory.
template <typename T>
struct PackKernel {
  static constexpr int kThreads = 256;
  static constexpr int kLines = kThreads / kWarp;
  static_assert(kPackedAlign == kWarp, "a block makes whole lines");

  int64_t batch, n, d, stride;
  const T* z;     // (B, n, d)
  const T* norm;  // (B, n)
  T* packed;      // (B, d + 1, stride) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    T* tile = block.template shared<T>();  // (kWarp, kWarp + 1)
    const int lane = block.thread() % kWarp, line = block.thread() / kWarp;
    const int64_t first = block.x() * kWarp, k0 = block.z() * kWarp;
    for (int64_t b = block.y(); b < batch; b += kGridY) {
      for (int row = line; row < kWarp; row += kLines) {
        const int64_t i = first + row, k = k0 + lane;
        T value = T(0);
        if (i < n && k < d) value = z[(b * n + i) * d + k];
        if (i < n && k == d) value = norm[b * n + i];
        tile[row * (kWarp + 1) + lane] = value;
      }
      block.sync();
      for (int row = line; row < kWarp && k0 + row <= d; row += kLines)
        packed[(b * (d + 1) + k0 + row) * stride + first + lane] = tile[lane * (kWarp + 1) + row];
      block.sync();
    }
  }
};

// (B, d + 1, packed_stride(n))
template <typename T>
const T* pack(const Context& context, int64_t batch, int64_t n, int64_t d, const T* z,
              const T* norm) {
  const int64_t stride = packed_stride(n);
  T* packed = context.scratch<T>(batch * (d + 1) * stride);
  Grid grid;
  grid.x = stride / kWarp;
  grid.y = std::min(batch, kGridY);
  grid.z = ceil_div(d + 1, kWarp);
  grid.shared = kWarp * (kWarp + 1) * sizeof(T);
  launch(context, PackKernel<T>{batch, n, d, stride, z, norm, packed}, grid);
  return packed;
}

// Packs each cloud of a call once.
template <typename T>
class Packer {
 public:
  explicit Packer(const Context& context) : context_(context) {}

  PackedPair<T> operator()(int64_t batch, int64_t n, int64_t m, const PointPair<T>& points) {
    return {points.kind, points.d, packed(batch, n, points.d, points.zx, points.hx),
            packed(batch, m, points.d, points.zy, points.hy)};
  }

 private:
  const T* packed(int64_t batch, int64_t n, int64_t d, const T* z, const T* norm) {
    const T*& result = packed_[z];
    if (result == nullptr) result = pack(context_, batch, n, d, z, norm);
    return result;
  }

  const Context& context_;
  std::map<const T*, const T*> packed_;
};

}  // namespace otloss::cuda
