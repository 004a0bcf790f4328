// Tiles of tokens in shared memory, and what is made ready for them before a masked matmul:
// matrices with their tokens side by side, and where each chunk of columns ends in each row.
#pragma once

#include <cstdint>

#include "cuda/async_copy.cuh"
#include "cuda/masked_layout.h"
#include "cuda/pack.cuh"
#include "cuda/team.cuh"
#include "ops/sparse_rows.h"

namespace deqcore::cuda {

// A warp's lanes take kTokens tokens each, side by side.
template <typename S, int kTokens>
struct TokenTile {
  static constexpr int kWidth = kWarp * kTokens;
  static constexpr int kColumnBytes = kWidth * static_cast<int>(sizeof(S));
  static constexpr int kColumns = static_cast<int>(kChunkBytes) / kColumnBytes;  // of a chunk
  static constexpr int kPieces = kColumnBytes / 16;  // copies that bring in a column

  static int64_t padded(int64_t tokens) { return padded_tokens(tokens, kWidth); }
  static int64_t chunks(int64_t width) { return width > 0 ? blocks_for(width, kColumns) : 1; }
};

// A matrix [tokens, columns] turned round: [columns, padded], zeros after the last token.
struct Turned {
  const void* from;
  void* to;
  int64_t tokens;
  int64_t padded;
  int64_t columns;
};

constexpr int kTurnSide = 32;  // a block turns a square of this side
constexpr int kTurnThreads = 256;

inline int64_t turn_blocks(const Turned& turned) {
  return blocks_for(turned.columns, kTurnSide) * (turned.padded / kTurnSide);
}

template <typename S>
constexpr int64_t turn_shared_bytes() {
  return kTurnSide * (kTurnSide + 1) * static_cast<int64_t>(sizeof(S));
}

// By a block of kTurnThreads, with turn_shared_bytes of scratch.
template <typename S>
DEQCORE_DEVICE void turn_square(const Turned& turned, int64_t square, S* scratch) {
  constexpr int kRowsAtOnce = kTurnThreads / kTurnSide, kStride = kTurnSide + 1;
  // Squares are blocks of a launch, and those fit 32 bits.
  const auto across = static_cast<uint32_t>(blocks_for(turned.columns, kTurnSide));
  const auto index = static_cast<uint32_t>(square);
  const int64_t column = int64_t{index % across} * kTurnSide;
  const int64_t token = int64_t{index / across} * kTurnSide;
  const int x = static_cast<int>(threadIdx.x) % kTurnSide;
  const int y = static_cast<int>(threadIdx.x) / kTurnSide;
  const S* const from = static_cast<const S*>(turned.from);
#pragma unroll
  for (int i = y; i < kTurnSide; i += kRowsAtOnce) {
    S value{};
    if (token + i < turned.tokens && column + x < turned.columns) {
      count_read(sizeof(S), false);
      value = from[(token + i) * turned.columns + column + x];
    }
    scratch[i * kStride + x] = value;
  }
  __syncthreads();
  S* const to = static_cast<S*>(turned.to);
#pragma unroll
  for (int i = y; i < kTurnSide; i += kRowsAtOnce) {
    if (column + i < turned.columns) {
      count_write(sizeof(S));
      to[(column + i) * turned.padded + token + x] = scratch[x * kStride + i];
    }
  }
}

// Where the entries of chunk `chunk` end in row `row`: the first one with a later column.
DEQCORE_DEVICE int32_t chunk_end(const SparseRows& weight, int64_t row, int64_t chunk,
                                 int columns_of_chunk) {
  int32_t low = weight.offsets[row], high = weight.offsets[row + 1];
  const int64_t limit = (chunk + 1) * columns_of_chunk;
  if (limit >= weight.width) return high;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (weight.columns[middle] < limit) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Starts copying a chunk of columns of a tile of tokens into shared memory.
template <typename Tile, typename S>
DEQCORE_DEVICE void fetch_chunk(const S* turned, int64_t padded, int64_t width, int64_t chunk,
                                int64_t token_tile, int threads, S* to) {
  constexpr int kPerPiece = 16 / static_cast<int>(sizeof(S));
  const int64_t first = chunk * Tile::kColumns;
  const int columns =
      static_cast<int>(width - first < Tile::kColumns ? width - first : Tile::kColumns);
  const S* const from = turned + first * padded + token_tile * Tile::kWidth;
  for (int i = static_cast<int>(threadIdx.x); i < columns * Tile::kPieces; i += threads) {
    const int column = i / Tile::kPieces, piece = i % Tile::kPieces;
    count_read(16, false);
    copy_async_16(to + column * Tile::kWidth + piece * kPerPiece,
                  from + column * padded + piece * kPerPiece);
  }
}

}  // namespace deqcore::cuda
