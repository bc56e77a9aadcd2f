// Loops of launches that end on the device: repeat(), in a graph where the toolkit and the driver
// have loops there.
#pragma once

#include "cuda/device/block.cuh"

#if defined(__CUDACC__)

namespace otloss::cuda {

// Where the kernels of a loop go: the stream, or the body of a loop of a graph, in turn.
class Queue {
 public:
  explicit Queue(const Context& context, cudaGraph_t body = nullptr)
      : context_(context), body_(body) {}

  template <class Kernel>
  void operator()(const Kernel& work, const Grid& grid) {
    if (body_ == nullptr) return launch(context_, work, grid);
    check(allow_shared<Kernel>(context_.device), "asking for shared memory", "that of a block");
    const void* arguments[] = {&work};
    cudaKernelNodeParams node{};
    node.func = reinterpret_cast<void*>(kernel<Kernel>);
    node.gridDim = dim3(static_cast<unsigned>(grid.x));
    node.blockDim = dim3(Kernel::kThreads);
    node.sharedMemBytes = static_cast<unsigned>(grid.shared);
    node.kernelParams = const_cast<void**>(arguments);
    const cudaGraphNode_t before = last_;
    check(cudaGraphAddKernelNode(&last_, body_, &before, before == nullptr ? 0 : 1, &node),
          "adding a kernel to a graph", "a launch within the limits of the device");
  }

 private:
  const Context& context_;
  cudaGraph_t body_;
  cudaGraphNode_t last_ = nullptr;
};

#if OTLOSS_GRAPH_LOOPS
// A graph of one loop, which the stream runs, or takes into the graph that it is recorded into.
class LoopGraph {
 public:
  explicit LoopGraph(const Context& context) : stream_(static_cast<cudaStream_t>(context.stream)) {
    cudaStreamCaptureStatus status;
    check(capture_info(&status), "asking about a stream", "a stream of this device");
    recorded_ = status == cudaStreamCaptureStatusActive;
    if (!recorded_) check(cudaGraphCreate(&graph_, 0), "making a graph", "memory of the host");
  }
  ~LoopGraph() {
    if (!recorded_) cudaGraphDestroy(graph_);
  }

  // The body of the loop, or null if the driver has none.
  cudaGraph_t body(uint64_t* handle) {
    cudaGraphConditionalHandle made;
    cudaGraphNodeParams node{};
    node.type = cudaGraphNodeTypeConditional;
    node.conditional.type = cudaGraphCondTypeWhile;
    node.conditional.size = 1;
    bool good = cudaGraphConditionalHandleCreate(&made, graph_, 1, cudaGraphCondAssignDefault) ==
                cudaSuccess;
    node.conditional.handle = made;
    good = good && add(&node) == cudaSuccess;
    if (!good) cudaGetLastError();
    *handle = good ? made : 0;
    return good ? node.conditional.phGraph_out[0] : nullptr;
  }

  void run() {
    if (recorded_)
      return check(follow(), "recording a loop", "a stream that is recorded into a graph");
    cudaGraphExec_t program;
    check(cudaGraphInstantiate(&program, graph_, 0), "making a graph", "memory of the device");
    const cudaError_t launched = cudaGraphLaunch(program, stream_);
    cudaGraphExecDestroy(program);  // once it has run
    check(launched, "launching a graph", "a launch within the limits of the device");
  }

 private:
  // Edges have data since CUDA 13.
#if CUDART_VERSION >= 13000
  cudaError_t capture_info(cudaStreamCaptureStatus* status) {
    return cudaStreamGetCaptureInfo(stream_, status, nullptr, &graph_, &before_, &edges_, &count_);
  }
  cudaError_t add(cudaGraphNodeParams* node) {
    return cudaGraphAddNode(&node_, graph_, before_, edges_, count_, node);
  }
  cudaError_t follow() {
    return cudaStreamUpdateCaptureDependencies(stream_, &node_, nullptr, 1,
                                               cudaStreamSetCaptureDependencies);
  }
  const cudaGraphEdgeData* edges_ = nullptr;
#else
  cudaError_t capture_info(cudaStreamCaptureStatus* status) {
    return cudaStreamGetCaptureInfo_v2(stream_, status, nullptr, &graph_, &before_, &count_);
  }
  cudaError_t add(cudaGraphNodeParams* node) {
    return cudaGraphAddNode(&node_, graph_, before_, count_, node);
  }
  cudaError_t follow() {
    return cudaStreamUpdateCaptureDependencies(stream_, &node_, 1,
                                               cudaStreamSetCaptureDependencies);
  }
#endif

  cudaStream_t stream_;
  bool recorded_;
  cudaGraph_t graph_ = nullptr;
  const cudaGraphNode_t* before_ = nullptr;  // what the loop waits for, if recorded
  size_t count_ = 0;
  cudaGraphNode_t node_ = nullptr;
};
#endif

// Queues the kernels of a loop: body(loop, queue) gives them to the queue. Where there are no loops
// in graphs, `most` turns are launched, and those after the end find nothing to do.
template <class Body>
void repeat(const Context& context, Loop loop, int64_t most, const Body& body) {
  check(cudaSetDevice(context.device), "selecting the device", "the device of the tensors");
#if OTLOSS_GRAPH_LOOPS
  LoopGraph graph(context);
  if (cudaGraph_t inner = graph.body(&loop.handle)) {
    Queue queue(context, inner);
    body(loop, queue);
    return graph.run();
  }
#endif
  Queue queue(context);
  for (int64_t turn = 0; turn < most; ++turn) body(loop, queue);
}

}  // namespace otloss::cuda

#endif
