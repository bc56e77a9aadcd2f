#include "bindings/gradients.h"

#include <algorithm>

namespace otloss {

Wanted::Wanted(Arguments& in)
    : costs(in.next<Ints>()), points(in.next<Ints>()), weights(in.next<bool>()) {}

void Wanted::check(const Problem& problem) const {
  check_indices(costs, problem.costs.size(), "want_costs");
  check_indices(points, problem.clouds.points.size(), "want_points");
}

template <typename T>
Gradients<T>::Gradients(const Device& device, const Problem& problem, const Tensor& grad_loss,
                        const Wanted& wanted, const std::optional<Tensor>& prepared,
                        int64_t entries)
    : device_(device),
      problem_(problem),
      grad_loss_(grad_loss),
      wanted_(wanted),
      clouds_(prepare<T>(device, problem.clouds, prepared, entries)),
      points_(device, clouds_, wanted.points),
      grad_C_(problem.count()) {}

template <typename T>
SolvedGroup<T> Gradients<T>::solved(int64_t p, int64_t i, int64_t j, const T* f, const T* g) const {
  const Tensor &a = problem_.clouds.weights[i], &b = problem_.clouds.weights[j];
  const T coefficient = static_cast<T>(problem_.coefficients[p]);
  return {a.size(0), a.size(1), b.size(1), data<T>(a),  data<T>(b),
          f,         g,         grad(p),   coefficient, problem_.dummies};
}

template <typename T>
SolvedGroup<T> Gradients<T>::of_points(int64_t p, int64_t i, int64_t j, const Tensor& f,
                                       const Tensor& g) {
  SolvedGroup<T> group = solved(p, i, j, data<T>(f), data<T>(g));
  group.n -= problem_.dummies, group.m -= problem_.dummies, group.dummies = 0;
  const auto real = [&](const Tensor& t, int64_t count) {
    kept_.push_back(first_entries(t, count));
    return data<T>(kept_.back());
  };
  group.a = real(problem_.clouds.weights[i], group.n), group.f = real(f, group.n);
  group.b = real(problem_.clouds.weights[j], group.m), group.g = real(g, group.m);
  return group;
}

template <typename T>
EnvelopeGroup<T> Gradients<T>::group(int64_t p, bool matrices, const T* f, const T* g) {
  const Tensor &a = problem_.a(p), &b = problem_.b(p);
  const auto listed = [&](const Ints& list, int64_t k) {
    return std::find(list.begin(), list.end(), k) != list.end();
  };
  const bool of_points =
      listed(wanted_.points, problem_.x(p)) || listed(wanted_.points, problem_.y(p));
  EnvelopeGroup<T> group{};
  static_cast<SolvedGroup<T>&>(group) = solved(p, problem_.x(p), problem_.y(p), f, g);
  if (!problem_.costs.empty())
    group.C = data<T>(problem_.costs[p]), group.shared = is_shared(problem_.costs[p], group.batch);
  if (listed(wanted_.costs, p) || (matrices && of_points)) {
    STD_TORCH_CHECK(problem_.costs[p].is_contiguous(), "otloss: costs must be contiguous");
    const int64_t without = matrices ? 0 : group.dummies;
    grad_C_[p] = empty(a, {group.batch, group.n - without, group.m - without});
    group.grad_C = data<T>(grad_C_[p]);
  }
  if (wanted_.weights) {
    grad_a_.push_back(empty(a, {group.batch, group.n}));
    grad_b_.push_back(empty(b, {group.batch, group.m}));
    group.grad_a = data<T>(grad_a_.back());
    group.grad_b = data<T>(grad_b_.back());
  }
  group.penalties = problem_.penalties(p);
  return group;
}

template <typename T>
PointSums<T> Gradients<T>::side(int64_t c, SolvedSide<T> solved) {
  if (!points_.wants(c)) return {};
  const CloudGroup<T>& cloud = clouds_.clouds[c];
  const auto made = [&](std::initializer_list<int64_t> shape) {
    return empty(clouds_.memory, shape);
  };
  sides_.push_back(
      {c, made({cloud.batch, cloud.n}), made({cloud.batch, cloud.n, cloud.d}), solved});
  return {data<T>(sides_.back().sum), data<T>(sides_.back().product)};
}

template <typename T>
MadeCost<T> Gradients<T>::made(int64_t p) {
  const int64_t i = problem_.x(p), j = problem_.y(p);
  const bool once = i == j && !device_.is_cuda();
  const PointSums<T> x = side(i), y = once ? PointSums<T>{} : side(j);
  return {clouds_.pair(i, j, false, false), i == j, x, y};
}

template <typename T>
void Gradients<T>::add_plan_side(std::vector<PointGradientGroup<T>>& groups, int64_t p, int64_t i,
                                 int64_t j, const Tensor& f, const Tensor& g) {
  if (!points_.wants(i)) return;
  const SolvedGroup<T> group = of_points(p, i, j, f, g);
  const PointSums<T> sums = side(i, {group.a, group.f});
  groups.push_back(
      {group, i == j, clouds_.pair(i, j, problem_.tf32, false), sums.sum, sums.product});
}

template <typename T>
PlanSumsGroup<T> Gradients<T>::plan_sides(int64_t p, const Tensor& f, const Tensor& g) {
  const int64_t i = problem_.x(p), j = problem_.y(p);
  const SolvedGroup<T> group = solved(p, i, j, data<T>(f), data<T>(g));
  const PointSums<T> x = side(i, {group.a, group.f});
  const PointSums<T> y = i == j ? PointSums<T>{} : side(j, {group.b, group.g});
  return {group,
          {as_given<T>(problem_.clouds).pair(i, j, false, true), i == j, x, y},
          problem_.penalties(p)};
}

template <typename T>
void Gradients<T>::add_sums() {
  for (const Side& side : sides_)
    points_.add_side(side.cloud, data<T>(side.sum), data<T>(side.product), side.solved);
}

template <typename T>
void Gradients<T>::add_matrices() {
  if (wanted_.points.empty()) return;
  for (int64_t p = 0; p < problem_.count(); ++p) {
    if (!grad_C_[p].defined()) continue;
    PlanWeightGroup<T> group{};
    group.W = data<T>(grad_C_[p]);
    points_.add_pair(problem_.x(p), problem_.y(p), as_matrix<T>(problem_.costs[p]), group,
                     problem_.eps);
  }
}

template <typename T>
void Gradients<T>::add_plan(int64_t p, const Matrix<T>& C, const T* f, const T* g) {
  PlanWeightGroup<T> group{};
  group.a = data<T>(problem_.a(p));
  group.b = data<T>(problem_.b(p));
  group.f = f;
  group.g = g;
  group.grad = grad(p);
  group.coefficient = static_cast<T>(problem_.coefficients[p]);
  points_.add_pair(problem_.x(p), problem_.y(p), C, group, problem_.eps);
}

template class Gradients<float>;
template class Gradients<double>;

}  // namespace otloss
