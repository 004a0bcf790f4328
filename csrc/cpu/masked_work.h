// How the CPU bindings of the masked matmuls cut up their work, and spread it over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/column_blocks.h"
#include "ops/torch.h"

namespace deqcore::cpu {

// How many columns of a transposed tile to take at a time: they should fit the first-level cache,
// but each row should find some entries among them.
inline int64_t columns_at_a_time(const SparseRows& entries, int64_t column_bytes,
                                 int64_t first_cache, int64_t entries_per_row) {
  constexpr int64_t kSecondCache = 256 << 10;  // a share of it
  const int64_t cells = entries.rows * entries.width;
  const int64_t wanted = entries_per_row * cells / std::max<int64_t>(entries.kept, 1);
  const int64_t least = first_cache / column_bytes, most = kSecondCache / column_bytes;
  const int64_t columns = std::min(std::max(wanted, least), most);
  const int64_t rounded = (columns + 15) / 16 * 16;
  return std::max<int64_t>(1, std::min(rounded, entries.width));
}

inline std::vector<int32_t> find_starts(const SparseRows& entries, int64_t columns) {
  const int64_t rows = entries.rows;
  const int64_t blocks = std::max<int64_t>(1, (entries.width + columns - 1) / columns);
  std::vector<int32_t> starts((blocks + 1) * rows);
  torch::stable::parallel_for(0, rows, 1 << 10, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t at = entries.offsets[row];
      const int32_t stop = entries.offsets[row + 1];
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t limit = block * columns;
        while (block > 0 && at < stop && entries.columns[at] < limit) ++at;
        starts[block * rows + row] = at;
      }
      starts[blocks * rows + row] = stop;
    }
  });
  return starts;
}

inline std::unique_ptr<char[]> uninitialised(int64_t bytes) {
  return std::make_unique_for_overwrite<char[]>(bytes);
}

// Rows (or rows of blocks) into `count` parts with about as many entries each: [count + 1].
inline std::vector<int64_t> balance_rows(const SparseRows& entries, int64_t rows, int64_t count) {
  const int64_t size = rows > 0 ? entries.rows / rows : 1;
  std::vector<int64_t> bounds{0};
  for (int64_t part = 1; part < count; ++part) {
    int64_t row = bounds.back();
    while (row < rows && entries.offsets[row * size] * count < part * entries.kept) ++row;
    bounds.push_back(row);
  }
  bounds.push_back(rows);
  return bounds;
}

}  // namespace deqcore::cpu
