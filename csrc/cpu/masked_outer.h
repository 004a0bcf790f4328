// Kernels of masked_outer: values [kept] = sum over tokens of left [tokens, rows] times right
// [tokens, width], at the kept entries alone.
#pragma once

#include "cpu/isa.h"
#include "cpu/masked.h"

namespace deqcore::cpu {

struct MaskedOuterArgs {
  const void* left;
  const void* right;
  void* values;  // [kept], as the type of sums
  SparseRows entries;
  ColumnBlocks blocks;
  int64_t tokens;
};

// How many tokens are transposed together.
DEQCORE_DECLARE_KERNEL(int64_t masked_outer_tile(ValueType type))

// Transposes one tile from `token` on: out [columns, tile] of source [tokens, columns].
DEQCORE_DECLARE_KERNEL(void masked_outer_transpose(const void* source, ValueType type,
                                                   int64_t tokens, int64_t columns, int64_t token,
                                                   void* out))

// Adds one tile to the values of rows first to last; token 0 overwrites them. Meanwhile it fetches
// its share of the tile from token `next` on into the cache.
DEQCORE_DECLARE_KERNEL(void masked_outer(const MaskedOuterArgs& args, ValueType type,
                                         const void* left_tile, const void* right_tile,
                                         int64_t token, int64_t next, int64_t first, int64_t last))

// All tokens, for entries in blocks: rows of blocks begin to end.
DEQCORE_DECLARE_KERNEL(void masked_outer_blocks(const MaskedOuterArgs& args, ValueType type,
                                                int64_t begin, int64_t end))

// Rounds begin to end of the sums to the type of the tensors.
DEQCORE_DECLARE_KERNEL(void masked_outer_round(const void* sums, ValueType type, void* out,
                                               int64_t begin, int64_t end))

}  // namespace deqcore::cpu
