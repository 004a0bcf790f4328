// What a kernel file needs from its compiler: nvcc, or a C++ compiler with the emulation header.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "emulation/cuda_emulation.h"
#endif

#define DEQCORE_DEVICE __device__ __forceinline__

namespace deqcore::cuda {

constexpr int64_t kSharedWithoutAsking = 48 * 1024;  // bytes that a block gets from any GPU

#if defined(__CUDACC__)

// The block's dynamic shared memory, whose size the launch gives.
#define DEQCORE_SHARED_DOUBLES(name) extern __shared__ __align__(16) double name[]

using Stream = cudaStream_t;

// What the current GPU has of something; `otherwise` where it cannot be asked.
inline int64_t attribute_of_gpu(cudaDeviceAttr attribute, int64_t otherwise) {
  int device = 0, value = 0;
  const bool told = cudaGetDevice(&device) == cudaSuccess &&
                    cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return told ? value : otherwise;
}
inline int64_t most_shared_bytes() {  // of a block that asks
  return attribute_of_gpu(cudaDevAttrMaxSharedMemoryPerBlockOptin, kSharedWithoutAsking);
}
inline int64_t multiprocessors() { return attribute_of_gpu(cudaDevAttrMultiProcessorCount, 1); }

// Starts a kernel; null, or what is wrong.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                   Stream stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) return "too many blocks: the batch is too large for one launch";
  if (shared_bytes > kSharedWithoutAsking) {
    // Always the same number: it is the function's, and other threads may launch it meanwhile.
    const cudaError_t error =
        shared_bytes > most_shared_bytes()
            ? cudaErrorInvalidValue
            : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(most_shared_bytes()));
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would report it
      return "this GPU has too little shared memory for a block";
    }
  }
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes), stream>>>(
      arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Null if the current GPU has asynchronous copies and tensor cores for bfloat16; else what to do.
inline const char* check_gpu() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    return "cannot ask the GPU for its compute capability";
  }
  return major >= 8 ? nullptr
                    : "needs a GPU of compute capability 8.0 or later; use backend='dense'";
}

// Whether paths are asked for that no GPU has run since they were last changed: they are no one's
// default until then.
inline bool takes_trial_paths() {
  const char* const asked = getenv("DEQCORE_CUDA_TRIAL");
  return asked != nullptr && strcmp(asked, "1") == 0;
}

// Of these the ones of hopper.cuh: whether this build and the current GPU have what they need.
inline bool takes_hopper_paths() {
#if defined(DEQCORE_SM90A)
  int device = 0, major = 0;
  return takes_trial_paths() && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
#else
  return false;
#endif
}

// The emulation counts the traffic of the state-sized tensors here.
DEQCORE_DEVICE void count_read(int, bool) {}
DEQCORE_DEVICE void count_write(int) {}

#else

#define DEQCORE_SHARED_DOUBLES(name) double* const name = ::emulation::shared_doubles()

using Stream = void*;

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                   Stream, const Arguments&... arguments) {
  ::emulation::note_kernel(reinterpret_cast<const void*>(kernel));
  return ::emulation::launch(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

inline const char* check_gpu() { return nullptr; }
inline bool takes_trial_paths() { return ::emulation::trial; }
inline bool takes_hopper_paths() { return ::emulation::trial; }
inline int64_t most_shared_bytes() { return ::emulation::kMostShared; }
inline int64_t multiprocessors() { return 132; }

inline void count_read(int bytes, bool again) { ::emulation::count_read(bytes, again); }
inline void count_write(int bytes) { ::emulation::count_write(bytes); }

#endif

}  // namespace deqcore::cuda
