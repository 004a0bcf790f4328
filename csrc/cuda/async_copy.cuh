// Copies from global to shared memory that pass by the registers and run beside arithmetic. The
// emulation makes them at once or when they are awaited, so that a missing wait shows, and a place
// that is still in use.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device.cuh"

namespace deqcore::cuda {

#if !defined(__CUDACC__)
inline void make_copy(void* to, const void* from, int bytes) {
  if (from != nullptr) {
    memcpy(to, from, bytes);
  } else {
    memset(to, 0, bytes);
  }
}
inline void make_copies(const std::vector<::emulation::Copy>& copies) {
  for (const auto& copy : copies) make_copy(copy.to, copy.from, copy.bytes);
}
// One that is asked for: now or when it is awaited.
inline void copy_some_time(void* to, const void* from, int bytes) {
  if (::emulation::copies_at_once()) {
    if (from != nullptr) ::emulation::note_copy(from, bytes);
    make_copy(to, from, bytes);
  } else {
    ::emulation::copy_later(to, from, bytes);
  }
}
#endif

// Starts a copy of 16 bytes; both ends are aligned to that. Needs sm_80.
DEQCORE_DEVICE void copy_async_16(void* to_shared, const void* from_global) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from_global));
#elif defined(__CUDA_ARCH__)
  __trap();  // check_gpu keeps such GPUs away
#elif !defined(__CUDACC__)
  copy_some_time(to_shared, from_global, 16);
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
  copy_some_time(to_shared, there ? from_global : nullptr, 16);
#endif
}

// A copy of 8 or 16 bytes, aligned to its size.
template <int kBytes>
DEQCORE_DEVICE void copy_async(void* to_shared, const void* from_global) {
  static_assert(kBytes == 8 || kBytes == 16);
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from_global)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from_global) : "memory");
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // check_gpu keeps such GPUs away
#elif !defined(__CUDACC__)
  copy_some_time(to_shared, from_global, kBytes);
#endif
}

// Closes a group of this thread's copies, be it empty.
DEQCORE_DEVICE void close_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  ::emulation::close_copies();
#endif
}

constexpr int kMostGroups = 8;

// Waits for this thread's groups but the newest `pending` < kMostGroups ones.
DEQCORE_DEVICE void wait_for_groups_but([[maybe_unused]] int pending) {
#if __CUDA_ARCH__ >= 800
#define DEQCORE_WAIT(groups)                                          \
  case groups:                                                        \
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory"); \
    break;
  switch (pending) {
    DEQCORE_WAIT(7)
    DEQCORE_WAIT(6)
    DEQCORE_WAIT(5)
    DEQCORE_WAIT(4)
    DEQCORE_WAIT(3)
    DEQCORE_WAIT(2)
    DEQCORE_WAIT(1)
    default:
      asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
#undef DEQCORE_WAIT
#elif !defined(__CUDACC__)
  make_copies(::emulation::take_groups_but(pending));
#endif
}

// Waits for this thread's copies; a barrier then shows them to the other threads.
DEQCORE_DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#elif defined(__CUDA_ARCH__)
  __trap();  // check_gpu keeps such GPUs away
#elif !defined(__CUDACC__)
  make_copies(::emulation::take_copies());
#endif
}

// Asks for a line of global memory that will be read soon. It reads nothing that could be seen.
DEQCORE_DEVICE void ask_for_line([[maybe_unused]] const void* at) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L1 [%0];" ::"l"(at));
#endif
}

}  // namespace deqcore::cuda
