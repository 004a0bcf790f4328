// Clusters: blocks that run at once on one part of the GPU, meet, and read each other's shared
// memory. Needs sm_90. In the emulation a cluster's blocks run at once too.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/device.cuh"

namespace deqcore::cuda {

constexpr int64_t kHopperShared = 227 * 1024;  // bytes that a block can have

#if defined(__CUDACC__)
DEQCORE_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
#endif

DEQCORE_DEVICE int rank_in_cluster() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#elif defined(__CUDACC__)
  return 0;
#else
  return ::emulation::rank_in_cluster();
#endif
}

// All threads of all blocks of the cluster meet, in two parts. The first orders what was written
// before it, for a fence of some 1,000 clocks; or nothing (but barriers, see show_barriers).
DEQCORE_DEVICE void arrive_at_cluster([[maybe_unused]] bool ordered) {
#if __CUDA_ARCH__ >= 900
  if (ordered) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
#elif defined(__CUDA_ARCH__)
  __trap();
#elif !defined(__CUDACC__)
  ::emulation::arrive_at_cluster(ordered);
#endif
}
DEQCORE_DEVICE void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif defined(__CUDA_ARCH__)
  __trap();
#elif !defined(__CUDACC__)
  ::emulation::wait_for_cluster();
#endif
}
DEQCORE_DEVICE void sync_cluster() {
  arrive_at_cluster(/*ordered=*/true);
  wait_for_cluster();
}

// What lies at the same place in the shared memory of a block of the cluster: 16 bytes. No block
// may leave before the others have read its.
template <typename T>
DEQCORE_DEVICE T read_shared_of([[maybe_unused]] int rank, const T* at) {
  static_assert(sizeof(T) == 16);
#if __CUDA_ARCH__ >= 900
  T out;
  auto* const words = reinterpret_cast<uint32_t*>(&out);
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [there];\n}"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
      : "r"(shared_address(at)), "r"(rank)
      : "memory");
  return out;
#elif defined(__CUDACC__)
  return *at;
#else
  return *static_cast<const T*>(::emulation::shared_of_block(rank, at));
#endif
}

#if defined(__CUDACC__)

// The most blocks of a cluster of this kernel on the current GPU, of which a part may be all that
// this process has; 0 where it cannot be asked. Asked once.
template <typename... Parameters>
int largest_cluster(void (*kernel)(Parameters...), int threads, int64_t shared_bytes) {
  static std::mutex guard;
  static std::map<std::pair<const void*, int>, int> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const std::lock_guard<std::mutex> lock(guard);
  const auto key = std::make_pair(reinterpret_cast<const void*>(kernel), device);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  int most = 0;
  const bool told = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(kHopperShared)) == cudaSuccess &&
                    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed,
                                         1) == cudaSuccess &&
                    cudaOccupancyMaxPotentialClusterSize(&most, kernel, &config) == cudaSuccess;
  if (!told) {
    cudaGetLastError();  // or the next launch would report it
    most = 0;
  }
  return known[key] = most;
}

// Starts a kernel in clusters; null, or what is wrong.
template <typename... Parameters, typename... Arguments>
const char* launch_clusters(void (*kernel)(Parameters...), int cluster, int64_t clusters,
                            int threads, int64_t shared_bytes, Stream stream,
                            const Arguments&... arguments) {
  if (clusters * cluster > INT32_MAX) {
    return "too many blocks: the batch is too large for one launch";
  }
  // Always the same number: it is the function's, and other threads may launch it meanwhile.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(kHopperShared));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else

template <typename... Parameters>
int largest_cluster(void (*)(Parameters...), int, int64_t) {
  return ::emulation::largest_cluster;
}

template <typename... Parameters, typename... Arguments>
const char* launch_clusters(void (*kernel)(Parameters...), int cluster, int64_t clusters,
                            int threads, int64_t shared_bytes, Stream,
                            const Arguments&... arguments) {
  ::emulation::note_kernel(reinterpret_cast<const void*>(kernel));
  return ::emulation::launch(
      clusters * cluster, threads, shared_bytes, [&] { kernel(arguments...); }, kHopperShared,
      cluster);
}

#endif

}  // namespace deqcore::cuda
