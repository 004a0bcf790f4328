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

constexpr int kWarpThreads = 32;
constexpr int kBlockThreads = 256;
constexpr int kFewOwn = 4;             // elements of a tile that a thread takes of a short row
constexpr int kWarpsPerBlock = 4;      // rows of a block on the warp path
constexpr int64_t kShortChunk = 1024;  // elements of a row
constexpr int64_t kShortChunksDim = 131072;  // the longest row of short chunks
constexpr int64_t kMostChunks = 512;         // of a row: one block adds up the sums of all
constexpr int64_t kSharedBytes = 48 * 1024;  // what every GPU gives without asking
constexpr int64_t kRingBytes = 96 * 1024;    // of a block, with its ring of slots
constexpr int kMostStages = 8;

DEQCORE_HD bool fits_warp_path(int64_t scratch_doubles_of_a_warp) {
  return kWarpsPerBlock * scratch_doubles_of_a_warp * 8 <= kSharedBytes;
}

// `many`: elements of a tile that a thread of the op takes of a long row. Whole rows are a tile.
DEQCORE_HD Path choose_path(int64_t dim, int many, int64_t scratch_doubles_of_a_warp) {
  if (dim <= kWarpThreads * many && fits_warp_path(scratch_doubles_of_a_warp)) return Path::warp;
  return dim <= kBlockThreads * many ? Path::block : Path::split;
}

// Elements of a row that one block takes in the first of two launches; whole packs. `long_chunk`:
// the op's, of long rows.
DEQCORE_HD int64_t chunk_of(int64_t dim, int64_t long_chunk) {
  const int64_t chunk = dim <= kShortChunksDim ? kShortChunk : long_chunk;
  const int64_t least = (dim + kMostChunks - 1) / kMostChunks;
  return least > chunk ? (least + chunk - 1) / chunk * chunk : chunk;
}

DEQCORE_HD int64_t chunks_of(int64_t dim, int64_t long_chunk) {
  const int64_t chunk = chunk_of(dim, long_chunk);
  return dim > 0 ? (dim + chunk - 1) / chunk : 1;
}

DEQCORE_HD int64_t end_of(int64_t dim, int64_t end) { return end < dim ? end : dim; }

// Stages of a ring of slots: as many as are of use and fit beside the scratch.
DEQCORE_HD int stages_of(int64_t useful, int64_t stage_bytes, int64_t scratch_bytes) {
  int64_t stages = (kRingBytes - scratch_bytes) / stage_bytes;
  if (stages > useful) stages = useful;
  if (stages > kMostStages) stages = kMostStages;
  return stages < 1 ? 1 : static_cast<int>(stages);
}

// Null pointers are aligned.
inline bool are_aligned(size_t bytes, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) return false;
  }
  return true;
}

}  // namespace deqcore::cuda
