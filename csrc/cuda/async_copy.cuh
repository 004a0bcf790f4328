// Copies from global to shared memory that pass by the registers and run beside arithmetic. The
// emulation makes them when they are awaited, so that a missing wait shows.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace deqcore::cuda {

// Starts a copy of 16 bytes; both ends are aligned to that. Needs sm_80.
DEQCORE_DEVICE void copy_async_16(void* to_shared, const void* from_global) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from_global));
#elif defined(__CUDA_ARCH__)
  __trap();  // check_gpu keeps such GPUs away
#elif !defined(__CUDACC__)
  ::emulation::copy_later(to_shared, from_global);
#endif
}

// The same, or zeros without a look at the source.
DEQCORE_DEVICE void copy_async_16(void* to_shared, const void* from_global, bool there) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from_global),
               "r"(bytes));
#elif defined(__CUDA_ARCH__)
  __trap();  // check_gpu keeps such GPUs away
#elif !defined(__CUDACC__)
  ::emulation::copy_later(to_shared, there ? from_global : nullptr);
#endif
}

// Waits for this thread's copies; a barrier then shows them to the other threads.
DEQCORE_DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#elif defined(__CUDA_ARCH__)
  __trap();  // check_gpu keeps such GPUs away
#elif !defined(__CUDACC__)
  for (const auto& copy : ::emulation::take_copies()) {
    if (copy.from != nullptr) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
  }
#endif
}

// Asks for a line of global memory that will be read soon. It reads nothing that could be seen.
DEQCORE_DEVICE void ask_for_line([[maybe_unused]] const void* at) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L1 [%0];" ::"l"(at));
#endif
}

}  // namespace deqcore::cuda
