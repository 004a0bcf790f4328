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

// Whether the current GPU can start a launch before the one before it has ended.
inline bool overlaps_launches() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

template <typename... Parameters, typename... Arguments>
const char* launch_as(bool early, void (*kernel)(Parameters...), int64_t blocks, int threads,
                      int64_t shared_bytes, Stream stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) return "too many blocks: the batch is too large for one launch";
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would report it
      return "this GPU has too little shared memory for a block";
    }
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Starts a kernel; null, or what is wrong.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                   Stream stream, const Arguments&... arguments) {
  return launch_as(false, kernel, blocks, threads, shared_bytes, stream, arguments...);
}

// The same for a kernel that may start before the launch before it has ended, and waits for that
// one itself.
template <typename... Parameters, typename... Arguments>
const char* launch_early(void (*kernel)(Parameters...), int64_t blocks, int threads,
                         int64_t shared_bytes, Stream stream, const Arguments&... arguments) {
  return launch_as(overlaps_launches(), kernel, blocks, threads, shared_bytes, stream,
                   arguments...);
}

// Lets the next launch start, if it is an early one, when all blocks have come to this.
DEQCORE_DEVICE void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// In an early launch: what the launch before has written can be read from here on.
DEQCORE_DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
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

template <typename... Parameters, typename... Arguments>
const char* launch_early(void (*kernel)(Parameters...), int64_t blocks, int threads,
                         int64_t shared_bytes, Stream stream, const Arguments&... arguments) {
  return launch(kernel, blocks, threads, shared_bytes, stream, arguments...);
}

inline void let_next_launch_start() {}
inline void wait_for_launch_before() {}

inline const char* check_gpu() { return nullptr; }
inline bool takes_trial_paths() { return ::emulation::trial; }
inline bool takes_hopper_paths() { return ::emulation::trial; }
inline int64_t most_shared_bytes() { return ::emulation::kMostShared; }
inline int64_t multiprocessors() { return 132; }

inline void count_read(int bytes, bool again) { ::emulation::count_read(bytes, again); }
inline void count_write(int bytes) { ::emulation::count_write(bytes); }

#endif

}  // namespace deqcore::cuda
