// What the masked matmuls by tiles of 64 on Hopper share: where a kept block is, and how a group of
// warps writes the sums of a tile.
#pragma once

#include <cstdint>

#include "cuda/hopper.cuh"
#include "cuda/masked_layout.h"
#include "cuda/pack.cuh"
#include "cuda/team.cuh"
#include "ops/sparse_rows.h"

namespace deqcore::cuda {

// The row of blocks that kept block `index` is in: the last one that begins no later. By a warp.
DEQCORE_DEVICE int64_t row_of_block(const SparseRows& weight, int64_t index) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t entry = index * kTileSide * kTileSide, rows = weight.rows / kTileSide;
  int64_t begun = 0;
#pragma unroll 4
  for (int64_t first = 0; first < rows; first += kWarp) {
    const int64_t row = first + lane;
    const bool no_later = row < rows && weight.offsets[row * kTileSide] <= entry;
    begun += __popc(__ballot_sync(kWholeWarp, no_later));
  }
  return begun - 1;
}

// Four words of each of four neighbouring lanes, turned: lane i gets word i of each.
DEQCORE_DEVICE void turn_words(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t sent = upper ? words[i] : words[i + distance];
      const uint32_t got = __shfl_xor_sync(kWholeWarp, sent, distance);
      (upper ? words[i] : words[i + distance]) = got;
    }
  }
}

// Calls put(row, column, eight neighbours) for the sums of a tile, laid out as multiply_tiles_64
// leaves them. Four lanes together have 64 bytes of a row.
template <typename S, typename Put>
DEQCORE_DEVICE void each_eight(const float (&sums)[32], const Put& put) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const pair = &sums[4 * (4 * part + j) + 2 * half];
        const Pack<S, 2> rounded{{from_compute<S>(pair[0]), from_compute<S>(pair[1])}};
        memcpy(&words[j], &rounded, sizeof(rounded));
      }
      turn_words(words, lane);
      Pack<S, 8> eight;
      memcpy(&eight, words, sizeof(eight));
      put(thread / kWarp % 4 * 16 + lane / 4 + 8 * half, 32 * part + lane % 4 * 8, eight);
    }
  }
}

}  // namespace deqcore::cuda
