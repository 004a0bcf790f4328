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

constexpr int kTurnSide = 64;  // a block turns a square of this side
constexpr int kTurnThreads = 256;

DEQCORE_HD int64_t turn_blocks(const Turned& turned) {
  return blocks_for(turned.columns, kTurnSide) * blocks_for(turned.padded, kTurnSide);
}

template <typename S>
constexpr int64_t turn_shared_bytes() {
  return kTurnSide * (kTurnSide + 1) * static_cast<int64_t>(sizeof(S));
}

template <typename S>
struct TurnPacks {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(S));
  static constexpr int kOfARow = kTurnSide / kWidth;
  static constexpr int kOfAThread = kTurnSide * kOfARow / kTurnThreads;
  Pack<S, kWidth> at[kOfAThread];

  // Packs of neighbouring columns of the square that begins there, all asked for at once.
  template <bool kAligned>
  DEQCORE_DEVICE void read(const Turned& turned, int64_t token, int64_t column) {
    const S* const from = static_cast<const S*>(turned.from);
#pragma unroll
    for (int i = 0; i < kOfAThread; ++i) {
      const int index = i * kTurnThreads + static_cast<int>(threadIdx.x);
      const int64_t row = token + index / kOfARow, first = column + index % kOfARow * kWidth;
      at[i] = {};
      if (row < turned.tokens && first < turned.columns) {
        at[i] = load<kAligned, kWidth>(from + row * turned.columns + first, turned.columns - first);
      }
    }
  }
};

// By a block of kTurnThreads, with turn_shared_bytes of scratch.
template <typename S>
DEQCORE_DEVICE void turn_square(const Turned& turned, int64_t square, S* scratch) {
  using Packs = TurnPacks<S>;
  constexpr int kWidth = Packs::kWidth, kStride = kTurnSide + 1;
  // Squares are blocks of a launch, and those fit 32 bits.
  const auto across = static_cast<uint32_t>(blocks_for(turned.columns, kTurnSide));
  const auto index = static_cast<uint32_t>(square);
  const int64_t column = int64_t{index % across} * kTurnSide;
  const int64_t token = int64_t{index / across} * kTurnSide;
  Packs packs;
  if (turned.columns % kWidth == 0 && reinterpret_cast<uintptr_t>(turned.from) % 16 == 0) {
    packs.template read<true>(turned, token, column);
  } else {
    packs.template read<false>(turned, token, column);
  }
#pragma unroll
  for (int i = 0; i < Packs::kOfAThread; ++i) {
    const int at = i * kTurnThreads + static_cast<int>(threadIdx.x);
    const int t = at / Packs::kOfARow, c = at % Packs::kOfARow * kWidth;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) scratch[(c + k) * kStride + t] = packs.at[i].at[k];
  }
  __syncthreads();
  S* const to = static_cast<S*>(turned.to);
#pragma unroll
  for (int i = 0; i < Packs::kOfAThread; ++i) {
    const int at = i * kTurnThreads + static_cast<int>(threadIdx.x);
    const int c = at / Packs::kOfARow, t = at % Packs::kOfARow * kWidth;
    if (column + c >= turned.columns || token + t >= turned.padded) continue;
    Pack<S, kWidth> pack;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.at[k] = scratch[c * kStride + t + k];
    store_whole(to + (column + c) * turned.padded + token + t, pack);
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
