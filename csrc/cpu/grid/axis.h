// Log-sum-exps along one axis of a grid, all its lines at once, and means with their weights.
//
// Of a line v (n,) and the axis' costs C (n, n), in units of 1 / k:
//     out_i = log2 sum_j 2^(v_j - C_ij),   mean_i = sum_j 2^(v_j - C_ij - out_i) u_j .
// With v_j = m_J + log2 e_j in blocks J of inputs, m_J the block's maximum, and C_ij = c_IJ - log2
// K_ij in blocks I x J, c_IJ the least, this is
//     sum_J 2^(m_J - c_IJ) sum_{j in J} K_ij e_j :
// n exponentials for a line and small matrix products, where the sum itself takes n^2 exponentials.
// Blocks that are far below the sum are left out. Where potentials or costs change by hundreds of
// powers of 2 within a block, the products of all large terms may underflow: such outputs are
// computed as they stand, term by term with the maximum subtracted.
//
// Vector lanes are lines.
#pragma once

#include <cstdint>
#include <vector>

namespace otloss::cpu::grid {

constexpr int64_t kLanes = 16;   // lines at once
constexpr int64_t kOutputs = 8;  // rows of a block I: with two vectors of lanes, 16 accumulators
constexpr int64_t kInputs = 16;  // columns of a block J

// The costs of an axis at one eps, in blocks.
class AxisKernel {
 public:
  // k C, with C (n, n) or its transpose.
  AxisKernel(int64_t n, const double* C, bool transposed, double k);

  const int64_t n;
  const int64_t outputs;  // blocks I
  const int64_t inputs;   // blocks J

  double cost(int64_t i, int64_t j) const { return cost_[i * n + j]; }
  const double* block(int64_t I, int64_t J) const {  // (kInputs, kOutputs) K
    return factors_.data() + (I * inputs + J) * kInputs * kOutputs;
  }
  double least(int64_t I, int64_t J) const { return least_[I * inputs + J]; }
  double most(int64_t I, int64_t J) const { return most_[I * inputs + J]; }

 private:
  std::vector<double> cost_, factors_, least_, most_;
};

// Some lines of an array (outer, n, inner): line l is element l % inner of part l / inner.
struct Lines {
  int64_t inner;
  int64_t begin, end;  // lines
  int64_t size;        // of the array
  int64_t channels;    // arrays u
  double* v;           // (size,) in: v, out: the log-sum-exps
  double* u;           // (channels, size) in: u, out: the means; or null
};

void reduce_lines(const AxisKernel& kernel, const Lines& lines);

}  // namespace otloss::cpu::grid
