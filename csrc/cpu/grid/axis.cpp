#include "cpu/grid/axis.h"

#include <algorithm>
#include <limits>

#include "core/math.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu::grid {
namespace {

// Factors below 2^kLeast count as 0, exponentials are at least that: their products are normal
// numbers. Sums above 2^kTrustedSum owe less than a digit to either.
constexpr double kLeast = -500, kTrustedSum = 4.0e-130;
constexpr double kFar = 80;  // a block that is 2^-kFar of the sum is left out

// 2^t for t <= 0.
OTLOSS_INLINE double exp2_from(double t) {
  constexpr double kRound = 6755399441055744.0;
  t = t > kLeast ? t : kLeast;
  const double shifted = t + kRound;
  const double p = exp2_polynomial(t - (shifted - kRound));
  return bit_cast<double>(bit_cast<uint64_t>(p) + (bit_cast<uint64_t>(shifted) << 52));
}

// kLanes lines, from their memory to their sums.
struct Tile {
  const AxisKernel& kernel;
  int64_t channels;
  double* v;      // (padded n, kLanes)
  double* e;      // (1 + channels, padded n, kLanes) e, then e u
  double* u;      // (channels, padded n, kLanes)
  double* top;    // (inputs, kLanes) the blocks' maxima
  double* scale;  // (inputs, kLanes)
  double* out;    // (1 + channels, padded outputs, kLanes)
};

template <int kBytes>
struct Vectors {
  typedef double Type __attribute__((vector_size(kBytes), aligned(8)));
};

// S (kOutputs, kLanes) += scale (kLanes,) sum_j K (kInputs, kOutputs)_ji e (kInputs, kLanes)_j
template <int kBytes>
OTLOSS_INLINE void add_block(const double* K, const double* e, const double* scale, double* S) {
  using V = typename Vectors<kBytes>::Type;
  constexpr int kWide = kBytes / 8, kRows = kBytes == 64 ? 8 : 4;
  for (int l = 0; l < kLanes; l += 2 * kWide) {
    for (int first = 0; first < kOutputs; first += kRows) {
      V sum[kRows][2] = {};
      for (int j = 0; j < kInputs; ++j) {
        const V e0 = *reinterpret_cast<const V*>(e + j * kLanes + l);
        const V e1 = *reinterpret_cast<const V*>(e + j * kLanes + l + kWide);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const double factor = K[j * kOutputs + first + i];
          sum[i][0] += factor * e0;
          sum[i][1] += factor * e1;
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          V* const to = reinterpret_cast<V*>(S + (first + i) * kLanes + l + h * kWide);
          *to += sum[i][h] * *reinterpret_cast<const V*>(scale + l + h * kWide);
        }
    }
  }
}

OTLOSS_INLINE void raise_to(const double* values, double offset, double* most) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l)
    most[l] = values[l] - offset > most[l] ? values[l] - offset : most[l];
}

// Output i term by term.
OTLOSS_INLINE void reduce_one(const Tile& t, int64_t i) {
  constexpr double kNone = 2 * kLog2Zero;
  const int64_t n = t.kernel.n, padded = t.kernel.inputs * kInputs;
  double most[kLanes], sum[kLanes] = {};
  std::fill(most, most + kLanes, kNone);
  for (int64_t j = 0; j < n; ++j) raise_to(t.v + j * kLanes, t.kernel.cost(i, j), most);
  const int64_t rows = t.kernel.outputs * kOutputs;
  for (int64_t c = 1; c <= t.channels; ++c) {
    double* mean = t.out + (c * rows + i) * kLanes;
    std::fill(mean, mean + kLanes, 0.0);
  }
  for (int64_t j = 0; j < n; ++j) {
    const double* v = t.v + j * kLanes;
    const double cost = t.kernel.cost(i, j);
    double e[kLanes];
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) e[l] = exp2_from(v[l] - cost - most[l]), sum[l] += e[l];
    for (int64_t c = 1; c <= t.channels; ++c) {
      const double* u = t.u + ((c - 1) * padded + j) * kLanes;
      double* mean = t.out + (c * rows + i) * kLanes;
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) mean[l] += e[l] * u[l];
    }
  }
  double* out = t.out + i * kLanes;
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) out[l] = most[l] + fast_log2(sum[l]);
  for (int64_t c = 1; c <= t.channels; ++c) {
    double* mean = t.out + (c * rows + i) * kLanes;
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) mean[l] /= sum[l];
  }
}

struct ReduceTile {
  template <int kBytes>
  static OTLOSS_INLINE void run(const Tile& t) {
    const AxisKernel& kernel = t.kernel;
    const int64_t padded = kernel.inputs * kInputs, rows = kernel.outputs * kOutputs;
    for (int64_t J = 0; J < kernel.inputs; ++J) {
      double* top = t.top + J * kLanes;
      std::fill(top, top + kLanes, 2 * kLog2Zero);
      for (int64_t j = J * kInputs; j < (J + 1) * kInputs; ++j) raise_to(t.v + j * kLanes, 0, top);
      for (int64_t j = J * kInputs; j < (J + 1) * kInputs; ++j) {
        const double* v = t.v + j * kLanes;
        double* e = t.e + j * kLanes;
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) e[l] = exp2_from(v[l] - top[l]);
        for (int64_t c = 0; c < t.channels; ++c) {
          const double* u = t.u + (c * padded + j) * kLanes;
          double* eu = t.e + ((1 + c) * padded + j) * kLanes;
#pragma omp simd
          for (int l = 0; l < kLanes; ++l) eu[l] = e[l] * u[l];
        }
      }
    }
    for (int64_t I = 0; I < kernel.outputs; ++I) {
      // The sums are at least `least`, and counted from `most`.
      double least[kLanes], most[kLanes];
      std::fill(least, least + kLanes, 3 * kLog2Zero);
      std::fill(most, most + kLanes, 3 * kLog2Zero);
      for (int64_t J = 0; J < kernel.inputs; ++J) {
        raise_to(t.top + J * kLanes, kernel.most(I, J), least);
        raise_to(t.top + J * kLanes, kernel.least(I, J), most);
      }
      double* S = t.out + I * kOutputs * kLanes;
      for (int64_t c = 0; c <= t.channels; ++c)
        std::fill_n(S + c * rows * kLanes, kOutputs * kLanes, 0.0);
      for (int64_t J = 0; J < kernel.inputs; ++J) {
        const double *top = t.top + J * kLanes, cost = kernel.least(I, J);
        int counts = 0;
#pragma omp simd reduction(| : counts)
        for (int l = 0; l < kLanes; ++l) counts |= top[l] - cost >= least[l] - kFar;
        if (!counts) continue;
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) t.scale[l] = exp2_from(top[l] - cost - most[l]);
        for (int64_t c = 0; c <= t.channels; ++c)
          add_block<kBytes>(kernel.block(I, J), t.e + (c * padded + J * kInputs) * kLanes, t.scale,
                            S + c * rows * kLanes);
      }
      for (int64_t i = I * kOutputs; i < std::min(kernel.n, (I + 1) * kOutputs); ++i) {
        double* out = t.out + i * kLanes;
        int trusts = 1;
#pragma omp simd reduction(& : trusts)
        for (int l = 0; l < kLanes; ++l) trusts &= out[l] > kTrustedSum;
        if (!trusts) {
          reduce_one(t, i);
          continue;
        }
        for (int64_t c = 1; c <= t.channels; ++c) {
          double* mean = out + c * rows * kLanes;
#pragma omp simd
          for (int l = 0; l < kLanes; ++l) mean[l] /= out[l];
        }
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) out[l] = most[l] + fast_log2(out[l]);
      }
    }
  }
};

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace

AxisKernel::AxisKernel(int64_t n, const double* C, bool transposed, double k)
    : n(n),
      outputs(blocks(n, kOutputs)),
      inputs(blocks(n, kInputs)),
      cost_(n * n),
      factors_(outputs * inputs * kOutputs * kInputs),
      least_(outputs * inputs, std::numeric_limits<double>::infinity()),
      most_(outputs * inputs, -std::numeric_limits<double>::infinity()) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double cost = cost_[i * n + j] = k * (transposed ? C[j * n + i] : C[i * n + j]);
      const int64_t at = i / kOutputs * inputs + j / kInputs;
      least_[at] = std::min(least_[at], cost), most_[at] = std::max(most_[at], cost);
    }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = i / kOutputs * inputs + j / kInputs;
      const double below = least_[at] - cost_[i * n + j];
      if (below > kLeast)
        factors_[(at * kInputs + j % kInputs) * kOutputs + i % kOutputs] = exp2_from(below);
    }
}

void reduce_lines(const AxisKernel& kernel, const Lines& lines) {
  const int64_t n = kernel.n, padded = kernel.inputs * kInputs, rows = kernel.outputs * kOutputs;
  const int64_t arrays = 1 + lines.channels, columns = padded * kLanes;
  // Points beyond the line, and lines beyond the last, have no mass.
  std::vector<double> v(columns, kLog2Zero), e(arrays * columns), u(lines.channels * columns);
  std::vector<double> top(kernel.inputs * kLanes), scale(kLanes), out(arrays * rows * kLanes);
  const Tile tile{kernel,   lines.channels, v.data(),     e.data(),
                  u.data(), top.data(),     scale.data(), out.data()};
  const auto each = [&](int64_t first, auto&& move) {
    for (int64_t l = 0; l < std::min(kLanes, lines.end - first); ++l) {
      const int64_t line = first + l;
      const int64_t at = line / lines.inner * n * lines.inner + line % lines.inner;
      for (int64_t j = 0; j < n; ++j) move(at + j * lines.inner, j * kLanes + l);
    }
  };
  for (int64_t first = lines.begin; first < lines.end; first += kLanes) {
    each(first, [&](int64_t from, int64_t to) {
      v[to] = lines.v[from];
      for (int64_t c = 0; c < lines.channels; ++c)
        u[c * columns + to] = lines.u[c * lines.size + from];
    });
    run_at_level<ReduceTile>(tile);
    each(first, [&](int64_t to, int64_t from) {
      lines.v[to] = out[from];
      for (int64_t c = 0; c < lines.channels; ++c)
        lines.u[c * lines.size + to] = out[(c + 1) * rows * kLanes + from];
    });
  }
}

}  // namespace otloss::cpu::grid
