// The conditional WHILE node that torch does not expose, around graphs that it has captured.
#include "cuda/solve_graph.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace deqcore::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it
  throw std::runtime_error(std::string("deqcore.capture: ") + what + ": " +
                           cudaGetErrorString(error));
}

// Appends a copy of `part` after `last`, which it replaces.
void append(cudaGraph_t graph, uintptr_t part, cudaGraphNode_t* last) {
  if (part == 0) return;
  cudaGraphNode_t node;
  check(cudaGraphAddChildGraphNode(&node, graph, last, *last == nullptr ? 0 : 1,
                                   reinterpret_cast<cudaGraph_t>(part)),
        "cudaGraphAddChildGraphNode");
  *last = node;
}

#if CUDART_VERSION >= 12040

__global__ void go_on_while_rows_remain(cudaGraphConditionalHandle handle, const int32_t* remaining,
                                        int32_t* taken, int32_t max_steps) {
  const int32_t steps = *taken + 1;
  const bool go_on = *remaining > 0 && steps < max_steps;
  *taken = go_on ? steps : 0;
  cudaGraphSetConditional(handle, go_on);
}

cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                     size_t count, cudaGraphNodeParams* parameters) {
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(node, graph, after, nullptr, count, parameters);
#else
  return cudaGraphAddNode(node, graph, after, count, parameters);
#endif
}

void append_loop(cudaGraph_t graph, uintptr_t body, const int32_t* remaining, int32_t* taken,
                 int32_t max_steps, cudaGraphNode_t* last) {
  cudaGraphConditionalHandle handle;
  check(cudaGraphConditionalHandleCreate(&handle, graph, 1, cudaGraphCondAssignDefault),
        "cudaGraphConditionalHandleCreate");
  cudaGraphNodeParams parameters = {};
  parameters.type = cudaGraphNodeTypeConditional;
  parameters.conditional.handle = handle;
  parameters.conditional.type = cudaGraphCondTypeWhile;
  parameters.conditional.size = 1;
  cudaGraphNode_t node;
  check(add_node(&node, graph, last, *last == nullptr ? 0 : 1, &parameters),
        "cudaGraphAddNode(conditional)");
  *last = node;

  const cudaGraph_t loop = parameters.conditional.phGraph_out[0];
  cudaGraphNode_t inner = nullptr;
  append(loop, body, &inner);
  void* arguments[] = {&handle, &remaining, &taken, &max_steps};
  cudaKernelNodeParams kernel = {};
  kernel.func = reinterpret_cast<void*>(&go_on_while_rows_remain);
  kernel.gridDim = dim3(1);
  kernel.blockDim = dim3(1);
  kernel.kernelParams = arguments;
  cudaGraphNode_t decision;
  check(cudaGraphAddKernelNode(&decision, loop, &inner, inner == nullptr ? 0 : 1, &kernel),
        "cudaGraphAddKernelNode");
}

#endif

}  // namespace

const char* SolveGraph::why_not_conditional() {
#if CUDART_VERSION < 12040
  return "deqcore was built with a CUDA toolkit older than 12.4";
#else
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (runtime < 12040) return "this CUDA runtime is older than 12.4";
  if (driver < 12040) return "this CUDA driver is older than 12.4";
  return "";
#endif
}

SolveGraph::SolveGraph(uintptr_t first, uintptr_t body, uintptr_t last, uintptr_t remaining,
                       uintptr_t taken, int64_t max_steps) {
  try {
    build(first, body, last, remaining, taken, max_steps);
  } catch (...) {
    release();
    throw;
  }
}

void SolveGraph::build(uintptr_t first, uintptr_t body, uintptr_t last, uintptr_t remaining,
                       uintptr_t taken, int64_t max_steps) {
  cudaGraph_t graph;
  check(cudaGraphCreate(&graph, 0), "cudaGraphCreate");
  graph_ = graph;
  cudaGraphNode_t newest = nullptr;
  append(graph, first, &newest);
  if (remaining == 0) {
    for (int64_t i = 0; i < max_steps; ++i) append(graph, body, &newest);
  } else {
    const char* const reason = why_not_conditional();
    if (*reason != '\0') throw std::runtime_error(std::string("deqcore.capture: ") + reason);
#if CUDART_VERSION >= 12040
    append_loop(graph, body, reinterpret_cast<const int32_t*>(remaining),
                reinterpret_cast<int32_t*>(taken),
                static_cast<int32_t>(std::min<int64_t>(max_steps, INT32_MAX)), &newest);
#endif
  }
  append(graph, last, &newest);
  cudaGraphExec_t executable;
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  executable_ = executable;
}

SolveGraph::~SolveGraph() { release(); }

void SolveGraph::release() {
  if (executable_ != nullptr) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
  if (graph_ != nullptr) cudaGraphDestroy(static_cast<cudaGraph_t>(graph_));
  executable_ = graph_ = nullptr;
}

void SolveGraph::launch(uintptr_t stream) {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_),
                        reinterpret_cast<cudaStream_t>(stream)),
        "cudaGraphLaunch");
}

}  // namespace deqcore::cuda
