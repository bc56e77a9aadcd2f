// The value of a solved problem from a last row update in double, for host and device.
//
// A loss whose terms cancel, as in the divergence of clouds that are close, has no digits left of
// values made from potentials in single precision. With the row update of g in double, from costs
// in double, the value is that of the semidual at g, which g's rounding enters to second order.
#pragma once

#include <vector>

#include "core/penalty.h"
#include "kernels.h"

namespace otloss {

// Whether terms may cancel that can be made again: those of several problems, whose costs are made
// from points. Iterations of a given number have the value of what they end at.
inline bool has_last_update(const std::vector<SolveGroup<float>>& groups,
                            const SolveOptions& options) {
  const SolveGroup<float>& first = groups[0];
  return groups.size() > 1 && first.points.zx && first.dummies == 0 && options.n_iters < 0 &&
         options.objective == Objective::kRegularized;
}

// The regularized value, from the soft means of g and of its row update f.
OTLOSS_HOST_DEVICE double updated_value(bool balanced, const Penalty& x, const Penalty& y,
                                        double mass_x, double mass_y, double eps, const SoftMean& f,
                                        const SoftMean& g) {
  if (balanced) return mass_x * f.mean + mass_y * g.mean;
  if (x.hard() && y.hard()) return soft_value(x, y, mass_x, mass_y, eps, f.mean, g.mean);
  const Translation best(x, y, mass_x, mass_y, eps, 0, f, g);
  return soft_value(x, y, mass_x, mass_y, eps, best.mean_f, best.mean_g);
}

}  // namespace otloss
