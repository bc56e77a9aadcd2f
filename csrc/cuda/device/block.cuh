// The thin layer that kernels are written against: what a thread knows of its block, and launching.
//
// A kernel is a plain struct with its arguments and `template <class Block> void operator()(Block&)
// const`, the work of one thread. The same struct runs on a GPU, and on the host under
// tests/cuda_host/emulation.h, where each thread is a fiber and barriers switch between them.
//
// A Block gives barriers: sync(), sync_some(group, threads), warp_sync(), cluster_sync(); within a
// warp shuffles and votes; shared<T>(), the dynamic shared memory; load and store of what other
// blocks write, past L1; compare_and_swap of such an int; load_constant of 16 bytes that nobody
// writes; copy_async of 16 bytes to shared memory, commit_copies() and wait_for_copies<pending>();
// count_off(loop, done), see Loop.
//
// And for tensor cores, on half precision numbers as their 16 bits, two in a word, where lane l is
// in row l / 4, columns 2 (l % 4) and the next, of each 8 x 8 matrix: load_matrices(row, words)
// (lane l gives row l % 8 of matrix l / 8 in shared memory), multiply_add(c, a, b0, b1) (c (16, 8)
// += a (16, 16) b (16, 8); a: matrices (0, 0), (1, 0), (0, 1), (1, 1), b: transposed matrices).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device/limits.h"
#include "kernels.h"

namespace otloss::cuda {

struct Grid {
  int64_t x = 1;      // blocks
  size_t shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;    // blocks of a thread-block cluster along x
};

// A loop of launches that ends on the device when all of its blocks are done: repeat() queues it,
// and in each turn one thread of each block calls count_off(loop, whether it is done now).
struct Loop {
  unsigned* done;  // 0 at first
  unsigned count;
  uint64_t handle = 0;
};

}  // namespace otloss::cuda

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#if !defined(OTLOSS_GRAPH_LOOPS)
#define OTLOSS_GRAPH_LOOPS (CUDART_VERSION >= 12040)
#endif

#define OTLOSS_DEVICE __device__ __forceinline__
#define OTLOSS_NOINLINE __device__ __noinline__

namespace otloss::cuda {

inline void check(cudaError_t error, const char* what, const char* expected) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next call must not find it
  throw std::runtime_error(std::string("otloss: ") + what +
                           " failed: " + cudaGetErrorString(error) + ". Expected " + expected);
}

// To half precision, to the nearest, and back.
__device__ __forceinline__ uint16_t to_half(float x) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
}
__device__ __forceinline__ float from_half(uint16_t half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}

class GpuBlock {
 public:
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int64_t x() const { return blockIdx.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void warp_sync() const { __syncwarp(); }
  template <typename T>
  __device__ T shuffle_xor(T value, int mask) const {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }
  template <typename T>
  __device__ T shuffle(T value, int lane) const {
    return __shfl_sync(0xffffffffu, value, lane);
  }
  __device__ bool any(bool flag) const { return __any_sync(0xffffffffu, flag) != 0; }
  __device__ unsigned ballot(bool flag) const { return __ballot_sync(0xffffffffu, flag); }

  __device__ void cluster_sync() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __trap();  // the launcher asks for clusters from compute capability 9.0 on
#endif
  }

  // A barrier of `threads` threads, whole warps; `group`: 1 to 15, for those that meet at once.
  __device__ void sync_some(int group, int threads) const {
    asm volatile("bar.sync %0, %1;" ::"r"(group), "r"(threads) : "memory");
  }

  template <typename T>
  __device__ T load(const T* p) const {
    return __ldcg(p);
  }
  template <typename T>
  __device__ void store(T* p, T value) const {
    __stcg(p, value);
  }

  // What was there, where the value now is if that was the one expected.
  __device__ int compare_and_swap(int* p, int expected, int value) const {
    return atomicCAS(p, expected, value);
  }

  template <typename V>
  __device__ V load_constant(const V* p) const {
    static_assert(sizeof(V) == 16, "loads 16 bytes");
    return bit_cast<V>(__ldg(reinterpret_cast<const uint4*>(p)));
  }
  template <typename T>
  __device__ void copy_async(T* to, const T* from) const {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  }
  // Only the first block may end the loop: a turn later than the last one was done, if it was
  // not the last.
  __device__ void count_off(const Loop& loop, bool done) const {
    if (done) atomicAdd(loop.done, 1u);
#if OTLOSS_GRAPH_LOOPS
    if (blockIdx.x == 0 && loop.handle != 0 && load(loop.done) == loop.count)
      cudaGraphSetConditional(loop.handle, 0);
#endif
  }

  __device__ void commit_copies() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kPending = 0>
  __device__ void wait_for_copies() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  __device__ void load_matrices(const uint16_t* row, uint32_t (&to)[4]) const {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
  }
  __device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                               uint32_t b1) const {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

  template <typename T>
  __device__ T* shared() const {
    extern __shared__ __align__(16) unsigned char otloss_shared[];
    return reinterpret_cast<T*>(otloss_shared);
  }
};

// Blocks that a multiprocessor is to have at once: Kernel::kResidentBlocks, or 1.
template <class Kernel, class = void>
constexpr int kBlocksOf = 1;
template <class Kernel>
constexpr int kBlocksOf<Kernel, std::void_t<decltype(Kernel::kResidentBlocks)>> =
    Kernel::kResidentBlocks;

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, kBlocksOf<Kernel>)
    kernel(const __grid_constant__ Kernel work) {
  GpuBlock block;
  work(block);
}

inline Limits limits(int device) {
  int multiprocessors = 0, major = 0, minor = 0, shared = 0;
  const auto get = [device](int* value, cudaDeviceAttr attribute) {
    check(cudaDeviceGetAttribute(value, attribute, device), "reading a device attribute",
          "a working CUDA device");
  };
  get(&multiprocessors, cudaDevAttrMultiProcessorCount);
  get(&major, cudaDevAttrComputeCapabilityMajor);
  get(&minor, cudaDevAttrComputeCapabilityMinor);
  get(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return {multiprocessors, 10 * major + minor, static_cast<size_t>(shared)};
}

// Allows a kernel all the shared memory that a block of the device can have. That is not what a
// launch takes, so that threads which launch the same kernel at once do not disturb each other.
template <class Kernel>
cudaError_t allow_shared(int device) {
  return cudaFuncSetAttribute(kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(limits(device).shared_per_block));
}

inline void clear(const Context& context, void* memory, int64_t bytes) {
  check(cudaSetDevice(context.device), "selecting the device", "the device of the tensors");
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes),
                        static_cast<cudaStream_t>(context.stream)),
        "clearing memory", "a working CUDA device");
}

// To the host, which waits for all that the stream was given before.
inline void read(const Context& context, void* to, const void* from, int64_t bytes) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream),
        "reading from the device", "a stream that is not recorded into a graph");
  check(cudaStreamSynchronize(stream), "waiting for the device", "a working CUDA device");
}

template <class Kernel>
void launch(const Context& context, const Kernel& work, const Grid& grid) {
  constexpr const char* kExpected =
      "a kernel image for this device (OTLOSS_CUDA_ARCH at build time) and a launch within its "
      "limits; an earlier asynchronous error shows here too (CUDA_LAUNCH_BLOCKING=1 tells them "
      "apart)";
  static_assert(sizeof(Kernel) <= 4096, "kernel parameters are limited to 4 KB");
  static_assert(Kernel::kThreads % kWarp == 0 && Kernel::kThreads <= 1024, "whole warps, 1024");
  if (grid.x == 0) return;
  check(cudaSetDevice(context.device), "selecting the device", "the device of the tensors");
  constexpr size_t kSharedUnasked = 48 * 1024;
  if (grid.shared > kSharedUnasked)
    check(allow_shared<Kernel>(context.device), "asking for shared memory", kExpected);
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x));
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(context.stream);
  config.attrs = &attribute;
  if (grid.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel<Kernel>, work), "a kernel launch", kExpected);
}

}  // namespace otloss::cuda

#else

#define OTLOSS_DEVICE inline

#include "emulation.h"

#endif
