#include "cpu/solve/plan_marginals.h"

#include "core/math.h"

namespace otloss::cpu {

template <typename T>
void PlanMarginals<T>::set(double eps, const Side<T>& x, const Side<T>& y, const T* F,
                           const SemidualPoint<T>& point) {
  const T tilt = x.tilt(eps);
  double of_rows = 0, of_columns = 0;
  for (int64_t i = 0; i < x.count; ++i)
    of_rows += row[i] =
        static_cast<double>(x.weight[i]) * static_cast<double>(fast_exp2(tilt * F[i]));
  for (int64_t j = 0; j < y.count; ++j)
    of_columns += column[j] =
        static_cast<double>(point.target[j]) * static_cast<double>(point.q[j]);
  for (int64_t i = 0; i < x.count; ++i) {
    row[i] *= of_columns / of_rows;
    if (!has_mass(row[i], of_columns)) row[i] = 0;
    R[i] = log2_weight(static_cast<T>(row[i] / of_columns));
  }
  for (int64_t j = 0; j < y.count; ++j) {
    if (!has_mass(column[j], of_columns)) column[j] = 0;
    S[j] = column[j] > 0 ? log2_weight(static_cast<T>(column[j] / of_columns))
                         : static_cast<T>(-kLog2Zero);
  }
  absorb_weights(y.count, factor<T>(eps), point.g.data(), y.weight, G.data());
}

template struct PlanMarginals<float>;
template struct PlanMarginals<double>;

}  // namespace otloss::cpu
