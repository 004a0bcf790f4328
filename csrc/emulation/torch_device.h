// cuda/torch_device.h for the bindings of emulated kernels: a tensor on the CPU counts as one on
// the only GPU, unless a test says of it where it is to be. Test code; in no wheel.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "ops/tensor_checks.h"
#include "ops/torch.h"

#define DEQCORE_CUDA_BINDINGS(m) STABLE_TORCH_LIBRARY_IMPL(deqcore_emulated, CPU, m)

namespace emulation {

// The GPU that the tensor has been put on, -1 for the CPU; or `otherwise`.
int32_t place_of(const void* data, int32_t otherwise);

}  // namespace emulation

namespace deqcore::cuda {

inline int32_t gpu_of(const Tensor& tensor) {
  return ::emulation::place_of(tensor.const_data_ptr(), 0);
}

inline bool is_on_host(const Tensor& tensor) {
  return ::emulation::place_of(tensor.const_data_ptr(), -1) < 0;
}

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}
  void* stream() const { return nullptr; }
};

// Its bytes are NaN in every dtype: a kernel must not read what none has written.
inline Tensor new_beside(const Tensor& x, std::initializer_list<int64_t> sizes) {
  const Tensor made = torch::stable::new_empty(x, sizes);
  if (made.numel() > 0) {
    std::memset(made.mutable_data_ptr(), 0xff, made.numel() * made.element_size());
  }
  return made;
}

}  // namespace deqcore::cuda
