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
  warp,   // a warp a row, one launch
  block,  // a block a row, one launch
  split,  // a block a chunk of a row, two launches
};

constexpr int kBlockThreads = 256;
constexpr int kWarpsPerBlock = 4;            // rows of a block on the warp path
constexpr int64_t kWarpPathDim = 512;        // the longest row on the warp path
constexpr int64_t kBlockPathDim = 8192;      // the longest row on the block path
constexpr int64_t kChunk = 4096;             // elements that a block takes on the split path
constexpr int64_t kSharedBytes = 48 * 1024;  // what every GPU gives without asking

DEQCORE_HD bool fits_warp_path(int64_t scratch_doubles_of_a_warp) {
  return kWarpsPerBlock * scratch_doubles_of_a_warp * 8 <= kSharedBytes;
}

DEQCORE_HD Path choose_path(int64_t dim, int64_t scratch_doubles_of_a_warp) {
  if (dim <= kWarpPathDim && fits_warp_path(scratch_doubles_of_a_warp)) return Path::warp;
  return dim <= kBlockPathDim ? Path::block : Path::split;
}

DEQCORE_HD int64_t chunks_of(int64_t dim) { return dim > kChunk ? (dim + kChunk - 1) / kChunk : 1; }

// Null pointers are aligned.
inline bool are_aligned(size_t bytes, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) return false;
  }
  return true;
}

}  // namespace deqcore::cuda
