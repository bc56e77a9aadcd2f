// Every launcher of the CPU kernels on small problems, without torch and Python: for sanitizers
// that torch does not bear, for other compilers and other machines. See run.py.
//
// Usage: driver [threads [largest]], where no cloud has more points than largest. Each line of
// output is a name, a weighted sum of what was computed and the sum of its absolute values. Outputs
// are not initialised, so that a sanitizer sees what is read before it is written.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>

#include "cost_kernels.h"
#include "cpu/parallel.h"

namespace otloss::cpu {
namespace {
int64_t threads = 4;
thread_local bool parallel = false;
}  // namespace

int64_t thread_count() { return threads; }
bool interrupted() { return false; }
void report(int64_t, double) {}

// A thread for each part but the first, which is the caller's. No parts of parts.
void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                  void* context) {
  const int64_t count = end - begin, parts = std::min(threads, count / std::max<int64_t>(1, grain));
  if (parallel || parts < 2) {
    if (count > 0) function(begin, end, context);
    return;
  }
  const int64_t size = (count + parts - 1) / parts;
  const auto part = [=](int64_t first) {
    parallel = true;
    function(first, std::min(end, first + size), context);
    parallel = false;
  };
  std::vector<std::thread> others;
  for (int64_t first = begin + size; first < end; first += size) others.emplace_back(part, first);
  part(begin);
  for (std::thread& other : others) other.join();
}

}  // namespace otloss::cpu

namespace {

using namespace otloss;

// The same numbers on every machine, in (0, 1).
double random_number() {
  static uint64_t state = 2018;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (static_cast<double>(state >> 40) + 0.5) / static_cast<double>(1 << 24);
}

template <typename T>
class Array {  // not initialised
 public:
  explicit Array(int64_t count) : count_(count), values_(new T[static_cast<size_t>(count)]) {}

  T* data() const { return values_.get(); }
  void fill(T value) { std::fill_n(data(), count_, value); }
  void randomise(double low, double high) {
    for (int64_t i = 0; i < count_; ++i)
      data()[i] = static_cast<T>(low + (high - low) * random_number());
  }
  void tell(const char* name, const char* type, const char* what) const {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < count_; ++i) {
      sum += static_cast<double>(data()[i]) * std::cos(0.1 * static_cast<double>(i));
      size += std::abs(static_cast<double>(data()[i]));
    }
    std::printf("%s/%s %s %.12g %.12g\n", name, type, what, sum, size);
  }

 private:
  int64_t count_;
  std::unique_ptr<T[]> values_;
};

template <typename T>
struct Cloud {
  int64_t B, n, d;
  Array<T> x{B * n * d}, weight{B * n}, z{B * n * d}, norm{B * n}, grad{B * n * d};

  Cloud(int64_t B, int64_t n, int64_t d, double shift) : B(B), n(n), d(d) {
    x.randomise(shift, shift + 1);
    weight.randomise(0.5, 1.5);
    for (int64_t p = 0; p < B; ++p) {
      T* w = weight.data() + p * n;
      if (n > 3) w[2] = 0;  // padding
      T sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += w[i];
      for (int64_t i = 0; i < n; ++i) w[i] /= sum;
    }
  }
  CloudGroup<T> group() { return {B, n, d, x.data(), weight.data(), z.data(), norm.data()}; }
};

struct Case {
  int64_t batch, n, m, d;
  CostKind kind;
  Objective objective;
  double rho_x;
  bool stored, self;  // self: a cloud against itself
};

template <typename T>
class Run {
 public:
  Run(const Case& c, const char* name, const char* type)
      : c_(c), name_(name), type_(type), x_(c.batch, c.n, c.d, 0), y_(c.batch, c.m, c.d, 0.3) {
    cpu::prepare_clouds<T>({x_.group(), y_.group()}, c.kind);
    cpu::cost_matrices<T>({{B(), c.n, m(), c.d, c.self, x_.z.data(), other().z.data(),
                            x_.norm.data(), other().norm.data(), C_.data(), m()}},
                          c.kind);
    tell(C_, "costs");
    grad_.randomise(0.5, 1.5);
    grad_f_.randomise(-1, 1);
    grad_g_.randomise(-1, 1);
  }

  void all() {
    solve(-1);
    envelope();
    if (!c_.stored) point_sums();
    implicit();
    solve(kIterations);
    unrolled();
    cost_gradients();
  }

 private:
  static constexpr int64_t kIterations = 5;

  int64_t B() const { return c_.batch; }
  Cloud<T>& other() { return c_.self ? x_ : y_; }
  int64_t m() const { return c_.self ? c_.n : c_.m; }
  PointPair<T> points() {
    return {c_.kind, c_.d, x_.z.data(), other().z.data(), x_.norm.data(), other().norm.data()};
  }
  Penalties penalties() const {
    return {c_.rho_x, std::numeric_limits<double>::infinity(), std::isinf(c_.rho_x)};
  }
  void tell(const Array<T>& array, const char* what) const { array.tell(name_, type_, what); }

  void solve(int64_t n_iters) {
    SolveOptions options{};
    options.eps = eps_.all;
    options.tol = sizeof(T) == sizeof(float) ? 1e-5 : 1e-11;
    options.max_iters = 2000;
    options.n_iters = n_iters;
    options.objective = c_.objective;
    SolveGroup<T> group{};
    group.batch = B();
    group.n = c_.n;
    group.m = m();
    group.symmetric = c_.self;
    group.C = c_.stored ? C_.data() : nullptr;
    group.stride = m();
    group.points = points();
    group.a = x_.weight.data();
    group.b = other().weight.data();
    group.f = f_.data();
    group.g = g_.data();
    group.trace = n_iters > 0 ? trace_.data() : nullptr;
    Array<T> loss(B());
    Array<double> status(B() * kStatusFields);
    group.status = status.data();
    group.coefficient = 0.5;
    group.penalties = penalties();
    cpu::solve<T>({group}, options);
    cpu::combine_terms(1, B(), status.data(), loss.data());
    tell(loss, n_iters > 0 ? "loss of iterations" : "loss");
    tell(f_, "f");
    tell(g_, "g");
  }

  SolvedGroup<T> solved() {
    return {B(),       c_.n,         m(),   x_.weight.data(), other().weight.data(), f_.data(),
            g_.data(), grad_.data(), T(0.5)};
  }

  EnvelopeGroup<T> envelope_group() {
    return {solved(),
            c_.stored ? C_.data() : nullptr,
            c_.stored ? grad_C_.data() : nullptr,
            grad_a_.data(),
            grad_b_.data(),
            penalties()};
  }

  void tell_gradients() {
    if (c_.stored) tell(grad_C_, "gradient of costs");
    tell(grad_a_, "gradient of a");
    tell(grad_b_, "gradient of b");
  }

  void envelope() {
    cpu::envelope_backward<T>({envelope_group()}, eps_, c_.objective);
    tell_gradients();
    if (!c_.stored) return;
    PlanWeightGroup<T> weights{};
    fill(weights);
    weights.a = x_.weight.data();
    weights.b = other().weight.data();
    weights.f = f_.data();
    weights.g = g_.data();
    weights.grad = grad_.data();
    weights.coefficient = T(0.5);
    cpu::plan_weights(weights, c_.kind, eps_);
    tell(V_, "weights of the plan");
  }

  void fill(CostWeightGroup<T>& group) {
    group.batch = B();
    group.n = c_.n;
    group.m = m();
    group.symmetrise = c_.self;
    group.C = C_.data();
    group.C_stride = m();
    group.V = V_.data();
    group.row_sum = row_sum_.data();
    group.col_sum = col_sum_.data();
  }

  void point_sums() {
    cpu::point_gradient_sums<T>(
        {PointGradientGroup<T>{solved(), c_.self, points(), row_sum_.data(), product_.data()}},
        eps_);
    x_.grad.fill(0);
    cpu::cost_gradient(CostGradientGroup<T>{B(),
                                            c_.n,
                                            c_.d,
                                            x_.z.data(),
                                            x_.norm.data(),
                                            row_sum_.data(),
                                            product_.data(),
                                            x_.grad.data(),
                                            {x_.weight.data(), f_.data()}},
                       c_.kind);
    tell(x_.grad, "gradient of points");
  }

  MadeCost<T> made() {
    if (c_.stored) return {};
    MadeCost<T> made{points(), c_.self, {row_sum_.data(), product_.data()}, {}};
    if (!c_.self) made.y = {col_sum_.data(), product_y_.data()};
    return made;
  }

  void tell_made() {
    if (c_.stored) return;
    tell(product_, "products of x");
    if (!c_.self) tell(product_y_, "products of y");
  }

  void implicit() {
    ImplicitGroup<T> group{};
    static_cast<EnvelopeGroup<T>&>(group) = envelope_group();
    group.grad_f = grad_f_.data();
    group.grad_g = c_.self ? nullptr : grad_g_.data();
    group.symmetric = c_.self;
    group.P = c_.stored ? grad_C_.data() : nullptr;
    Array<double> status(B() * kImplicitStatusFields);
    group.status = status.data();
    group.made = made();
    cpu::implicit_backward<T>({group}, eps_, c_.objective);
    tell_gradients();
    tell_made();
  }

  void unrolled() {
    UnrolledGroup<T> group{};
    static_cast<EnvelopeGroup<T>&>(group) = envelope_group();
    group.grad_f = grad_f_.data();
    group.grad_g = grad_g_.data();
    group.L = kIterations;
    group.trace = trace_.data();
    group.made = made();
    cpu::unrolled_backward<T>({group}, eps_, c_.objective);
    tell_gradients();
    tell_made();
  }

  void cost_gradients() {
    Array<T> W(B() * c_.n * m());
    W.randomise(-1, 1);
    CostWeightGroup<T> group{};
    fill(group);
    group.W = W.data();
    cpu::cost_weights(group, c_.kind);
    CloudGradientGroup<T> cloud{B(), c_.n, c_.d, x_.z.data(), x_.norm.data(), x_.grad.data(), {}};
    const auto& to = other();
    cloud.terms.push_back(
        {m(), false, V_.data(), to.z.data(), to.norm.data(), row_sum_.data(), {}});
    cpu::cloud_gradients<T>({cloud}, c_.kind);
    tell(x_.grad, "gradient of points");
  }

  const Case c_;
  const char *const name_, *const type_;  // no std::string, whose code no sanitizer has seen
  const Eps eps_{0.2, nullptr};
  Cloud<T> x_, y_;
  Array<T> C_{B() * c_.n * m()}, grad_C_{B() * c_.n * m()}, V_{B() * c_.n * m()};
  Array<T> f_{B() * c_.n}, g_{B() * m()}, grad_f_{B() * c_.n}, grad_g_{B() * m()};
  Array<T> grad_a_{B() * c_.n}, grad_b_{B() * m()}, row_sum_{B() * c_.n}, col_sum_{B() * m()};
  Array<T> product_{B() * c_.n * c_.d}, product_y_{B() * m() * c_.d}, grad_{B()};
  Array<T> trace_{B() * kIterations * (c_.n + m())};
};

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) cpu::threads = std::atoi(arguments[1]);
  const int64_t largest = count > 2 ? std::atoi(arguments[2]) : 1 << 20;
  const double inf = std::numeric_limits<double>::infinity();
  const int64_t shapes[][4] = {{5, 37, 45, 3}, {1, 1, 1, 1}, {1, 560, 1030, 2}, {2, 33, 18, 150}};
  for (const auto& shape : shapes)
    for (int kind = 0; kind < 3; ++kind)
      for (const bool transport : {false, true})
        for (const double rho : {inf, 0.5})
          for (const bool stored : {false, true})
            for (const bool self : {false, true}) {
              const Case c{shape[0],
                           std::min(shape[1], largest),
                           std::min(shape[2], largest),
                           shape[3],
                           static_cast<CostKind>(kind),
                           transport ? Objective::kTransport : Objective::kRegularized,
                           rho,
                           stored,
                           self};
              if (self && std::isfinite(rho)) continue;  // a marginal soft on one side alone
              char name[64];
              std::snprintf(name, sizeof(name), "%d/%d/%s/%s/%s/%s", static_cast<int>(shape[1]),
                            kind, transport ? "transport" : "regularized",
                            std::isinf(rho) ? "hard" : "soft", stored ? "stored" : "made",
                            self ? "self" : "pair");
              Run<float>(c, name, "float").all();
              Run<double>(c, name, "double").all();
            }
}
