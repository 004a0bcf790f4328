// Kernels of masked_linear: y [tokens, rows] = x [tokens, width] * weight^T + bias.
#pragma once

#include "cpu/column_blocks.h"
#include "cpu/isa.h"
#include "ops/dtype.h"
#include "ops/sparse_rows.h"

namespace deqcore::cpu {

// x and y have the tensors' type; values and bias the type in which it is summed.
struct MaskedLinearArgs {
  const void* x;
  const void* values;  // [kept]: in the order of weight.columns, or packed for blocks
  const void* bias;    // [rows], or null
  void* y;
  SparseRows weight;
  ColumnBlocks blocks;
  int64_t tokens;
  int64_t row_chunks;  // tasks per tile of tokens, for when there are more threads than tiles
};

// How many tokens a task takes at most.
DEQCORE_DECLARE_KERNEL(int64_t masked_linear_tile(Dtype type))

// Tasks begin to end of ceil(tokens / tile) * row_chunks.
DEQCORE_DECLARE_KERNEL(void masked_linear(const MaskedLinearArgs& args, Dtype type, int64_t begin,
                                          int64_t end))

// The same tasks, for a weight of blocks.
DEQCORE_DECLARE_KERNEL(void masked_linear_blocks(const MaskedLinearArgs& args, Dtype type,
                                                 int64_t begin, int64_t end))

// Reads entries begin to end of stored values, in the order of `rows`, as the type of sums.
DEQCORE_DECLARE_KERNEL(void masked_values(const SparseRows& rows, const void* values, Dtype type,
                                          void* out, int64_t begin, int64_t end))

// The same for a weight of blocks, rows of blocks begin to end: out [block, column, row].
DEQCORE_DECLARE_KERNEL(void masked_pack_blocks(const SparseRows& rows, const void* values,
                                               Dtype type, void* out, int64_t begin, int64_t end))

}  // namespace deqcore::cpu
