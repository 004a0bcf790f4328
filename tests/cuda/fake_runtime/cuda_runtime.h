// As much of the CUDA 13 runtime as csrc/cuda/solve_graph.cu calls, on the host: a graph is a list
// of things to do, and a launch does them. It refuses what the real one is documented to refuse.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define CUDART_VERSION 13000
#define __global__

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
enum cudaGraphNodeType { cudaGraphNodeTypeConditional = 13 };
enum cudaGraphConditionalNodeType { cudaGraphCondTypeIf = 0, cudaGraphCondTypeWhile = 1 };
constexpr unsigned cudaGraphCondAssignDefault = 1;
using cudaGraphConditionalHandle = unsigned long long;

struct Node;
struct Graph {
  std::vector<std::shared_ptr<Node>> nodes;
  bool has_conditional = false;
};
struct Node {
  std::function<void()> run;
  std::unique_ptr<Graph> body;
};
using cudaGraph_t = Graph*;
using cudaGraphNode_t = Node*;
using cudaGraphExec_t = Graph*;
using cudaStream_t = void*;
struct cudaGraphEdgeData;

struct dim3 {
  unsigned x = 0, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned count) : x(count) {}
};
struct cudaKernelNodeParams {
  void* func;
  dim3 gridDim, blockDim;
  unsigned sharedMemBytes;
  void** kernelParams;
  void** extra;
};
struct cudaGraphNodeParams {
  cudaGraphNodeType type;
  struct {
    cudaGraphConditionalHandle handle;
    cudaGraphConditionalNodeType type;
    unsigned size;
    cudaGraph_t* phGraph_out;
  } conditional;
};

namespace fake {
inline std::map<cudaGraphConditionalHandle, unsigned> defaults, conditions;
inline std::vector<cudaGraph_t> outputs;  // what phGraph_out points to
inline int alive = 0;                     // graphs and executables
inline int driver = 13000;
inline int fail_at = -1;  // this call fails, counted from 0
inline int calls = 0;
inline bool fails() { return calls++ == fail_at; }
inline void run(const Graph& graph) {
  for (const auto& node : graph.nodes) node->run();
}
// A chain: each node after the one before it, or nothing says in which order they run.
inline cudaError_t append(cudaGraph_t graph, const cudaGraphNode_t* after, size_t count,
                          std::shared_ptr<Node> node, cudaGraphNode_t* out) {
  const bool first = graph->nodes.empty();
  if (first ? count != 0 : count != 1 || *after != graph->nodes.back().get()) {
    return cudaErrorInvalidValue;
  }
  *out = node.get();
  graph->nodes.push_back(std::move(node));
  return cudaSuccess;
}
}  // namespace fake

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "the runtime's words"; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  return *version = fake::driver, cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}
inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
  fake::conditions.at(handle) = value;
}
inline cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags) {
  if (fake::fails() || flags != 0) return cudaErrorInvalidValue;
  ++fake::alive;
  *graph = new Graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  --fake::alive;
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* out, cudaGraph_t graph,
                                              const cudaGraphNode_t* after, size_t count,
                                              cudaGraph_t child) {
  if (fake::fails() || child->has_conditional) return cudaErrorNotSupported;
  auto node = std::make_shared<Node>();
  node->run = [copy = child->nodes] { fake::run(Graph{copy, false}); };
  return fake::append(graph, after, count, std::move(node), out);
}
inline cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* out, cudaGraph_t,
                                                    unsigned value, unsigned flags) {
  if (fake::fails() || flags > cudaGraphCondAssignDefault) return cudaErrorInvalidValue;
  *out = fake::conditions.size() + 1;
  fake::conditions[*out] = 0;
  if (flags == cudaGraphCondAssignDefault) fake::defaults[*out] = value;
  return cudaSuccess;
}
inline cudaError_t cudaGraphAddNode(cudaGraphNode_t* out, cudaGraph_t graph,
                                    const cudaGraphNode_t* after, const cudaGraphEdgeData* edges,
                                    size_t count, cudaGraphNodeParams* parameters) {
  auto& how = parameters->conditional;
  if (fake::fails() || edges != nullptr || parameters->type != cudaGraphNodeTypeConditional ||
      how.type != cudaGraphCondTypeWhile || how.size != 1) {
    return cudaErrorInvalidValue;
  }
  auto node = std::make_shared<Node>();
  node->body = std::make_unique<Graph>();
  fake::outputs = {node->body.get()};
  how.phGraph_out = fake::outputs.data();
  node->run = [body = node->body.get(), handle = how.handle] {
    while (fake::conditions.at(handle) != 0) fake::run(*body);
  };
  graph->has_conditional = true;
  return fake::append(graph, after, count, std::move(node), out);
}
inline cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* out, cudaGraph_t graph,
                                          const cudaGraphNode_t* after, size_t count,
                                          const cudaKernelNodeParams* kernel) {
  if (fake::fails() || kernel->gridDim.x != 1 || kernel->blockDim.x != 1) {
    return cudaErrorInvalidValue;
  }
  using Decision = void (*)(cudaGraphConditionalHandle, const int32_t*, int32_t*, int32_t);
  const auto decide = reinterpret_cast<Decision>(kernel->func);
  void** const at = kernel->kernelParams;  // copied now, as the runtime does
  auto node = std::make_shared<Node>();
  node->run = [decide, handle = *static_cast<cudaGraphConditionalHandle*>(at[0]),
               remaining = *static_cast<const int32_t**>(at[1]),
               taken = *static_cast<int32_t**>(at[2]),
               most = *static_cast<int32_t*>(at[3])] { decide(handle, remaining, taken, most); };
  return fake::append(graph, after, count, std::move(node), out);
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph,
                                        unsigned long long) {
  if (fake::fails()) return cudaErrorInvalidValue;
  ++fake::alive;
  *out = new Graph(*graph);
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return cudaGraphDestroy(executable);
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  if (fake::fails()) return cudaErrorInvalidValue;
  for (const auto& [handle, value] : fake::defaults) fake::conditions.at(handle) = value;
  fake::run(*executable);
  return cudaSuccess;
}
