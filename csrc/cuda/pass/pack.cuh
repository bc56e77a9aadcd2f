// Packing of prepared clouds for the kernels that make costs on the way (tiles.cuh), once per call.
//
//     PackKernel     points by coordinates, so that a warp reads neighbouring points
//     ScaleKernel    the power of two that a cloud is scaled by for tensor cores   block: a cloud
//     SplitKernel    high and low halves                    thread: 8 coordinates of a point
#pragma once

#include <algorithm>
#include <limits>
#include <map>
#include <type_traits>

#include "cuda/device/reduce.cuh"
#include "cuda/device/team.cuh"
#include "cuda/pass/tiles.cuh"

namespace otloss::cuda {

// Where the costs of a group are: stored, or made from points.
template <typename T>
struct PackedPair {
  CostKind kind;
  int64_t d;   // coordinates
  const T* C;  // (B, n, m), or null
  PackedClouds<T> x, y;
};

// A tile of kWarp points and kWarp coordinates through shared memory. Blocks: clouds, parts of the
// coordinates and the norm, parts of the points.
template <typename T>
struct PackKernel {
  static constexpr int kThreads = 256;
  static constexpr int kLines = kThreads / kWarp;
  static_assert(kPackedAlign % kWarp == 0, "a block makes whole lines");

  int64_t n, d, stride, parts;
  const T* z;     // (B, n, d)
  const T* norm;  // (B, n)
  T* packed;      // (B, d + 1, stride) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    T* tile = block.template shared<T>();  // (kWarp, kWarp + 1)
    const int lane = block.thread() % kWarp, line = block.thread() / kWarp;
    const int64_t lines = stride / kWarp, first = block.x() % lines * kWarp;
    const int64_t k0 = block.x() / lines % parts * kWarp, b = block.x() / lines / parts;
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
  }
};

// (B, d + 1, packed_stride(n))
template <typename T>
const T* pack(const Context& context, int64_t batch, int64_t n, int64_t d, const T* z,
              const T* norm) {
  const int64_t stride = packed_stride(n), parts = ceil_div(d + 1, kWarp);
  T* packed = context.scratch<T>(batch * (d + 1) * stride);
  launch(context, PackKernel<T>{n, d, stride, parts, z, norm, packed},
         Grid{batch * parts * stride / kWarp, kWarp * (kWarp + 1) * sizeof(T)});
  return packed;
}

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

struct ScaleKernel {
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / kWarp;

  int64_t n;
  const float* norm;  // (B, n) squared, or null: points of length 1
  float* scale;       // (B,) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    float* const parts = block.template shared<float>();  // (kWarps,)
    const int64_t b = block.x();
    float largest = norm == nullptr ? 1.0f : 0.0f;
    for (int64_t i = block.thread(); norm != nullptr && i < n; i += kThreads) {
      const float h = norm[b * n + i];
      // A cloud that is not finite is not solved.
      if (h > largest && h <= std::numeric_limits<float>::max()) largest = h;
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2)
      largest = Max::join(largest, block.shuffle_xor(largest, mask));
    if (block.thread() % kWarp == 0) parts[block.thread() / kWarp] = largest;
    block.sync();
    if (block.thread() != 0) return;
    for (int w = 0; w < kWarps; ++w) largest = Max::join(largest, parts[w]);
    scale[b] = split_scale(largest);
  }
};

struct SplitKernel {
  static constexpr int kThreads = 256;
  static constexpr int kPiece = 8;

  int64_t n, d, stride;
  const float* z;      // (B, n, d)
  const float* scale;  // (B,)
  uint16_t* halves;    // (B, split_depth(d) / 8, 2, stride, 8) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t blocks = ceil_div(stride, kThreads), pieces = split_depth(d) / kPiece;
    const int64_t i = block.x() % blocks * kThreads + block.thread();
    if (i < stride) split(block.x() / blocks / pieces, block.x() / blocks % pieces, i);
  }

 private:
  OTLOSS_DEVICE void split(int64_t b, int64_t piece, int64_t i) const {
    alignas(16) uint16_t high[kPiece], low[kPiece];
#pragma unroll
    for (int c = 0; c < kPiece; ++c) {
      const int64_t k = piece * kPiece + c;
      const float value = i < n && k < d ? scale[b] * z[(b * n + i) * d + k] : 0.0f;
      high[c] = to_half(value);
      low[c] = to_half(value - from_half(high[c]));
    }
    uint16_t* const to =
        halves + ((b * (split_depth(d) / kPiece) + piece) * 2 * stride + i) * kPiece;
    store(high, to);
    store(low, to + stride * kPiece);
  }

  // 16 bytes.
  static OTLOSS_DEVICE void store(const uint16_t (&from)[kPiece], uint16_t* to) {
    *reinterpret_cast<Vector<float>*>(to) = *reinterpret_cast<const Vector<float>*>(from);
  }
};

// The halves of packed clouds.
inline void split(const Context& context, int64_t batch, int64_t n, int64_t d, const float* z,
                  const float* squared_norm, PackedClouds<float>* clouds) {
  const int64_t stride = packed_stride(n);
  float* const scale = context.scratch<float>(batch);
  uint16_t* const halves = context.scratch<uint16_t>(batch * 2 * split_depth(d) * stride);
  launch(context, ScaleKernel{n, squared_norm, scale},
         Grid{batch, ScaleKernel::kWarps * sizeof(float)});
  const int64_t blocks = ceil_div(stride, SplitKernel::kThreads);
  launch(context, SplitKernel{n, d, stride, z, scale, halves},
         Grid{batch * (split_depth(d) / SplitKernel::kPiece) * blocks});
  clouds->halves = halves, clouds->scale = scale;
}

// Who makes costs of points, if they are not stored.
template <typename T>
TileKind tiles_of(const Context& context, const PointPair<T>& points, const T* C = nullptr) {
  if (C != nullptr) return TileKind::kStored;
  return choose_tiles(sizeof(T), points.d, limits(context.device), wanted_tiles(points.tf32));
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
    if (C != nullptr) return {points.kind, points.d, C, {}, {}};
    return {points.kind, points.d, nullptr, packed(batch, n, points, points.zx, points.hx),
            packed(batch, m, points, points.zy, points.hy)};
  }

 private:
  const PackedClouds<T>& packed(int64_t batch, int64_t n, const PointPair<T>& p, const T* z,
                                const T* norm) {
    PackedClouds<T>& clouds = packed_[z];
    if (clouds.points != nullptr) return clouds;
    clouds.points = pack(context_, batch, n, p.d, z, norm);
    if constexpr (std::is_same_v<T, float>)
      if (tiles_ != TileKind::kFma)
        split(context_, batch, n, p.d, z, traits_of(p.kind).unit_norm ? nullptr : norm, &clouds);
    return clouds;
  }

  const Context& context_;
  const TileKind tiles_;
  std::map<const T*, PackedClouds<T>> packed_;
};

}  // namespace otloss::cuda
