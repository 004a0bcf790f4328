// torch's parallel loops, by threads that ThreadSanitizer knows: those of an OpenMP that was not
// built for it look as if they raced. Linked into the CPU kernels, these come before torch's own.
// A loop is cut into as many parts as there are threads, however small: what is a part's size to
// torch, and to its callers a hint, would leave small tensors to one thread.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

std::atomic<uint32_t> threads = 4;

}  // namespace

extern "C" {

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t /*grain_size*/,
                                  ParallelFunc func, void* context) {
  const int64_t step = std::max<int64_t>(1, (end - begin + threads - 1) / threads);
  std::vector<std::thread> running;
  for (int64_t first = begin; first < end; first += step) {
    running.emplace_back(func, first, std::min(first + step, end), context);
  }
  for (std::thread& each : running) each.join();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = threads;
  return AOTI_TORCH_SUCCESS;
}

__attribute__((visibility("default"))) void use_threads(uint32_t count) { threads = count; }

}  // extern "C"
