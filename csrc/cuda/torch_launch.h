// What the CUDA bindings share: the device and stream of a launch, its scratch memory, its errors.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "ops/tensor_checks.h"
#include "ops/torch.h"

namespace deqcore::cuda {

// Names a tensor that is elsewhere: its memory would be an illegal address in the kernel.
inline void check_device(const Tensor& x, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    DEQCORE_CHECK(other->is_cuda() && other->get_device_index() == x.get_device_index(),
                  "expected all tensors on one GPU, that of x (cuda:", x.get_device_index(),
                  "), got one of shape ", shape_text(*other), " on ",
                  other->is_cuda() ? "another GPU" : "the CPU");
  }
}

// The numbers of a step are read before the launch.
inline void check_on_host(const Tensor& options) {
  DEQCORE_CHECK(options.is_cpu(), "options: expected a tensor on the CPU");
}

// Makes the tensor's device current, and finds its current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// x itself, or a copy: its elements side by side and, for packs of them, at a multiple of 16 bytes.
inline Tensor contiguous_and_aligned(const Tensor& x) {
  const Tensor whole = torch::stable::contiguous(x);
  const bool aligned = reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0;
  return aligned ? whole : torch::stable::clone(whole);
}

// Device memory from torch's allocator, which gives it back in the order of the stream.
class Workspace {
 public:
  Workspace(const Tensor& x, int64_t bytes) {
    if (bytes == 0) return;
    tensor_ = torch::stable::new_empty(x, {(bytes + 7) / 8}, ScalarType::Double);
  }
  void* get() const { return tensor_ ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

inline void check_launch(const char* op, const char* error) {
  DEQCORE_CHECK(error == nullptr, "deqcore::", op, ": ", error);
}

}  // namespace deqcore::cuda
