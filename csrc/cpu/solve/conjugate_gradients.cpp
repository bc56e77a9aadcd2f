#include "cpu/solve/conjugate_gradients.h"

#include <algorithm>
#include <cmath>

#include "cpu/simd/vectors.h"

namespace otloss::cpu {

CgReport conjugate_gradients(const CgLimits& limits, const Vector& inverse,
                             FunctionRef<void(const Vector& x, Vector& y)> apply,
                             FunctionRef<void(Vector& r)> project, Vector& right, Vector& x) {
  const size_t count = right.size();
  Vector &r = right, z(count), p(count), q(count);
  const auto inner = [&](const Vector& u, const Vector& v) {
    return dot(static_cast<int64_t>(count), u.data(), v.data());
  };
  const auto precondition = [&] {
    for (size_t i = 0; i < count; ++i) z[i] = inverse[i] * r[i];
    return inner(r, z);
  };
  std::fill(x.begin(), x.end(), 0.0);
  project(r);
  double rz = precondition();
  const double first = rz;
  CgReport report;
  p = z;
  while (rz > limits.tol * limits.tol * first && rz > limits.floor &&
         report.iterations < limits.iterations && !interrupted()) {
    apply(p, q);
    const double curvature = inner(p, q);
    if (!(curvature > 0)) break;
    const double step = rz / curvature;
    for (size_t i = 0; i < count; ++i) x[i] += step * p[i], r[i] -= step * q[i];
    project(r);
    const double next = precondition(), turn = next / rz;
    for (size_t i = 0; i < count; ++i) p[i] = z[i] + turn * p[i];
    rz = next;
    ++report.iterations;
  }
  report.residual = rz > limits.floor ? std::sqrt(rz / first) : 0.0;
  return report;
}

}  // namespace otloss::cpu
