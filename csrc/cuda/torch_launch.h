// What the CUDA bindings share: their tensors' device, their scratch memory, a launch's errors.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>

#if defined(EMULATION_BINDINGS)
#include "emulation/torch_device.h"
#else
#include "cuda/torch_device.h"
#endif
#include "ops/tensor_checks.h"
#include "ops/torch.h"

namespace deqcore::cuda {

// Names a tensor that is elsewhere: its memory would be an illegal address in the kernel.
inline void check_device(const Tensor& x, std::initializer_list<const Tensor*> others) {
  const int32_t gpu = gpu_of(x);
  DEQCORE_CHECK(gpu >= 0, "expected all tensors on one GPU, got the first one, of shape ",
                shape_text(x), ", on the CPU");
  for (const Tensor* other : others) {
    const int32_t its = gpu_of(*other);
    DEQCORE_CHECK(its == gpu, "expected all tensors on one GPU, that of x (cuda:", gpu,
                  "), got one of shape ", shape_text(*other), " on ",
                  its < 0 ? "the CPU" : "another GPU");
  }
}

// The numbers of a step are read before the launch.
inline void check_on_host(const Tensor& options) {
  DEQCORE_CHECK(is_on_host(options), "options: expected a tensor on the CPU");
}

// x itself, or a copy: its elements side by side and, for packs of them, at a multiple of 16 bytes.
inline Tensor contiguous_and_aligned(const Tensor& x) {
  const Tensor whole = torch::stable::contiguous(x);
  const bool aligned = reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0;
  return aligned ? whole : torch::stable::clone(whole);
}

// Device memory for the time of a launch.
class Workspace {
 public:
  Workspace(const Tensor& x, int64_t bytes) {
    const int64_t size = x.element_size();
    if (bytes > 0) tensor_ = new_beside(x, {(bytes + size - 1) / size});
  }
  void* get() const { return tensor_ ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

inline void check_launch(const char* op, const char* error) {
  if (error != nullptr) fail("deqcore::", op, ": ", error);
}

}  // namespace deqcore::cuda
