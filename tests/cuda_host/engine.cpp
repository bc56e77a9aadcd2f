// The CUDA engine on the host, under emulation.h, with a C interface for tests/test_cuda_host.py.
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/cost/cost.cu"
#include "cuda/gradient/envelope.cu"
#include "cuda/gradient/implicit.cu"
#include "cuda/solve/plan.cpp"
#include "cuda/gradient/point_sums.cu"
#include "cuda/solve/solve.cu"
#include "cuda/solve/start.cu"
#include "cuda/solve/streamed.cu"
#include "cuda/gradient/unrolled.cu"

namespace {

using namespace otloss;

thread_local std::string last_error;

// Device memory of a call: filled with NaN, so that what is read before it is written shows.
struct Memory {
  std::vector<std::unique_ptr<unsigned char[]>> blocks;

  cuda::Context context() {
    return {0, nullptr,
            [](int64_t bytes, void* owner) -> void* {
              auto& blocks = static_cast<Memory*>(owner)->blocks;
              blocks.emplace_back(new unsigned char[bytes]);
              std::memset(blocks.back().get(), 0xff, bytes);
              return blocks.back().get();
            },
            this};
  }
};

template <typename F>
int guarded(F&& function) {
  try {
    function();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

struct Rho {
  double x, y;
  int64_t balanced;

  Strength strength() const { return {x, y, balanced != 0}; }
};

struct SolveCall {
  Rho rho;
  int64_t batch, n, m, symmetric;
  const void *C, *a, *b;
  void *f, *g, *trace, *value;
  double* status;
  int64_t kind, d;  // without C: of the prepared points
  const void *zx, *zy, *hx, *hy;
};

template <typename T>
void solve(const SolveCall* calls, int64_t count, const SolveOptions& options) {
  std::vector<SolveGroup<T>> groups;
  for (int64_t i = 0; i < count; ++i) {
    const SolveCall& c = calls[i];
    SolveGroup<T> group{};
    group.batch = c.batch, group.n = c.n, group.m = c.m, group.symmetric = c.symmetric != 0;
    group.C = static_cast<const T*>(c.C);
    group.a = static_cast<const T*>(c.a), group.b = static_cast<const T*>(c.b);
    group.f = static_cast<T*>(c.f), group.g = static_cast<T*>(c.g);
    group.trace = static_cast<T*>(c.trace), group.value = static_cast<T*>(c.value);
    group.status = c.status;
    group.points = {static_cast<CostKind>(c.kind), c.d,
                    static_cast<const T*>(c.zx),   static_cast<const T*>(c.zy),
                    static_cast<const T*>(c.hx),   static_cast<const T*>(c.hy)};
    group.strength = c.rho.strength();
    groups.push_back(group);
  }
  Memory memory;
  cuda::solve(memory.context(), groups, options);
}

struct CostCall {
  int64_t batch, n, m, d, symmetric, kind;
  const void *x, *y, *a, *b;          // clouds and weights; a, b may be null
  void *zx, *zy, *hx, *hy, *product;  // prepared clouds and norms; <zx, zy> in, C out
  const void* W;                      // gradient of C
  void *V, *row_sum, *col_sum;
  const void* Vy;
  void* grad;  // of x, accumulated
};

// One step of the cost at a time, the caller makes the products in between.
template <typename T>
void cost(const CostCall& c, int step) {
  Memory memory;
  const cuda::Context context = memory.context();
  const CostKind kind = static_cast<CostKind>(c.kind);
  const auto in = [](const void* p) { return static_cast<const T*>(p); };
  const auto out = [](void* p) { return static_cast<T*>(p); };
  if (step == 0) {
    std::vector<CloudGroup<T>> clouds;
    clouds.push_back({c.batch, c.n, c.d, in(c.x), in(c.a), out(c.zx), out(c.hx)});
    if (!c.symmetric) clouds.push_back({c.batch, c.m, c.d, in(c.y), in(c.b), out(c.zy), out(c.hy)});
    cuda::prepare_clouds(context, clouds, kind);
  } else if (step == 1) {
    cuda::cost_matrices(context,
                        CostGroup<T>{c.batch, c.n, c.m, c.d, c.symmetric != 0, in(c.zx), in(c.zy),
                                     in(c.hx), in(c.hy), out(c.product)},
                        kind);
  } else if (step == 2) {
    cuda::cost_weights(context,
                       CostWeightGroup<T>{c.batch, c.n, c.m, c.symmetric != 0, in(c.W),
                                          in(c.product), out(c.V), out(c.row_sum), out(c.col_sum)},
                       kind);
  } else {
    cuda::cost_gradient(context,
                        CostGradientGroup<T>{c.batch, c.n, c.d, in(c.zx), in(c.hx), in(c.row_sum),
                                             in(c.Vy), out(c.grad)},
                        kind);
  }
}

struct EnvelopeCall {
  Rho rho;
  int64_t batch, n, m;
  double coefficient;
  const void *C, *a, *b, *f, *g, *grad;
  void *grad_C, *grad_a, *grad_b;
};

template <typename T>
void envelope(const EnvelopeCall* calls, int64_t count, double eps, int objective) {
  std::vector<EnvelopeGroup<T>> groups;
  for (int64_t i = 0; i < count; ++i) {
    const EnvelopeCall& c = calls[i];
    EnvelopeGroup<T> group{};
    group.batch = c.batch, group.n = c.n, group.m = c.m;
    group.C = static_cast<const T*>(c.C);
    group.a = static_cast<const T*>(c.a), group.b = static_cast<const T*>(c.b);
    group.f = static_cast<const T*>(c.f), group.g = static_cast<const T*>(c.g);
    group.grad = static_cast<const T*>(c.grad);
    group.coefficient = static_cast<T>(c.coefficient);
    group.grad_C = static_cast<T*>(c.grad_C);
    group.grad_a = static_cast<T*>(c.grad_a), group.grad_b = static_cast<T*>(c.grad_b);
    group.strength = c.rho.strength();
    groups.push_back(group);
  }
  Memory memory;
  cuda::envelope_backward(memory.context(), groups, eps, static_cast<Objective>(objective));
}

struct GradientCall {
  int64_t batch, n, m, L, symmetric, balanced;
  double coefficient, rho_x, rho_y;
  const void *C, *a, *b, *f, *g, *grad, *grad_f, *grad_g, *trace, *start;
  void *grad_C, *grad_a, *grad_b, *P;
  double* status;  // null: the unrolled gradient, else the implicit one
  int64_t kind, d;  // without C: of the prepared points
  const void *zx, *zy, *hx, *hy;
  void *sum_x, *product_x, *sum_y, *product_y;  // what the points receive, or null
};

template <typename T, typename Group>
Group gradient_group(const GradientCall& c) {
  Group group{};
  group.batch = c.batch, group.n = c.n, group.m = c.m;
  group.C = static_cast<const T*>(c.C);
  group.a = static_cast<const T*>(c.a), group.b = static_cast<const T*>(c.b);
  group.f = static_cast<const T*>(c.f), group.g = static_cast<const T*>(c.g);
  group.grad = static_cast<const T*>(c.grad);
  group.grad_f = static_cast<const T*>(c.grad_f), group.grad_g = static_cast<const T*>(c.grad_g);
  group.coefficient = static_cast<T>(c.coefficient);
  group.grad_C = static_cast<T*>(c.grad_C);
  group.grad_a = static_cast<T*>(c.grad_a), group.grad_b = static_cast<T*>(c.grad_b);
  group.strength = {c.rho_x, c.rho_y, c.balanced != 0};
  group.made = {{static_cast<CostKind>(c.kind), c.d, static_cast<const T*>(c.zx),
                 static_cast<const T*>(c.zy), static_cast<const T*>(c.hx),
                 static_cast<const T*>(c.hy)},
                c.symmetric != 0,
                {static_cast<T*>(c.sum_x), static_cast<T*>(c.product_x)},
                {static_cast<T*>(c.sum_y), static_cast<T*>(c.product_y)}};
  return group;
}

template <typename T>
void gradient(const GradientCall* calls, int64_t count, double eps, Objective objective) {
  std::vector<UnrolledGroup<T>> unrolled;
  std::vector<ImplicitGroup<T>> implicit;
  for (const GradientCall* c = calls; c < calls + count; ++c) {
    if (c->status == nullptr) {
      unrolled.push_back(gradient_group<T, UnrolledGroup<T>>(*c));
      unrolled.back().L = c->L;
      unrolled.back().trace = static_cast<const T*>(c->trace);
      unrolled.back().start = static_cast<const T*>(c->start);
    } else {
      implicit.push_back(gradient_group<T, ImplicitGroup<T>>(*c));
      implicit.back().symmetric = c->symmetric != 0;
      implicit.back().P = static_cast<T*>(c->P);
      implicit.back().status = c->status;
    }
  }
  Memory memory;
  if (!unrolled.empty()) cuda::unrolled_backward(memory.context(), unrolled, eps, objective);
  if (!implicit.empty()) cuda::implicit_backward(memory.context(), implicit, eps, objective);
}

struct PointGradientCall {
  int64_t batch, n, m, symmetric, kind, d;
  double coefficient;
  const void *zx, *zy, *hx, *hy, *a, *b, *f, *g, *grad;
  void *sum, *product;
};

template <typename T>
void point_gradients(const PointGradientCall* calls, int64_t count, double eps) {
  const auto in = [](const void* p) { return static_cast<const T*>(p); };
  std::vector<PointGradientGroup<T>> groups;
  for (int64_t i = 0; i < count; ++i) {
    const PointGradientCall& c = calls[i];
    groups.push_back({c.batch,
                      c.n,
                      c.m,
                      c.symmetric != 0,
                      {static_cast<CostKind>(c.kind), c.d, in(c.zx), in(c.zy), in(c.hx), in(c.hy)},
                      in(c.a),
                      in(c.b),
                      in(c.f),
                      in(c.g),
                      in(c.grad),
                      static_cast<T>(c.coefficient),
                      static_cast<T*>(c.sum),
                      static_cast<T*>(c.product)});
  }
  Memory memory;
  cuda::point_gradient_sums(memory.context(), groups, eps);
}

}  // namespace

extern "C" {

const char* engine_error() { return last_error.c_str(); }

void engine_configure(int multiprocessors, int capability, int64_t shared, int order) {
  auto& emulation = cuda::Emulation::get();
  emulation.limits = {multiprocessors, capability, static_cast<size_t>(shared)};
  emulation.order = static_cast<cuda::Order>(order);
}

const char* engine_plan(int is_double, int64_t problems, int64_t n, int64_t m, int64_t d) {
  thread_local std::string plan;
  Memory memory;
  const cuda::Context context = memory.context();
  plan = is_double ? cuda::describe_plan<double>(context, problems, n, m, d)
                   : cuda::describe_plan<float>(context, problems, n, m, d);
  return plan.c_str();
}

int64_t engine_launches() { return cuda::Emulation::get().launches; }

int engine_solve(int is_double, const SolveCall* calls, int64_t count, double eps, double tol,
                 int64_t max_iters, int64_t n_iters, int objective, int warm_start) {
  return guarded([&] {
    SolveOptions options{};
    options.eps = eps;
    options.tol = tol;
    options.max_iters = max_iters;
    options.n_iters = n_iters;
    options.objective = static_cast<Objective>(objective);
    options.warm_start = warm_start != 0;
    is_double ? solve<double>(calls, count, options) : solve<float>(calls, count, options);
  });
}

int engine_cost(int is_double, const CostCall* call, int step) {
  return guarded([&] { is_double ? cost<double>(*call, step) : cost<float>(*call, step); });
}

int engine_envelope(int is_double, const EnvelopeCall* calls, int64_t count, double eps,
                    int objective) {
  return guarded([&] {
    is_double ? envelope<double>(calls, count, eps, objective)
              : envelope<float>(calls, count, eps, objective);
  });
}

int engine_gradient(int is_double, const GradientCall* calls, int64_t count, double eps,
                    int objective) {
  return guarded([&] {
    const Objective which = static_cast<Objective>(objective);
    is_double ? gradient<double>(calls, count, eps, which)
              : gradient<float>(calls, count, eps, which);
  });
}

int engine_point_gradients(int is_double, const PointGradientCall* calls, int64_t count,
                           double eps) {
  return guarded([&] {
    is_double ? point_gradients<double>(calls, count, eps)
              : point_gradients<float>(calls, count, eps);
  });
}

}  // extern "C"
