// What the kernels of the masked matmuls share with their bindings. No torch header.
#pragma once

#include <cstdint>

namespace deqcore::cpu {

enum class ValueType { f64, f32, bf16, f16 };  // of tensors; sums are f64 for f64, else f32

// The kept entries of a matrix in compressed sparse rows: of the weight, or of its transpose.
struct SparseRows {
  const int32_t* offsets;   // [rows + 1]
  const int32_t* columns;   // [kept], ascending within a row
  const int32_t* position;  // [kept] where each entry's value is; null: in this order
  int64_t rows;
  int64_t width;  // number of columns
  int64_t kept;
  int64_t block;  // 1, or 16, 32, 64: the entries are whole aligned blocks of that size
};

// Where each block of columns starts in each row: [blocks + 1, rows]. A block of columns of a
// transposed tile of tokens fits the first-level cache.
struct ColumnBlocks {
  const int32_t* starts;
  int64_t columns;  // in a block
};

}  // namespace deqcore::cpu
