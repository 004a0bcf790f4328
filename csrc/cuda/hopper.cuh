// What Hopper's copy engine and its tensor cores do, and the barriers in shared memory by which
// they say that they have: cp.async.bulk, mbarrier, wgmma. Each has a host path for the emulation,
// where a cluster that copies to all its blocks is one block. Needs sm_90a (DEQCORE_SM90A says that
// the build has it).
#pragma once

#include <cstdint>

#include "cuda/cluster.cuh"
#include "cuda/device.cuh"
#include "ops/dtype.h"

#if defined(__CUDACC__)
#include <cuda.h>
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DEQCORE_ON_HOPPER 1
#elif defined(__CUDA_ARCH__)
#define DEQCORE_ON_HOPPER 0  // other GPUs: never run
#endif

namespace deqcore::cuda {

constexpr int kTileSide = 64;  // of the square tiles of 2-byte numbers
constexpr int kTileBytes = 2 * kTileSide * kTileSide;

// A barrier in shared memory: a phase is over when all have arrived and all bytes have come.
using Barrier = uint64_t;

#if defined(__CUDACC__)

using TileMap = CUtensorMap;

#else

#define __grid_constant__

// A matrix of 2-byte numbers, of which tiles are copied.
struct TileMap {
  const uint16_t* at;
  int64_t rows, columns;
};

#endif

DEQCORE_DEVICE void start_barrier(Barrier* barrier, int arrivals) {
#if DEQCORE_ON_HOPPER
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#elif defined(__CUDA_ARCH__)
  __trap();
#elif !defined(__CUDACC__)
  ::emulation::start_barrier(barrier, arrivals);
#endif
}

// Arrives once, and says how many bytes are to come.
DEQCORE_DEVICE void expect_bytes(Barrier* barrier, int bytes) {
#if DEQCORE_ON_HOPPER
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#elif !defined(__CUDA_ARCH__) && !defined(__CUDACC__)
  ::emulation::change_barrier(barrier, 1, bytes);
#endif
}

// Arrives once. (A wider order than that of the block costs a fence at each arrival: 1,000 clocks.
// Who arrives here has only read, so that it takes none.)
DEQCORE_DEVICE void arrive_at(Barrier* barrier) {
#if DEQCORE_ON_HOPPER
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#elif !defined(__CUDA_ARCH__) && !defined(__CUDACC__)
  ::emulation::change_barrier(barrier, 1, 0);
#endif
}

// Arrives once at the barrier in the same place of a block of the cluster.
DEQCORE_DEVICE void arrive_at(Barrier* barrier, [[maybe_unused]] int rank) {
#if DEQCORE_ON_HOPPER
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#elif !defined(__CUDA_ARCH__) && !defined(__CUDACC__)
  ::emulation::change_barrier(barrier, 1, 0);
#endif
}

// Waits until the phase of this parity is over.
DEQCORE_DEVICE void wait_for(Barrier* barrier, uint32_t parity) {
#if DEQCORE_ON_HOPPER
  asm volatile(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#elif !defined(__CUDA_ARCH__) && !defined(__CUDACC__)
  ::emulation::wait_for_barrier(barrier, parity);
#endif
}

// The same for a barrier that other blocks' `send_number`s tell: what they have sent is seen.
DEQCORE_DEVICE void wait_for_numbers(Barrier* barrier, uint32_t parity) {
#if DEQCORE_ON_HOPPER
  asm volatile(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#elif !defined(__CUDA_ARCH__) && !defined(__CUDACC__)
  ::emulation::wait_for_barrier(barrier, parity);
#endif
}

// Writes a number to the same place in the shared memory of a block of the cluster, which must not
// have left, and tells the barrier in the same place there of its 8 bytes. It takes no fence.
DEQCORE_DEVICE void send_number([[maybe_unused]] int rank, double* at, double number,
                                Barrier* barrier) {
#if DEQCORE_ON_HOPPER
  asm volatile(
      "{\n.reg .b32 there, its_barrier;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 its_barrier, %1, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f64 [there], %2, "
      "[its_barrier];\n}" ::"r"(shared_address(at)),
      "r"(shared_address(barrier)), "d"(number), "r"(rank)
      : "memory");
#elif defined(__CUDA_ARCH__)
  __trap();
#elif !defined(__CUDACC__)
  auto* const there = static_cast<double*>(::emulation::shared_of_block(rank, at));
  auto* const its_barrier = static_cast<Barrier*>(::emulation::shared_of_block(rank, barrier));
  ::emulation::copy_bulk(its_barrier, sizeof(double), [there, number] { *there = number; });
#endif
}

// After barriers have been started: the copy engine and the cluster see them.
DEQCORE_DEVICE void show_barriers() {
#if DEQCORE_ON_HOPPER
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// What threads have written to shared memory, the copy engine and wgmma will see after a barrier.
DEQCORE_DEVICE void show_shared_memory() {
#if DEQCORE_ON_HOPPER
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Where a 16-byte piece of a row lies in a tile, in bytes: rows of 128 bytes whose pieces change
// places by the row, as the copy engine writes them and wgmma reads them (128-byte swizzle).
DEQCORE_DEVICE int tile_place(int row, int piece) { return row * 128 + (piece ^ row % 8) * 16; }

// Starts copying the tile of `map` that begins at (row, column) to `to`, at a multiple of 1024
// bytes; zeros beyond the matrix. `barrier` gets kTileBytes.
DEQCORE_DEVICE void copy_tile(char* to, const TileMap& map, int row, int column, Barrier* barrier) {
#if DEQCORE_ON_HOPPER
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
#elif defined(__CUDA_ARCH__)
  __trap();
#elif !defined(__CUDACC__)
  const TileMap from = map;
  for (int i = 0; i < kTileSide && row + i < from.rows; ++i) {
    const int64_t left = from.columns - column;
    ::emulation::note_copy(from.at + (row + i) * from.columns + column,
                           2 * static_cast<int>(left < kTileSide ? left : kTileSide));
  }
  ::emulation::copy_bulk(barrier, kTileBytes, [to, from, row, column] {
    for (int i = 0; i < kTileSide; ++i) {
      for (int j = 0; j < kTileSide; ++j) {
        const bool there = row + i < from.rows && column + j < from.columns;
        const uint16_t bits = there ? from.at[(row + i) * from.columns + column + j] : 0;
        memcpy(to + tile_place(i, j / 8) + j % 8 * 2, &bits, sizeof(bits));
      }
    }
  });
#endif
}

// Starts copying `bytes` to the same place of every block of a cluster of kBlocks, and tells the
// barrier in the same place of each.
template <int kBlocks>
DEQCORE_DEVICE void copy_to_cluster(char* to, const void* from, int bytes, Barrier* barrier) {
#if DEQCORE_ON_HOPPER
  if constexpr (kBlocks > 1) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)),
        "h"(static_cast<uint16_t>((1 << kBlocks) - 1))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
  }
#elif defined(__CUDA_ARCH__)
  __trap();
#elif !defined(__CUDACC__)
  ::emulation::note_copy(from, bytes);
  ::emulation::copy_bulk(barrier, bytes,
                         [to, from, bytes] { memcpy(to, from, static_cast<size_t>(bytes)); });
#endif
}

// wgmma: before the first product, after the last one, and until all are done.
DEQCORE_DEVICE void begin_products() {
#if DEQCORE_ON_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
DEQCORE_DEVICE void end_products() {
#if DEQCORE_ON_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kStillRunning>
DEQCORE_DEVICE void wait_for_products() {
#if DEQCORE_ON_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kStillRunning) : "memory");
#endif
}

#if DEQCORE_ON_HOPPER
// A tile as wgmma is told of it: its address, 1024 bytes between groups of 8 rows, the swizzle.
DEQCORE_DEVICE uint64_t tile_descriptor(const char* at) {
  constexpr uint64_t kSwizzle = uint64_t{1} << 62, kGroups = uint64_t{1024 / 16} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle | kGroups | kUnused | (shared_address(at) & 0x3ffffu) >> 4;
}
#endif

// c [64 x 64] += a b for 16 of the numbers that are summed over, from `k` on; by 128 threads whose
// first warp is a multiple of 4. A tile's rows are a's rows and b's columns; or, where kTurned,
// they are the numbers that are summed over. A lane has, of row 16 * warp + lane / 4 (c[4 j], c[4 j
// + 1]) and of 8 rows below it (the next two), columns 8 j + lane % 4 * 2 and the next one.
template <typename S, bool kTurnedA, bool kTurnedB>
DEQCORE_DEVICE void multiply_tiles_64(float (&c)[32], const char* a, const char* b, int k) {
#if DEQCORE_ON_HOPPER
  const uint64_t from_a = tile_descriptor(a) + (kTurnedA ? k * 128 : k * 2) / 16;
  const uint64_t from_b = tile_descriptor(b) + (kTurnedB ? k * 128 : k * 2) / 16;
#define DEQCORE_WGMMA(type)                                                                    \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type                              \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
               "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "  \
               "%32, %33, 1, 1, 1, %34, %35;"                                                  \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),       \
                 "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),     \
                 "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), \
                 "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
                 "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), \
                 "+f"(c[30]), "+f"(c[31])                                                      \
               : "l"(from_a), "l"(from_b), "n"(kTurnedA ? 1 : 0), "n"(kTurnedB ? 1 : 0))
  if constexpr (__is_same(S, BFloat16)) {
    DEQCORE_WGMMA("bf16.bf16");
  } else {
    DEQCORE_WGMMA("f16.f16");
  }
#undef DEQCORE_WGMMA
#elif defined(__CUDA_ARCH__)
  __trap();
#elif !defined(__CUDACC__)
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto number = [](const char* tile, bool turned, int own, int summed) {
    const int row = turned ? summed : own, column = turned ? own : summed;
    S out;
    memcpy(&out, tile + tile_place(row, column / 8) + column % 8 * 2, sizeof(out));
    return to_compute(out);
  };
  for (int i = 0; i < 32; ++i) {
    const int row = warp % 4 * 16 + lane / 4 + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    for (int s = k; s < k + 16; ++s) {
      c[i] = fma(number(a, kTurnedA, row, s), number(b, kTurnedB, column, s), c[i]);
    }
  }
#endif
}

#if defined(__CUDACC__)

// Describes a matrix [rows, columns] of 2-byte numbers to the copy engine; null, or what is wrong.
inline const char* make_tile_map(TileMap* map, const void* from, int64_t rows, int64_t columns,
                                 bool bfloat) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<Encode>(found);
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled; it needs CUDA 12";
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride = 2 * sizes[0];
  const cuuint32_t box[2] = {kTileSide, kTileSide}, steps[2] = {1, 1};
  const CUresult result =
      encode(map, bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<void*>(from), sizes, &stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refuses the tensor map";
}

// How many clusters run at once of which each multiprocessor takes `resident` blocks.
inline int64_t clusters_at_once(int cluster, int resident) {
  int device = 0, processors = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  const int64_t clusters = int64_t{processors} * resident / cluster;
  return known && clusters > 0 ? clusters : 1;
}

#else

inline const char* make_tile_map(TileMap* map, const void* from, int64_t rows, int64_t columns,
                                 bool) {
  *map = {static_cast<const uint16_t*>(from), rows, columns};
  return nullptr;
}

inline int64_t clusters_at_once(int, int) { return 3; }

#endif

// Starts a kernel in clusters whose blocks copy to each other; null, or what is wrong.
template <typename... Parameters, typename... Arguments>
const char* launch_copying_clusters(void (*kernel)(Parameters...), [[maybe_unused]] int cluster,
                                    int64_t clusters, int threads, int64_t shared_bytes,
                                    Stream stream, const Arguments&... arguments) {
#if !defined(__CUDACC__)
  cluster = 1;
#endif
  return launch_clusters(kernel, cluster, clusters, threads, shared_bytes, stream, arguments...);
}

}  // namespace deqcore::cuda
