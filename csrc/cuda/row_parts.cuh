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
constexpr const char* kTooFewBlocks =
    "this GPU, or the part of it that this process has, runs no clusters that are large enough; "
    "unset DEQCORE_CUDA_TRIAL";

// Stages of a ring of slots: as many as are of use and fit.
inline int stages_of(int64_t useful, int64_t stage_bytes, int64_t room) {
  int64_t stages = room / stage_bytes;
  if (stages > useful) stages = useful;
  if (stages > kMostGroups) stages = kMostGroups;
  return stages < 1 ? 1 : static_cast<int>(stages);
}

// The sums of all parts of a row, in the shared memory of every block that has a share of it: each
// block sends its own to all.
template <bool kMany>
struct PartSums {
  double* sums;      // [parts, stride]
  Barrier* barrier;  // tells that all have come
  int stride;

  static __host__ __device__ int64_t doubles(int64_t stride) { return kMostParts * stride + 2; }

  DEQCORE_DEVICE PartSums(double* at, int stride)
      : sums(at + 2), barrier(reinterpret_cast<Barrier*>(at)), stride(stride) {}

  // By all threads, before anything else; `finish_start` comes before the first `send`.
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
  DEQCORE_DEVICE void finish_start() const {
    if constexpr (kMany) wait_for_cluster();
  }

  // Number i of a part that this block has summed up.
  DEQCORE_DEVICE void send(int part, int i, double sum, const RowParts& parts) const {
    double* const to = sums + part * stride + i;
    if constexpr (kMany) {
      for (int rank = 0; rank < parts.blocks; ++rank) send_number(rank, to, sum, barrier);
    } else {
      *to = sum;
    }
  }

  // totals[0 .. width) over all parts, in their order; all threads see them afterwards.
  DEQCORE_DEVICE void add(const Team& team, const RowParts& parts, int width,
                          double* totals) const {
    if constexpr (kMany) {
      wait_for_numbers(barrier, 0);
    } else {
      team.sync();
    }
    for (int i = team.rank; i < width; i += team.threads) {
      double total = 0.0;
#pragma unroll 4
      for (int part = 0; part < parts.parts; ++part) total += sums[part * stride + i];
      totals[i] = total;
    }
    team.sync();
  }
};

// Sends what the warps have summed up of a block's own parts: warp_sums [kMostOwnParts, warps,
// stride].
template <bool kMany>
DEQCORE_DEVICE void send_warp_sums(const Team& team, const RowParts& parts, int block, int width,
                                   const double* warp_sums, const PartSums<kMany>& to) {
  team.sync();
  to.finish_start();
  const int count = parts.own(block) * width;
  for (int at = team.rank; at < count; at += team.threads) {
    const int own = at / width, i = at % width;
    const double* const from = warp_sums + own * team.warps() * to.stride + i;
    double sum = 0.0;
    for (int warp = 0; warp < team.warps(); ++warp) sum += from[warp * to.stride];
    to.send(block + own * parts.blocks, i, sum, parts);
  }
}

}  // namespace deqcore::cuda
