// The kernels for densities on a regular grid, as kernels.h: argument structs and launchers.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace otloss {

// A regular grid with a cost that is the sum of one along each axis.
struct GridAxes {
  std::vector<int64_t> shape;       // (axes,)
  std::vector<const double*> cost;  // (axes,) each (n, n)
  std::vector<double> spacing;      // of the squared distance: starts in closed form; else empty

  int64_t size() const {  // N
    int64_t points = 1;
    for (const int64_t n : shape) points *= n;
    return points;
  }
};

// log sum_j e^(v_j - C_ij / eps), and means of channels u with the weights of these sums.
struct GridMeans {
  int64_t batch;  // B
  int64_t channels;
  GridAxes axes;
  double eps;
  double* v;  // (B, N) in: v, out: the sums' logarithms
  double* u;  // (B, channels, N) in: u, out: the means
};

// Problems between densities, as SolveGroup.
struct GridGroup {
  int64_t batch;  // B
  GridAxes axes;
  bool symmetric;   // a density against itself
  const double* a;  // (B, N)
  const double* b;  // (B, N)
  double* f;        // (B, N) in: start (warm_start), out: potential
  double* g;        // (B, N) likewise
  double* status;   // (B, kStatusFields)
  Penalties penalties;
};

#if defined(OTLOSS_WITH_CUDA)
namespace cuda {
void grid_means(const Context& context, const GridMeans& means);
}  // namespace cuda
#endif

namespace cpu {

void grid_means(const GridMeans& means);
// On a CPU only.
void solve_grid(const std::vector<GridGroup>& groups, const SolveOptions& options);

}  // namespace cpu
}  // namespace otloss
