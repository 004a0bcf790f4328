// What a CUDA binding asks of torch: where its tensors are, the stream to launch on, memory.
// csrc/emulation/torch_device.h answers in its place where the kernels are emulated.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "ops/tensor_checks.h"
#include "ops/torch.h"

#define DEQCORE_CUDA_BINDINGS(m) STABLE_TORCH_LIBRARY_IMPL(deqcore, CUDA, m)

namespace deqcore::cuda {

// Negative for a tensor that is on none.
inline int32_t gpu_of(const Tensor& tensor) {
  return tensor.is_cuda() ? tensor.get_device_index() : -1;
}

inline bool is_on_host(const Tensor& tensor) { return tensor.is_cpu(); }

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

// A tensor beside x and of its dtype, not initialised; torch's allocator takes it back in the order
// of the stream.
inline Tensor new_beside(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, sizes);
}

}  // namespace deqcore::cuda
