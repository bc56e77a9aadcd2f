// Runs the kernels of csrc/cuda on the host, so that they are tested without a GPU: each thread of
// each block is a fiber, and barriers and shuffles switch between fibers.
//
// block.cuh includes this file when it is not compiled by nvcc. The order in which fibers run can
// be set (order()); a kernel whose result depends on it has a race. A barrier that not all threads
// reach, or a wait that cannot end, is reported as an error. Not emulated: the memory model (all
// blocks see all writes at once), and anything about speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define OTLOSS_DEVICE inline
#define OTLOSS_NOINLINE inline

namespace otloss::cuda {

// All threads in turn, or as much as can be done of the first warp, or of the last, before another
// one goes on.
enum class Order { kForward, kBackward, kShuffled, kFirstWarp, kLastWarp };

struct Emulation {
  Limits limits{8, 90, 227 * 1024};
  Order order = Order::kForward;
  int64_t launches = 0;
  int64_t switches = 0;

  static Emulation& get() {
    static Emulation instance;
    return instance;
  }
};

struct Fiber;

// What threads arrive at: it opens when all have.
struct Gate {
  int size = 0;
  int arrived = 0;
  uint64_t generation = 0;
};

struct HostWarp {
  Gate gate;
  unsigned char slots[2][kWarp][24];  // values on their way, alternating
};

struct HostBlock {
  int64_t x;
  Gate gate;
  Gate groups[16];  // sync_some
  Gate* cluster;
  std::vector<HostWarp> warps;
  std::vector<unsigned char> memory;  // shared memory between two guard zones
};

constexpr size_t kGuard = 4096;
constexpr size_t kStack = 256 * 1024;

class EmulatedBlock;

// Stacks are kept for the next launch: to map new ones takes longer than most kernels run.
class Stack {
 public:
  Stack() {
    if (spare().empty()) spare().emplace_back(new char[kStack]);
    memory_ = std::move(spare().back());
    spare().pop_back();
  }
  ~Stack() { spare().push_back(std::move(memory_)); }
  char* get() const { return memory_.get(); }

 private:
  static std::vector<std::unique_ptr<char[]>>& spare() {
    static thread_local std::vector<std::unique_ptr<char[]>> stacks;
    return stacks;
  }
  std::unique_ptr<char[]> memory_;
};

// 16 bytes on their way into shared memory.
struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  jmp_buf state;
  ucontext_t context;
  std::unique_ptr<Stack> stack;
  HostBlock* block;
  int thread;
  bool started = false, done = false;
  const Gate* waiting_for = nullptr;
  uint64_t waiting_since = 0;
  std::vector<Copy> copies;
  std::vector<size_t> commits;  // how many of them each commit covers
  void (*body)(Fiber*, const void*) = nullptr;
  const void* work = nullptr;
};

class Scheduler {
 public:
  static Scheduler*& current() {
    static thread_local Scheduler* instance = nullptr;  // Python threads call operations at once
    return instance;
  }

  void run(std::vector<std::unique_ptr<Fiber>>& fibers) {
    Scheduler* const before = current();
    current() = this;
    std::vector<Fiber*> order;
    for (auto& fiber : fibers) order.push_back(fiber.get());
    uint64_t random = 0x9e3779b97f4a7c15ull;
    size_t left = order.size();
    const bool by_warps = Emulation::get().order >= Order::kFirstWarp;
    if (Emulation::get().order == Order::kBackward || Emulation::get().order == Order::kLastWarp)
      order = std::vector<Fiber*>(order.rbegin(), order.rend());
    while (left > 0) {
      if (Emulation::get().order == Order::kShuffled)
        for (size_t i = order.size(); i > 1; --i) {
          random ^= random << 13, random ^= random >> 7, random ^= random << 17;
          std::swap(order[i - 1], order[random % i]);
        }
      bool progress = false;
      for (size_t i = 0; i < order.size() && !(by_warps && progress && i % kWarp == 0); ++i) {
        Fiber* const fiber = order[i];
        if (fiber->done || !runnable(*fiber)) continue;
        progress = true;
        resume(fiber);
        if (fiber->done) --left;
      }
      if (!progress) {
        current() = before;
        throw std::runtime_error("emulation: a barrier that not all threads reach");
      }
    }
    current() = before;
  }

  // Called by the running fiber: others go on, until it is runnable again.
  void yield() {
    Fiber* const self = running_;
    if (_setjmp(self->state) == 0) _longjmp(scheduler_, 1);
  }

  Fiber* running() const { return running_; }

 private:
  static bool runnable(const Fiber& fiber) {
    if (fiber.waiting_for) return fiber.waiting_for->generation != fiber.waiting_since;
    return true;
  }

  void resume(Fiber* fiber) {
    running_ = fiber;
    ++Emulation::get().switches;
    fiber->waiting_for = nullptr;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber->started) _longjmp(fiber->state, 1);
    fiber->started = true;
    fiber->stack = std::make_unique<Stack>();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack->get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(&Scheduler::entry), 0);
    setcontext(&fiber->context);
  }

  static void entry() {
    Scheduler* const self = current();
    Fiber* const fiber = self->running_;
    fiber->body(fiber, fiber->work);
    fiber->done = true;
    _longjmp(self->scheduler_, 1);
  }

  jmp_buf scheduler_;
  Fiber* running_ = nullptr;
};

// Half precision: 5 bits of exponent, 10 of mantissa, to the nearest, ties to even.
inline uint16_t to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16
  if (magnitude < 0x38800000)  // denormal: a multiple of 2^-24
    return static_cast<uint16_t>(
        sign | static_cast<uint32_t>(std::lrint(std::ldexp(bit_cast<float>(magnitude), 24))));
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}

inline float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | magnitude << 13);
  if (magnitude >= 0x400) return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000));
  const float value = static_cast<float>(magnitude) * 0x1p-24f;
  return sign != 0 ? -value : value;
}

class EmulatedBlock {
 public:
  explicit EmulatedBlock(Fiber* fiber) : fiber_(fiber), block_(*fiber->block) {}

  int thread() const { return fiber_->thread; }
  int64_t x() const { return block_.x; }

  void sync() const { wait(block_.gate); }
  void sync_some(int group, int threads) const {
    block_.groups[group].size = threads;
    wait(block_.groups[group]);
  }
  void warp_sync() const { wait(warp().gate); }
  void cluster_sync() const { wait(*block_.cluster); }

  template <typename T>
  T shuffle(T value, int lane) const {
    static_assert(sizeof(T) <= 16, "shuffles move up to 16 bytes");
    HostWarp& warp = this->warp();
    const int side = static_cast<int>(warp.gate.generation % 2);
    std::memcpy(warp.slots[side][fiber_->thread % kWarp], &value, sizeof(T));
    wait(warp.gate);
    T result;
    std::memcpy(&result, warp.slots[side][lane], sizeof(T));
    return result;
  }
  template <typename T>
  T shuffle_xor(T value, int mask) const {
    return shuffle(value, (fiber_->thread % kWarp) ^ mask);
  }
  bool any(bool flag) const { return ballot(flag) != 0; }
  unsigned ballot(bool flag) const {
    HostWarp& warp = this->warp();
    const int side = static_cast<int>(warp.gate.generation % 2);
    warp.slots[side][fiber_->thread % kWarp][0] = flag;
    wait(warp.gate);
    unsigned result = 0;
    for (int lane = 0; lane < kWarp; ++lane)
      if (warp.slots[side][lane][0]) result |= 1u << lane;
    return result;
  }

  template <typename T>
  T load(const T* p) const {
    return *p;
  }
  template <typename T>
  void store(T* p, T value) const {
    *p = value;
  }
  int compare_and_swap(int* p, int expected, int value) {
    const int found = *p;
    if (found == expected) *p = value;
    return found;
  }
  template <typename V>
  V load_constant(const V* p) const {
    return *p;
  }
  // Copies arrive when they are waited for or, in backward order, at once: the first shows a use
  // that comes too early, the second a buffer that is still in use.
  template <typename T>
  void copy_async(T* to, const T* from) const {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
      std::fputs("emulation: a copy of 16 bytes that is not aligned\n", stderr);
      std::abort();  // an exception cannot leave a fiber
    }
    fiber_->copies.push_back({to, from});
    if (Emulation::get().order == Order::kBackward) finish_copies(fiber_->copies.size());
  }
  void count_off(const Loop& loop, bool done) const {
    if (done) ++*loop.done;
  }
  void commit_copies() const { fiber_->commits.push_back(fiber_->copies.size()); }
  template <int kPending = 0>
  void wait_for_copies() const {
    std::vector<size_t>& commits = fiber_->commits;
    if (commits.size() <= kPending) return;
    const auto done = commits.end() - kPending;
    finish_copies(*(done - 1));
    commits.erase(commits.begin(), done);
  }

  void load_matrices(const uint16_t* row, uint32_t (&to)[4]) const {
    const unsigned char (*slots)[24] = exchange(row, 16, nullptr, 0);
    const int i = fiber_->thread % kWarp / 4, j = 2 * (fiber_->thread % 4);
    for (int q = 0; q < 4; ++q) std::memcpy(&to[q], slots[8 * q + i] + 2 * j, sizeof(to[q]));
  }
  // Products are exact; each sum of 16 of them and c is rounded once, towards zero.
  void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    const uint32_t b[2] = {b0, b1};
    const unsigned char (*slots)[24] = exchange(a, 16, b, 8);
    const int lane = fiber_->thread % kWarp;
    const auto pair = [&](int from, int word) {
      uint32_t halves;
      std::memcpy(&halves, slots[from] + 4 * word, sizeof(halves));
      return halves;
    };
    double sum[4] = {c[0], c[1], c[2], c[3]};
    for (int k = 0; k < 16; k += 2) {
      const int from = k % 8 / 2, later = k / 8;
      for (int row = 0; row < 2; ++row) {
        const uint32_t x = pair(lane / 4 * 4 + from, 2 * later + row);
        for (int column = 0; column < 2; ++column) {
          const uint32_t y = pair((lane % 4 * 2 + column) * 4 + from, 4 + later);
          sum[2 * row + column] += product(x & 0xffff, y & 0xffff) + product(x >> 16, y >> 16);
        }
      }
    }
    for (int q = 0; q < 4; ++q) c[q] = towards_zero(sum[q]);
  }

  template <typename T>
  T* shared() const {
    return reinterpret_cast<T*>(block_.memory.data() + kGuard);
  }

 private:
  HostWarp& warp() const { return block_.warps[fiber_->thread / kWarp]; }

  void finish_copies(size_t count) const {
    std::vector<Copy>& copies = fiber_->copies;
    for (size_t c = 0; c < count; ++c) std::memcpy(copies[c].to, copies[c].from, 16);
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(count));
    for (size_t& commit : fiber_->commits) commit -= commit < count ? commit : count;
  }

  // What each lane of the warp gives, side by side.
  const unsigned char (*exchange(const void* first, size_t size, const void* second,
                                 size_t second_size) const)[24] {
    HostWarp& warp = this->warp();
    const int side = static_cast<int>(warp.gate.generation % 2);
    unsigned char* slot = warp.slots[side][fiber_->thread % kWarp];
    std::memcpy(slot, first, size);
    if (second_size > 0) std::memcpy(slot + size, second, second_size);
    wait(warp.gate);
    return warp.slots[side];
  }

  static double product(uint32_t x, uint32_t y) {
    return static_cast<double>(from_half(static_cast<uint16_t>(x))) *
           static_cast<double>(from_half(static_cast<uint16_t>(y)));
  }

  static float towards_zero(double x) {
    const float nearest = static_cast<float>(x);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f)
                                                                  : nearest;
  }

  void wait(Gate& gate) const {
    if (++gate.arrived == gate.size) {
      gate.arrived = 0;
      ++gate.generation;
      return;
    }
    fiber_->waiting_for = &gate;
    fiber_->waiting_since = gate.generation;
    Scheduler::current()->yield();
  }

  Fiber* fiber_;
  HostBlock& block_;
};

inline Limits limits(int) { return Emulation::get().limits; }

inline void clear(const Context&, void* memory, int64_t bytes) {
  std::memset(memory, 0, static_cast<size_t>(bytes));
}

inline void read(const Context&, void* to, const void* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Blocks of a cluster run together; clusters one after the other.
template <class Kernel>
void launch(const Context&, const Kernel& work, const Grid& grid) {
  static_assert(sizeof(Kernel) <= 4096, "kernel parameters are limited to 4 KB");
  if (grid.x == 0) return;
  if (grid.shared > Emulation::get().limits.shared_per_block)
    throw std::runtime_error("emulation: too much shared memory was asked for");
  if (grid.x > 0x7fffffff) throw std::runtime_error("emulation: the grid is too large");
  if (grid.x % grid.cluster != 0)
    throw std::runtime_error("emulation: the grid is not whole clusters");
  ++Emulation::get().launches;
  const int64_t together = grid.cluster, total = grid.x;
  for (int64_t first = 0; first < total; first += together) {
    Gate cluster;
    cluster.size = static_cast<int>(together) * Kernel::kThreads;
    std::vector<HostBlock> blocks(static_cast<size_t>(together));
    std::vector<std::unique_ptr<Fiber>> fibers;
    for (int64_t b = 0; b < together; ++b) {
      HostBlock& block = blocks[static_cast<size_t>(b)];
      block.x = first + b;
      block.gate.size = Kernel::kThreads;
      block.cluster = &cluster;
      block.warps.resize(Kernel::kThreads / kWarp);
      for (HostWarp& warp : block.warps) warp.gate.size = kWarp;
      // Not 0: what is read before it is written shows up as NaN.
      block.memory.assign(grid.shared + 2 * kGuard, 0xff);
      for (int t = 0; t < Kernel::kThreads; ++t) {
        auto fiber = std::make_unique<Fiber>();
        fiber->block = &block;
        fiber->thread = t;
        fiber->work = &work;
        fiber->body = [](Fiber* self, const void* kernel) {
          EmulatedBlock view(self);
          (*static_cast<const Kernel*>(kernel))(view);
        };
        fibers.push_back(std::move(fiber));
      }
    }
    Scheduler().run(fibers);
    for (const HostBlock& block : blocks)
      for (size_t k = 0; k < kGuard; ++k)
        if (block.memory[k] != 0xff || block.memory[kGuard + grid.shared + k] != 0xff)
          throw std::runtime_error("emulation: a write outside shared memory");
  }
}

class Queue {
 public:
  explicit Queue(const Context& context) : context_(context) {}
  template <class Kernel>
  void operator()(const Kernel& work, const Grid& grid) {
    launch(context_, work, grid);
  }

 private:
  const Context& context_;
};

// With one turn more, as where launches after the end have to find nothing to do.
template <class Body>
void repeat(const Context& context, const Loop& loop, int64_t most, const Body& body) {
  Queue queue(context);
  for (int64_t turn = 0; turn < most && *loop.done < loop.count; ++turn) body(loop, queue);
  if (*loop.done != loop.count) throw std::runtime_error("emulation: a loop that does not end");
  body(loop, queue);
}

}  // namespace otloss::cuda
