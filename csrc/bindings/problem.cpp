#include "bindings/problem.h"

#include <algorithm>
#include <limits>
#include <string>

#include "core/math.h"

namespace otloss {
namespace {

// `count` float64 numbers on the CPU.
const double* numbers(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == ScalarType::Double && t.is_contiguous() &&
          t.numel() == count && t.const_data_ptr() != nullptr,
      "otloss: ", name, " must be a float64 tensor on the CPU with ", std::to_string(count),
      count == 1 ? " entry; one for each problem of a batch is not available" : " entries");
  return static_cast<const double*>(t.const_data_ptr());
}

double positive(double value, const char* name) {
  STD_TORCH_CHECK(value > 0, "otloss: ", name, " must be > 0, but is ", std::to_string(value));
  return value;
}

constexpr double kLargestMultiscaleEps = 1e150;  // what it multiplies eps by must not overflow

// Multiscale orders the points of a cloud that have a weight; cosine is to it the distance of
// points of a sphere.
void check_multiscale(const Tensor& points, int64_t d, const Tensor& weights, CostKind kind) {
  dispatch_dtype(weights, [&](auto zero) {
    const auto* z = static_cast<const decltype(zero)*>(points.const_data_ptr());
    const auto* w = static_cast<const decltype(zero)*>(weights.const_data_ptr());
    const int64_t n = weights.size(1);
    for (int64_t k = 0; k < weights.size(0); ++k)
      STD_TORCH_CHECK(
          std::any_of(w + k * n, w + (k + 1) * n, [&](auto weight) { return weight > zero; }) &&
              std::none_of(w + k * n, w + (k + 1) * n,
                           [](auto weight) { return std::isinf(weight); }),
          "otloss: multiscale needs a weight > 0 in each cloud, and none that is infinite");
    const bool unit = traits_of(kind).unit_norm;
    for (int64_t i = 0; unit && i < weights.size(0) * n; ++i)
      STD_TORCH_CHECK(!(w[i] > zero) || std::any_of(z + i * d, z + (i + 1) * d,
                                                    [&](auto value) { return value != zero; }),
                      "otloss: multiscale has no cosine of points of norm 0");
  });
}

// Whether there is a weight more than points or rows of costs; other sizes are checked later.
int64_t dummies_of(const Tensors& costs, const Clouds& clouds) {
  const int64_t c = clouds.pairs[0];
  if (c < 0 || c >= static_cast<int64_t>(clouds.weights.size())) return 0;
  const Tensors& given = clouds.points.empty() ? costs : clouds.points;
  const size_t at = clouds.points.empty() ? 0 : c;
  if (at >= given.size() || clouds.weights[c].dim() != 2) return 0;
  const int64_t dims = given[at].dim();
  if (dims != 3 && !clouds.single) return 0;
  return clouds.weights[c].size(1) == given[at].size(dims - 2) + 1 ? 1 : 0;
}

}  // namespace

Penalties penalties_of(const std::optional<Tensor>& rho) {
  if (!rho) return {};
  const double* given = numbers(*rho, 2, "rho");
  const double x = positive(given[0], "rho"), y = positive(given[1], "rho");
  STD_TORCH_CHECK(std::min(x, y) >= std::numeric_limits<double>::min(),
                  "otloss: rho must not be subnormal, which the kernels flush to 0");
  return {x, y, std::isinf(x) && std::isinf(y)};
}

double positive(const Tensor& t, const char* name) { return positive(*numbers(t, 1, name), name); }

Clouds::Clouds(Arguments& in)
    : points(in.next<Tensors>()),
      weights(in.next<Tensors>()),
      pairs(in.next<Ints>()),
      kind(in.next_enum<CostKind>()) {
  single = !points.empty();
  for (const Tensor& x : points) single = single && x.dim() == 2;
}

void Clouds::check(int64_t dummies) const {
  const int64_t number = static_cast<int64_t>(kind);
  STD_TORCH_CHECK(is_cost(number), "otloss: there is no cost of number ", std::to_string(number));
  STD_TORCH_CHECK(pairs.size() % 2 == 0, "otloss: pairs must have an even number of entries");
  const bool of_points = !points.empty();
  const Tensors& clouds = of_points ? points : weights;
  STD_TORCH_CHECK(!clouds.empty(), "otloss: there must be points or weights");
  check_indices(pairs, clouds.size(), "pairs");
  if (!weights.empty() && of_points) check_count(weights.size(), points.size(), "weights");
  for (const Tensor& t : clouds) check_dims(t, of_points && !single ? 3 : 2, "points or weights");
  const int64_t B = of_points ? shape(0)[0] : weights[0].size(0);
  const ScalarType dtype = clouds[0].scalar_type();
  for (size_t c = 0; c < clouds.size(); ++c) {
    const int64_t n = of_points ? shape(c)[1] : weights[c].size(1);
    if (single)
      otloss::check(points[c], {n, shape(0)[2]}, dtype, "points");
    else if (of_points)
      otloss::check(points[c], {B, n, shape(0)[2]}, dtype, "points");
    if (!weights.empty())
      otloss::check(weights[c], {B, n + (of_points ? dummies : 0)}, dtype, "weights");
  }
}

Problem::Problem(Arguments& in)
    : costs(in.next<Tensors>()), clouds(in), coefficients(in.next<Doubles>()) {
  eps_ = in.next<Tensor>();
  rho_ = in.next<std::optional<Tensor>>();
  objective = in.next_enum<Objective>();
  tf32 = in.next<bool>();
  multiscale = in.next<bool>();
}

void Problem::check() {
  STD_TORCH_CHECK(!clouds.weights.empty() && !clouds.pairs.empty(),
                  "otloss: there must be weights and pairs");
  dummies = dummies_of(costs, clouds);
  clouds.check(dummies);
  check_count(coefficients.size(), count(), "coefficients");
  STD_TORCH_CHECK(objective == Objective::kRegularized || objective == Objective::kTransport,
                  "otloss: there is no objective of number ",
                  std::to_string(static_cast<int>(objective)));
  if (!costs.empty()) check_count(costs.size(), count(), "costs");
  for (size_t p = 0; p < costs.size(); ++p) {
    const int64_t matrices = is_shared(costs[p], batch()) ? 1 : batch();
    check_rows(costs[p], {matrices, a(p).size(1) - dummies, b(p).size(1) - dummies}, dtype(),
               "costs");
  }
  const int64_t given = eps_.numel();
  const double* each = numbers(eps_, given == 1 ? 1 : batch(), "eps");
  for (int64_t k = 0; k < given; ++k)
    STD_TORCH_CHECK(std::isfinite(kLog2E / positive(each[k], "eps")) && std::isfinite(each[k]),
                    "otloss: eps and 1 / eps must be finite");
  eps = given == 1 ? Eps{each[0]} : Eps{std::numeric_limits<double>::quiet_NaN(), each};
  if (multiscale) {
    STD_TORCH_CHECK(!eps.each, "otloss: multiscale has one eps for all problems");
    STD_TORCH_CHECK(costs.empty() && !clouds.points.empty(), "otloss: multiscale is of points");
    STD_TORCH_CHECK(traits_of(clouds.kind).multiscale, "otloss: multiscale has no such cost");
    const int64_t d = clouds.shape(0)[2];
    STD_TORCH_CHECK(d <= kMultiscaleDims, "otloss: multiscale has up to ",
                    std::to_string(kMultiscaleDims), " coordinates");
    STD_TORCH_CHECK(eps.all < kLargestMultiscaleEps, "otloss: multiscale has an eps below 1e150");
    for (size_t c = 0; c < clouds.weights.size() && clouds.points[c].is_cpu(); ++c)
      check_multiscale(clouds.points[c], d, clouds.weights[c], clouds.kind);
  }
  const Penalties held = penalties_of(rho_);
  rho_x = held.rho_x, rho_y = held.rho_y;
  STD_TORCH_CHECK(dummies == 0 || (count() == 1 && x(0) != y(0) && held.balanced && !multiscale),
                  "otloss: dummy points are of one balanced pair of clouds, without multiscale");
}

void Problem::fit(const Device& device) {
  if (!device.is_cuda()) return;
  STD_TORCH_CHECK(dummies == 0, "otloss: dummy points are not available on a GPU");
  STD_TORCH_CHECK(!eps.each,
                  "otloss: an eps for each problem of a batch is not available on a GPU");
  STD_TORCH_CHECK(!multiscale || objective == Objective::kRegularized,
                  "otloss: multiscale on a GPU has regularized values");
  for (Tensor& C : costs)
    if (is_shared(C, batch())) C = repeated(C, batch());
}

void Problem::check_grad(const Tensor& grad_loss) const {
  if (clouds.single && grad_loss.dim() == 0)
    otloss::check(grad_loss, {}, dtype(), "grad_loss");
  else if (grad_loss.dim() > 1)
    otloss::check(grad_loss, {count(), batch()}, dtype(), "grad_loss");
  else
    otloss::check(grad_loss, {batch()}, dtype(), "grad_loss");
}

void Problem::check_f(const Tensors& list, const char* name) const {
  check_count(list.size(), count(), name);
  for (int64_t p = 0; p < count(); ++p)
    otloss::check(list[p], {batch(), a(p).size(1)}, dtype(), name);
}

void Problem::check_g(const Tensors& list, const char* name) const {
  check_count(list.size(), count(), name);
  for (int64_t p = 0; p < count(); ++p)
    otloss::check(list[p], {batch(), b(p).size(1)}, dtype(), name);
}

}  // namespace otloss
