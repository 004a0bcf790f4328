// Blocks of columns, which the CPU kernels of the masked matmuls take in turn. No torch.
#pragma once

#include <cstdint>

namespace deqcore::cpu {

// Where each block of columns starts in each row: [blocks + 1, rows]. A block of columns of a
// transposed tile of tokens fits the first-level cache.
struct ColumnBlocks {
  const int32_t* starts;
  int64_t columns;  // in a block
};

}  // namespace deqcore::cpu
