// How a step is laid out on the device, for host and device; no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "ops/rows.h"

namespace deqcore::cuda {

// The choice depends on the row's length and the memory alone, and so does the order of every sum:
// a row never depends on its batch-mates.
enum class Path {
  warp,     // a warp a row, one launch
  block,    // a block a row, one launch
  split,    // a block a chunk of a row, two launches
  cluster,  // a cluster of blocks a row, one launch: where there are clusters, on trial
};

constexpr int kBlockThreads = 256;
constexpr int kWarpsPerBlock = 4;            // rows of a block on the warp path
constexpr int64_t kWarpPathDim = 512;        // the longest row on the warp path
constexpr int64_t kBlockPathDim = 8192;      // the longest row on the block path
constexpr int64_t kShortestChunk = 4096;     // elements that a block takes on the split path
constexpr int64_t kMostChunks = 512;         // of a row: each block adds up the sums of all
constexpr int64_t kSharedBytes = 48 * 1024;  // what every GPU gives without asking

DEQCORE_HD bool fits_warp_path(int64_t scratch_doubles_of_a_warp) {
  return kWarpsPerBlock * scratch_doubles_of_a_warp * 8 <= kSharedBytes;
}

DEQCORE_HD Path choose_path(int64_t dim, int64_t scratch_doubles_of_a_warp) {
  if (dim <= kWarpPathDim && fits_warp_path(scratch_doubles_of_a_warp)) return Path::warp;
  return dim <= kBlockPathDim ? Path::block : Path::split;
}

// Elements of a row that one block takes; whole packs.
DEQCORE_HD int64_t chunk_of(int64_t dim) {
  if (dim <= kMostChunks * kShortestChunk) return kShortestChunk;
  const int64_t least = (dim + kMostChunks - 1) / kMostChunks;
  return (least + 1023) / 1024 * 1024;
}

DEQCORE_HD int64_t chunks_of(int64_t dim) {
  return dim > 0 ? (dim + chunk_of(dim) - 1) / chunk_of(dim) : 1;
}

// One past the last element of the chunk that begins there.
DEQCORE_HD int64_t end_of_chunk(int64_t dim, int64_t begin) {
  return begin + chunk_of(dim) < dim ? begin + chunk_of(dim) : dim;
}

// Null pointers are aligned.
inline bool are_aligned(size_t bytes, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) return false;
  }
  return true;
}

}  // namespace deqcore::cuda
