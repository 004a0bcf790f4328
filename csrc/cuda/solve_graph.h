// A whole solve as one CUDA graph, from graphs of its parts that torch has captured; no torch.
#pragma once

#include <cstdint>

namespace deqcore::cuda {

// first, then body at least once and while *remaining > 0, max_steps times at most, then last.
// Handles of the runtime (cudaGraph_t, cudaStream_t) and device pointers come as integers, for
// Python. What they name must outlive this.
class SolveGraph {
 public:
  // first, last: 0 for none. remaining: an int32 read on the device, which needs conditional nodes;
  // 0 for a graph that takes max_steps steps. taken: an int32 of zero, which the device counts in
  // and sets back: a row that never ended would keep the GPU busy for ever.
  // Throws std::runtime_error with the runtime's message.
  SolveGraph(uintptr_t first, uintptr_t body, uintptr_t last, uintptr_t remaining, uintptr_t taken,
             int64_t max_steps);
  ~SolveGraph();
  SolveGraph(const SolveGraph&) = delete;
  SolveGraph& operator=(const SolveGraph&) = delete;

  // Queues the solve on a stream (cudaStream_t) of the device that it was captured on.
  void launch(uintptr_t stream);

  // Why the body cannot be repeated on the device's own decision; empty if it can.
  static const char* why_not_conditional();

 private:
  void build(uintptr_t first, uintptr_t body, uintptr_t last, uintptr_t remaining, uintptr_t taken,
             int64_t max_steps);
  void release();
  void* graph_ = nullptr;       // cudaGraph_t
  void* executable_ = nullptr;  // cudaGraphExec_t
};

}  // namespace deqcore::cuda
