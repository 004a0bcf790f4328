// The kept entries of a masked matmul's weight, for host and device. No torch.
#pragma once

#include <cstdint>

namespace deqcore {

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

}  // namespace deqcore
