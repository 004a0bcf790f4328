// A whole solve as one CUDA graph, from graphs of its parts that torch has captured; no torch.
#pragma once

#include <cstdint>

namespace deqcore::cuda {

// first, then body again and again while *remaining > 0, then last. Handles of the runtime
// (cudaGraph_t, cudaStream_t) and device pointers come as integers, for Python. What they name must
// outlive this.
class SolveGraph {
 public:
  // repeats: 0 to decide on the device, which needs conditional nodes; else body comes that often.
  // Throws std::runtime_error with the runtime's message.
  SolveGraph(uintptr_t first, uintptr_t body, uintptr_t last, uintptr_t remaining, int64_t repeats);
  ~SolveGraph();
  SolveGraph(const SolveGraph&) = delete;
  SolveGraph& operator=(const SolveGraph&) = delete;

  // Queues the solve on a stream (cudaStream_t) of the device that it was captured on.
  void launch(uintptr_t stream);

  // Why the body cannot be repeated on the device's own decision; empty if it can.
  static const char* why_not_conditional();

 private:
  void build(uintptr_t first, uintptr_t body, uintptr_t last, uintptr_t remaining, int64_t repeats);
  void release();
  void* graph_ = nullptr;       // cudaGraph_t
  void* executable_ = nullptr;  // cudaGraphExec_t
};

}  // namespace deqcore::cuda
