// The loss from the values of its problems.
#include "kernels.h"

namespace otloss::cpu {

template <typename T>
void combine_values(const std::vector<double>& coefficients, const T* values, int64_t batch,
                    T* loss) {
  for (int64_t k = 0; k < batch; ++k) {
    T sum = 0;
    for (size_t p = 0; p < coefficients.size(); ++p)
      sum += static_cast<T>(coefficients[p]) * values[p * batch + k];
    loss[k] = sum;
  }
}

template void combine_values(const std::vector<double>&, const float*, int64_t, float*);
template void combine_values(const std::vector<double>&, const double*, int64_t, double*);

}  // namespace otloss::cpu
