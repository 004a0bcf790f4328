// How the blocks of a cluster share a row, and add up what each has found of it.
#pragma once

#include <cstdint>

#include "cuda/async_copy.cuh"
#include "cuda/hopper.cuh"
#include "cuda/path.h"
#include "cuda/team.cuh"

namespace deqcore::cuda {

constexpr int kMostParts = 16;      // of a row, and blocks of a cluster
constexpr int kPortableBlocks = 8;  // of a cluster, on any GPU that has clusters
constexpr int kMostOwnParts = kMostParts / kPortableBlocks;  // of a block
constexpr int64_t kPartUnit = 128;                           // elements
constexpr int64_t kClusterShared = 112 * 1024;  // bytes of a block: a multiprocessor takes two

// The parts depend on the row's length alone, and so does the order of every sum. How many blocks
// share them does not: block b takes parts b, b + blocks, ...
struct RowParts {
  int64_t part;  // elements of a part; the last one may have fewer
  int tiles;     // of a part
  int parts;
  int blocks;  // of the cluster

  __host__ __device__ int own(int rank) const { return (parts - rank + blocks - 1) / blocks; }
};

// `most`: blocks that a cluster can have. Too few for the row: none.
inline RowParts parts_of_row(int64_t dim, int64_t batch, int64_t tile, int most) {
  RowParts out{tile, 1, 1, 1};
  if (dim > kMostParts * tile) {
    const int64_t least = (dim + kMostParts - 1) / kMostParts;
    out.part = (least + kPartUnit - 1) / kPartUnit * kPartUnit;
    out.tiles = static_cast<int>((out.part + tile - 1) / tile);
  }
  if (dim > 0) out.parts = static_cast<int>((dim + out.part - 1) / out.part);
  // A multiprocessor runs two blocks at once: with more of them, rows would wait for each other.
  const bool all_at_once = batch * out.parts <= 2 * multiprocessors();
  out.blocks = out.parts > kPortableBlocks && !all_at_once ? kPortableBlocks : out.parts;
  if (out.parts > 1 && out.blocks > most) {
    out.blocks = most * kMostOwnParts >= out.parts ? most : 0;
  }
  return out;
}

// Stages of a ring of slots: as many as are of use and fit.
inline int stages_of(int64_t useful, int64_t stage_bytes, int64_t room) {
  int64_t stages = room / stage_bytes;
  if (stages > useful) stages = useful;
  if (stages > kMostGroups) stages = kMostGroups;
  return stages < 1 ? 1 : static_cast<int>(stages);
}

// A thread's columns of its block's share of a row: tiles of parts, one after the other.
template <typename Own>
struct Share {
  const RowParts& parts;
  int64_t dim;
  int thread, block;  // of the block; of the cluster
  int tiles;

  DEQCORE_DEVICE Share(const RowParts& parts, int64_t dim, int thread, int block)
      : parts(parts),
        dim(dim),
        thread(thread),
        block(block),
        tiles(parts.own(block) * parts.tiles) {}

  DEQCORE_DEVICE Own operator[](int tile) const {
    const int part = block + tile / parts.tiles * parts.blocks;
    const int64_t begin = part * parts.part + tile % parts.tiles * Own::kTile;
    const int64_t end = part * parts.part + parts.part;
    return Own(thread, begin, end < dim ? end : dim);
  }
};

// The sums of a row, in the shared memory of every block that has a share of it: each block sends
// those of its own parts to all.
struct RowSums {
  int stride;
  double* of_warps;  // [kMostOwnParts, kBlockWarps, stride] of this block
  double* of_parts;  // [kMostParts, stride]
  double* totals;    // [stride]
  Barrier* barrier;  // tells that all parts have come

  static __host__ __device__ int64_t doubles(int64_t stride) {
    return (kMostOwnParts * kBlockWarps + kMostParts + 1) * stride + 1;
  }

  DEQCORE_DEVICE RowSums(double* at, int stride)
      : stride(stride),
        of_warps(at + 1),
        of_parts(of_warps + kMostOwnParts * kBlockWarps * stride),
        totals(of_parts + kMostParts * stride),
        barrier(reinterpret_cast<Barrier*>(at)) {}

  // Where a warp adds up its part of what a tile gives.
  DEQCORE_DEVICE double* of_warp(int tile, const RowParts& parts, int warp) const {
    return of_warps + (tile / parts.tiles * kBlockWarps + warp) * stride;
  }

  // By all threads of the block, before anything else. `width`: sums that there are.
  template <bool kMany>
  DEQCORE_DEVICE void start(int thread, const RowParts& parts, int width) const {
    if constexpr (kMany) {
      if (thread == 0) {
        start_barrier(barrier, 1);
        show_barriers();
        expect_bytes(barrier, parts.parts * width * static_cast<int>(sizeof(double)));
      }
      __syncwarp();
      arrive_at_cluster(/*ordered=*/false);
    }
  }

  // From what the warps have added up to the totals, over all parts in their order; all threads see
  // these afterwards.
  template <bool kMany>
  DEQCORE_DEVICE void exchange(const Team& team, const RowParts& parts, int block,
                               int width) const {
    team.sync();
    if constexpr (kMany) wait_for_cluster();  // the barriers have begun
    const int count = parts.own(block) * width;
    for (int at = team.rank; at < count; at += team.threads) {
      const int own = at / width, i = at % width;
      const double* const from = of_warps + own * kBlockWarps * stride + i;
      double sum = 0.0;
      for (int warp = 0; warp < kBlockWarps; ++warp) sum += from[warp * stride];
      double* const to = of_parts + (block + own * parts.blocks) * stride + i;
      if constexpr (kMany) {
        for (int rank = 0; rank < parts.blocks; ++rank) send_number(rank, to, sum, barrier);
      } else {
        *to = sum;
      }
    }
    if constexpr (kMany) {
      wait_for_numbers(barrier, 0);
    } else {
      team.sync();
    }
    for (int i = team.rank; i < width; i += team.threads) {
      double total = 0.0;
#pragma unroll 4
      for (int part = 0; part < parts.parts; ++part) total += of_parts[part * stride + i];
      totals[i] = total;
    }
    team.sync();
  }
};

// Starts a step by clusters: `many` where these have more blocks than one, `one` where not. A
// worker `W` says what its ring takes, `beside` what a block keeps beside it, in bytes; `fetched`:
// slots that a tile has fetched.
template <typename W, typename Kernel, typename Args>
const char* launch_by_clusters(Kernel many, Kernel one, const Args& args, int64_t beside,
                               int64_t fetched, Stream stream) {
  const int most = largest_cluster(many, kBlockThreads, kClusterShared);
  const RowParts parts = parts_of_row(args.dim, args.batch, W::Own::kTile, most);
  if (parts.blocks == 0) {
    return "this GPU, or the part of it that this process has, runs no clusters that are large "
           "enough; unset DEQCORE_CUDA_TRIAL";
  }
  constexpr int64_t kStage = W::Ring::kStageBytes;
  const int64_t useful = fetched * parts.own(0) * parts.tiles;
  const int stages = stages_of(useful, kStage, kClusterShared - beside);
  return launch_clusters(parts.blocks > 1 ? many : one, parts.blocks, args.batch, kBlockThreads,
                         beside + stages * kStage, stream, args, parts, stages);
}

}  // namespace deqcore::cuda
