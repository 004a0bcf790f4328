// Kernels of masked_outer: values [kept] = sum over tokens of left [tokens, rows] times right
// [tokens, width], at the kept entries alone.
#pragma once

#include "cpu/column_blocks.h"
#include "cpu/isa.h"
#include "ops/dtype.h"
#include "ops/sparse_rows.h"

namespace deqcore::cpu {

struct MaskedOuterArgs {
  const void* left;
  const void* right;
  void* values;  // [kept], as the type of sums
  SparseRows entries;
  ColumnBlocks blocks;
  int64_t tokens;
};

// A tile of tokens, transposed, and the rows of entries that one caller adds up.
struct OuterTile {
  const void* left;   // [rows, width]
  const void* right;  // [columns, width]
  int64_t width;      // tokens, zeros after the last one
  int64_t next;       // a later tile's first token: a share of it is fetched into the cache
  int64_t first, last;
  bool fresh;  // overwrite the values
};

// How many tokens are transposed together.
DEQCORE_DECLARE_KERNEL(int64_t masked_outer_tile(Dtype type, int64_t tokens))

// Transposes one tile: out [columns, width] of source [tokens, columns].
DEQCORE_DECLARE_KERNEL(void masked_outer_transpose(const void* source, Dtype type, int64_t tokens,
                                                   int64_t columns, int64_t width, void* out))

// Adds one tile to the values of its rows.
DEQCORE_DECLARE_KERNEL(void masked_outer(const MaskedOuterArgs& args, Dtype type,
                                         const OuterTile& tile))

// All tokens, for entries in blocks: rows of blocks begin to end.
DEQCORE_DECLARE_KERNEL(void masked_outer_blocks(const MaskedOuterArgs& args, Dtype type,
                                                int64_t begin, int64_t end))

// Rounds begin to end of the sums to the type of the tensors.
DEQCORE_DECLARE_KERNEL(void masked_outer_round(const void* sums, Dtype type, void* out,
                                               int64_t begin, int64_t end))

}  // namespace deqcore::cpu
