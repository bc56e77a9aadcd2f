// Packing of prepared clouds for the kernels that make costs on the way (tiles.cuh), once per call.
#pragma once

#include <algorithm>
#include <limits>
#include <map>
#include <type_traits>

#include "cuda/device/reduce.cuh"
#include "cuda/device/team.cuh"
#include "cuda/pass/tiles.cuh"

namespace otloss::cuda {

// The largest power of two that keeps a point within 2^15, from the largest squared norm; 1 / it is
// a normal number, as is 1 / (its square).
OTLOSS_HOST_DEVICE float split_scale(float largest) {
  constexpr int kReach = 15, kMost = 60;
  const int exponent = static_cast<int>(bit_cast<uint32_t>(largest) >> 23) - 127;  // floor of log2
  const int length = (exponent + 2) >> 1;  // the longest point is shorter than 2^length
  const int power = kReach - length;
  const int kept = power < -kMost ? -kMost : power > kMost ? kMost : power;
  return bit_cast<float>(static_cast<uint32_t>(kept + 127) << 23);
}

// Points by coordinates, so that a warp reads neighbouring points, and for tensor cores the high
// and low halves of scaled points. A thread has kPiece coordinates of a point.
template <typename T>
struct PackKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  static constexpr int kPiece = 8;

  int64_t n, d, stride, pieces;  // pieces: of a point
  bool unit_norm;
  const T* z;        // (B, n, d)
  const T* norm;     // (B, n)
  T* points;         // (B, d + 1, stride) out: points, then norms
  uint16_t* halves;  // (B, split_depth(d) / kPiece, 2, stride, kPiece) out, or null
  float* scale;      // (B,) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t blocks = ceil_div(stride, kThreads), part = block.x() / blocks;
    const int64_t batch = part / pieces, first = part % pieces * kPiece;
    const int64_t i = block.x() % blocks * kThreads + block.thread();
    T* const to = points + batch * (d + 1) * stride + i;
    T own[kPiece];
#pragma unroll
    for (int c = 0; c < kPiece; ++c) {
      const int64_t k = first + c;
      own[c] = i < n && k < d ? z[(batch * n + i) * d + k] : T(0);
      if (i < stride && k < d) to[k * stride] = own[c];
    }
    if (i < stride && first == 0) to[d * stride] = i < n ? norm[batch * n + i] : T(0);
    if constexpr (std::is_same_v<T, float>) {
      if (halves == nullptr) return;
      const float by = unit_norm ? split_scale(1.0f) : split_scale(longest(block, batch));
      if (i == 0 && first == 0) scale[batch] = by;
      if (i < stride) split(own, by, halves + (part * 2 * stride + i) * kPiece);
    }
  }

 private:
  // The largest squared norm of a cloud.
  template <class Block>
  OTLOSS_DEVICE T longest(Block& block, int64_t batch) const {
    T* const parts = block.template shared<T>();  // (kWarps,)
    T most = T(0);
    for (int64_t i = block.thread(); i < n; i += kThreads) {
      const T h = norm[batch * n + i];
      // A cloud that is not finite is not solved.
      if (h > most && h <= std::numeric_limits<T>::max()) most = h;
    }
    most = warp_join<Max>(block, most);
    if (block.thread() % kWarp == 0) parts[block.thread() / kWarp] = most;
    block.sync();
    for (int w = 0; w < kWarps; ++w) most = Max::join(most, parts[w]);
    return most;
  }

  OTLOSS_DEVICE void split(const T (&own)[kPiece], float by, uint16_t* to) const {
    alignas(16) uint16_t high[kPiece], low[kPiece];
#pragma unroll
    for (int c = 0; c < kPiece; ++c) {
      const float value = by * own[c];
      high[c] = to_half(value);
      low[c] = to_half(value - from_half(high[c]));
    }
    *reinterpret_cast<Vector<float>*>(to) = *reinterpret_cast<const Vector<float>*>(high);
    *reinterpret_cast<Vector<float>*>(to + stride * kPiece) =
        *reinterpret_cast<const Vector<float>*>(low);
  }
};

// Who makes costs of points, if they are not stored.
template <typename T>
TileKind tiles_of(const Context& context, const PointPair<T>& points, const T* C = nullptr) {
  if (C != nullptr) return TileKind::kStored;
  return choose_tiles(sizeof(T), points.d, limits(context.device), points.tf32);
}

// Packs each cloud of a call once.
template <typename T>
class Packer {
 public:
  // tiles: who makes costs from what is packed.
  explicit Packer(const Context& context, TileKind tiles = TileKind::kFma)
      : context_(context), tiles_(tiles) {}

  PackedPair<T> operator()(int64_t batch, int64_t n, int64_t m, const PointPair<T>& points,
                           const T* C = nullptr) {
    if (C != nullptr || points.zx == nullptr) return {points.kind, points.d, C, {}, {}};
    return {points.kind, points.d, nullptr, packed(batch, n, points, points.zx, points.hx),
            packed(batch, m, points, points.zy, points.hy)};
  }

 private:
  const PackedClouds<T>& packed(int64_t batch, int64_t n, const PointPair<T>& p, const T* z,
                                const T* norm) {
    PackedClouds<T>& clouds = packed_[z];
    if (clouds.points != nullptr) return clouds;
    using Kernel = PackKernel<T>;
    const int64_t stride = packed_stride(n), depth = split_depth(p.d);
    Kernel kernel{
        n,       p.d,     stride, depth / Kernel::kPiece, traits_of(p.kind).unit_norm, z, norm,
        nullptr, nullptr, nullptr};
    kernel.points = context_.scratch<T>(batch * (p.d + 1) * stride);
    if (tiles_ == TileKind::kTensor || tiles_ == TileKind::kTensorHigh) {
      kernel.halves = context_.scratch<uint16_t>(batch * 2 * depth * stride);
      kernel.scale = context_.scratch<float>(batch);
    }
    launch(context_, kernel,
           Grid{batch * kernel.pieces * ceil_div(stride, Kernel::kThreads),
                Kernel::kWarps * sizeof(T)});
    clouds = {kernel.points, kernel.halves, kernel.scale};
    return clouds;
  }

  const Context& context_;
  const TileKind tiles_;
  std::map<const T*, PackedClouds<T>> packed_;
};

}  // namespace otloss::cuda
